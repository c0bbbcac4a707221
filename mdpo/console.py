"""What is printed: by one process, on any terminal. Needs no torch."""

import codecs
import os
import sys

IN_WORDS = {"×": "x", "·": "*", "–": "-", "−": "-", "…": "...", "→": "->", "β": "beta", "↵": "\\n", "┊": "|", "«": "<<",
            "»": ">>", "⟦": "[[", "⟧": "]]", "≥": ">=", "≤": "<=", "“": '"', "”": '"', "½": "1/2"}  # fmt: skip
UTF_8 = "Set PYTHONUTF8=1, or a locale as LC_ALL=C.UTF-8."


def is_main_process() -> bool:
    """Rank 0 of all, known before any process group exists."""
    return os.environ.get("RANK", "0") == "0"


def say(*lines: str) -> None:
    """Prints lines on the main process only."""
    if lines and is_main_process():
        print(*lines, sep="\n", flush=True)


def speak_on_any_terminal() -> None:
    """From now on characters that a terminal's encoding lacks are written in words (`×` as `x`, others as `\\u2014`),
    and no print ends a run. Bytes of file names that are in no encoding stay as they are."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not of a notebook, or a test
            stream.reconfigure(errors="in-words")
    if is_main_process() and (names := sys.getfilesystemencoding()) != "utf-8":
        print(f"warning: file names are {names} here: others are not found. {UTF_8}", file=sys.stderr)


def _in_words(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letter = error.object[error.start]
    if 0xDC80 <= ord(letter) <= 0xDCFF:
        return bytes([ord(letter) - 0xDC00]), error.start + 1
    return IN_WORDS.get(letter) or letter.encode("ascii", "backslashreplace").decode(), error.start + 1


codecs.register_error("in-words", _in_words)


def first_line(error: BaseException, innermost: bool = True) -> str:
    """What an error says, or the innermost one that it was raised from, in one line without its final period;
    the error's type where it says nothing."""
    while innermost and error.__cause__ is not None:
        error = error.__cause__
    line = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip()
    return line if line.endswith("...") else line.removesuffix(".")
