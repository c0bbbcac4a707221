"""Answers in \\boxed{}: finds one in a text, and judges whether it is right."""

import re

from mdpo.errors import UserError
from mdpo.rollouts.verifier import verified

BOX = re.compile(r"\\boxed\s*\{")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # \{ and \} are set braces, not groups
THIN_SPACE = re.compile(r"(?<=\d)(?:\\[,;!: ]|~| )(?=\d{3}(?!\d))")  # 1\,000
EXPONENT = re.compile(r"([\d.])[eE]([+-]?\d+)")  # 1.5e3, as Python prints it
WORDS = re.compile(r"[A-Za-z]{3,}(?: [A-Za-z]+)*")
TEXT = re.compile(r"\\(?:text|mathrm|textbf|mbox)\s*\{([^{}]*)\}")


def last_boxed(text: str) -> str | None:
    """The content of the last \\boxed{…} whose braces are balanced; None where there is none.
    Example: "\\boxed{1}, no: \\boxed{\\frac{1}{2}}" -> "\\frac{1}{2}"."""
    for box in reversed(list(BOX.finditer(text))):
        depth = 1
        for brace in BRACE.finditer(text, box.end()):
            depth += {"{": 1, "}": -1}.get(brace.group(), 0)
            if depth == 0:
                return text[box.end() : brace.start()].strip()
    return None


def gold_answer(value) -> str:
    """The right answer of a row as text: a number, LaTeX, a solution that ends in \\boxed{…}, or GSM8K's "… #### 42".
    Raises UserError."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise UserError(f"an answer has to be a number or a text, not {value!r:.80}.")
    text = str(value)
    text = text.rpartition("####")[2] if "####" in text else text
    boxed = last_boxed(text)
    text = (text if boxed is None else boxed).strip().strip("$").strip()
    if not text:
        raise UserError(f"an answer is empty: {value!r:.80}.")
    return text


def is_right(answer: str | None, gold: str) -> bool:
    """Whether two answers are the same by math-verify, words by their letters. Its rules are lenient on units, on "x ="
    and on per cent (50 and 50% are the same). In any thread."""
    if answer is None:
        return False
    answer, gold = _plain(answer), _plain(gold)
    if answer == gold:
        return True
    words = [TEXT.sub(r"\1", text).strip().casefold() for text in (answer, gold)]
    if any(WORDS.fullmatch(text) for text in words):  # as a product of letters "god" would be "dog"
        return words[0] == words[1]
    return verified(gold, answer)


def _plain(text: str) -> str:
    return EXPONENT.sub(r"\1 \\times 10^{\2}", THIN_SPACE.sub("", text.strip().rstrip(".")))


def refuse_missing_verifier() -> None:
    """Raises UserError where math-verify is not installed: before any model generates."""
    try:
        import math_verify  # noqa: F401
    except ImportError as error:
        raise UserError("math-verify is not installed: pip install '.[evaluate]'.") from error
