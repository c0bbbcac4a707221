"""How a run of several processes ends in an error: the rank that fails says so at once, the others follow, and
nobody waits for a process group: taking NCCL's down while a peer is inside a collective may never end."""

import atexit
import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager

from mdpo import ranks
from mdpo.errors import UserError
from mdpo.runs import preemption

MAIN_SPEAKS_FIRST_S = 2.0  # an error of all ranks is printed once, by rank 0 if it gets there in this time
WITHOUT_GROUP_S = 5.0  # the same before ranks can ask each other
LEAVE_S = 5.0  # for what has to be done at exit, after an error
FOLLOW_S = 5.0  # after another rank's error, for that rank and for the launcher
LOOK_S = 1.0
STORE_S = 3.0  # an answer of the store that takes longer will not come


def several() -> bool:
    """Whether this process is one of several, known before any process group exists."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def followed():
    """Within it this process ends soon after another rank has said that it failed, whatever it hangs in."""
    over = threading.Event()
    if several():
        threading.Thread(target=_follow, args=(over,), daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _follow(over: threading.Event) -> None:
    while not over.wait(LOOK_S):
        try:
            failure = ranks.failure()
        except Exception:  # the store went with its process: the launcher, which ends this one itself
            return
        if failure and not over.wait(FOLLOW_S):
            _say_other(failure)
            os._exit(1)


def other_failure() -> dict | None:
    """`ranks.failure` of another rank, where the store answers."""
    failure = _answered(ranks.failure) if several() else None
    return failure if failure and failure["rank"] != ranks.rank() else None


def leave_with(error: Exception, debug: bool) -> None:
    """Prints the error, unless another rank printed the same or failed before, and ends this process with exit code 1.
    Does not return."""
    line = f"{type(error).__name__}: {error}"
    other = _claimed(error, line)
    if other is None:
        print(text_of(error, debug), file=sys.stderr, flush=True)
        if ranks.ranks() > 1:
            time.sleep(1.5 * LOOK_S)  # the store may be this process's, and the others look there
    else:
        if other["line"] != line:
            _say_other(other)
        if not preemption.requested():  # else the launcher is already ending it
            time.sleep(FOLLOW_S)
    exit_without_teardown(1, LEAVE_S)


def text_of(error: Exception, debug: bool) -> str:
    where = f" [rank {os.environ['RANK']}]" if os.environ.get("RANK", "0") != "0" else ""
    trace = "" if isinstance(error, UserError) and not debug else "".join(traceback.format_exception(error))
    return f"{trace}\nerror{where}: {error if isinstance(error, UserError) else repr(error)}"


def _patience(error: Exception, main: bool) -> float:
    """For how long somebody else may speak first: what users can fix mostly comes on all ranks, and a RankFailed is
    caused by another one."""
    if isinstance(error, ranks.RankFailed):
        return 2 * MAIN_SPEAKS_FIRST_S
    return MAIN_SPEAKS_FIRST_S if isinstance(error, UserError) and not main else 0


def _claimed(error: Exception, line: str) -> dict | None:
    """The other rank that has failed before, or None: then this one's is the error to report."""
    main = os.environ.get("RANK", "0") == "0"
    if ranks.ranks() == 1:
        time.sleep(0 if main else WITHOUT_GROUP_S)
        return None
    end = time.monotonic() + _patience(error, main)
    while not (failure := other_failure()) and time.monotonic() < end:
        time.sleep(0.05)
    failure = failure or _answered(lambda: ranks.claim_failure(line))
    return failure if failure and failure["rank"] != ranks.rank() else None


def _say_other(failure: dict) -> None:
    mine = os.environ.get("RANK", "0")
    print(f"[rank {mine}] ended: rank {failure['rank']} on {failure['host']} failed.", file=sys.stderr, flush=True)


def _answered(question: Callable[[], dict | None]) -> dict | None:
    """The store's answer; None where it gives none, or not in time."""
    answers: list = []

    def ask():
        try:
            answers.append(question())
        except Exception:  # the store is gone: there is nobody left to agree with
            answers.append(None)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(STORE_S)
    return answers[0] if answers else None


def exit_without_teardown(code: int, within: float | None = None) -> None:
    """What the interpreter does at its end, in its order, without taking itself apart; `within` that many seconds, else
    exit code 1. DeepSpeed keeps the process group alive after its destruction; a gloo thread that lets go of its last
    tensor during the teardown asks for the GIL, and the process dies with SIGABRT: a finished run would be reported as
    failed (docs/log.md)."""
    if within is not None:  # a thread of its own, which needs no GIL
        faulthandler.dump_traceback_later(within, exit=True, file=open(os.devnull, "w"))  # noqa: SIM115
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
