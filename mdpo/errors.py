"""The errors of this project: what a user reads, what drops one pair, what ends a run. Needs no torch."""

import re

# `key: what is wrong`, after `FILE:LINE: ` where the key is in a file, and after `--` where it is a flag.
_FILE = re.compile(r"\S+:\d+: ")
_SUBJECT = re.compile(r"(?:--)?(?:[Tt]he |[Aa]n? )?([a-z]\w*(?: (?:file|files|model)\b)?|[A-Z][A-Z0-9_]+\b)")
_PLACE = re.compile(r"(?:(?:chosen|rejected|prompt|completion)\w*(?:, |: ))?(?:(?:message|sequence) \d+[^:]*: )?")


class UserError(ValueError):
    """Something that the user can fix: shown as a short message, exit code 1, traceback only with --debug. TRL raises
    ValueError for such things, and its users catch that.

    `key` is what the message is about, and what tests compare: the recipe's key that it names first (`beta` of
    "recipe.yaml:3: beta: -0.1 is out of range"), else its subject ("dataset file"), unless it is given.
    """

    def __init__(self, message: str = "", key: str | None = None):
        super().__init__(message)
        self._key = key

    @property
    def key(self) -> str:
        if self._key is not None:
            return self._key
        message = str(self)
        file = _FILE.match(message)
        subject = _SUBJECT.match(message, file.end() if file else 0)
        return subject[1] if subject else ""


class DropPair(Exception):
    """One pair cannot be trained on; `str(e)` is the reason under which it is counted, `longest` the tokens of its
    longer side before any cut, 0 where there are none yet. `key` is the reason without its place and details: `content
    part` of "chosen, message 3: content part {type: image}", unless it is given."""

    longest = 0

    def __init__(self, reason: str = "", key: str | None = None):
        super().__init__(reason)
        self._key = key

    @property
    def key(self) -> str:
        if self._key is not None:
            return self._key
        reason = str(self)[_PLACE.match(str(self)).end() :]
        return re.split(r":|,? (?:which|is|are) | [{\[\"'(]", reason)[0].strip()


class Preempted(SystemExit):
    """Not an Exception: no handler on the way may take it for a failure and continue. A SystemExit, as asyncio raises
    one out of its loop, and keeps every other BaseException of a callback for its log."""


class RankFailed(RuntimeError):
    """What this rank waited for failed on another one, which reports it."""
