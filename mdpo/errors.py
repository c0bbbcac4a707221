"""The errors of this project: what a user reads, what drops one pair, what ends a run. Needs no torch."""


class UserError(ValueError):
    """Something that the user can fix: shown as a short message, exit code 1, traceback only with --debug. TRL raises
    ValueError for such things, and its users catch that."""


class DropPair(Exception):
    """One pair cannot be trained on; `str(e)` is the reason under which it is counted, `longest` the tokens of its
    longer side before any cut, 0 where there are none yet."""

    longest = 0


class Preempted(BaseException):
    """Not an Exception: no handler on the way may take it for a failure and go on."""


class RankFailed(RuntimeError):
    """What this rank waited for failed on another one, which tells of it."""
