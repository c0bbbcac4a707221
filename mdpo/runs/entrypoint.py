"""Around a run: stale locks removed before DeepSpeed starts, and the one place where errors end."""

import errno
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from mdpo.console import UTF_8, is_main_process, speak_on_any_terminal
from mdpo.errors import Preempted, RankFailed, UserError
from mdpo.runs import failures, preemption
from mdpo.runs.trackers import of_tracker

FOREIGN_LOCK_S = 900  # on several nodes a shared home may hold another node's lock: only older ones are stale


def clear_stale_build_locks() -> list[Path]:
    """Removes and names the locks that a killed build of a DeepSpeed operator left in the torch extensions folder:
    every later start would wait on them forever, without a word. A lock is stale when no process on this machine
    has it open; what the dead build had started is killed. One process of each machine does this; the others wait on
    the lock anyway."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return []
    several_nodes = os.environ.get("WORLD_SIZE", "1") != os.environ.get("LOCAL_WORLD_SIZE", "1")
    removed = []
    for lock in [p for pattern in ("*/lock", "*/*/lock") for p in _extensions_root().glob(pattern)]:
        if several_nodes and time.time() - lock.stat().st_mtime < FOREIGN_LOCK_S:
            print(f"{lock} is there. If no other node builds now, a killed start has left it: remove it if this hangs.")
            continue
        # The one who builds has the lock open. Its ninja and compilers do not, and outlive it when it is killed.
        if not _with_open(lock.resolve()):
            for process in _working_in(lock.resolve().parent):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            lock.unlink(missing_ok=True)
            removed.append(lock)
            print(f"Removed {lock}: a killed build of a DeepSpeed operator left it, and every start would hang.")
    return removed


def _extensions_root() -> Path:
    if os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(os.environ["TORCH_EXTENSIONS_DIR"])
    from torch.utils.cpp_extension import get_default_build_root

    return Path(get_default_build_root())


# What cannot be read of another user's process is None.
def _with_open(file: Path) -> list[psutil.Process]:
    processes = psutil.process_iter(["open_files"])
    return [p for p in processes if any(opened.path == str(file) for opened in p.info["open_files"] or ())]


def _working_in(folder: Path) -> list[psutil.Process]:
    return [process for process in psutil.process_iter(["cwd"]) if process.info["cwd"] == str(folder)]


def run(main: Callable[[list[str]], None], argv: list[str]) -> int:
    """Exit code of `main(argv)`. What a user can fix ends in a short message and exit code 1; with `--debug`, and for
    every other error, the traceback is shown too; a run that a signal ended has exit code 75. One process of several
    exits here and does not return."""
    speak_on_any_terminal()
    debug = "--debug" in argv
    argv = [a for a in argv if a != "--debug"]
    # DeepSpeed calls what torch calls deprecated, and every rank would say so at each start.
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    if not is_main_process():
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # one process reports its retries
    try:
        with preemption.listening(), failures.followed():
            _refuse_undecoded(argv)
            main(argv)
    except Preempted as signal_name:
        if other := failures.other_failure():  # the launcher ends the rest when one rank has failed: no preemption
            failures.leave_with(RankFailed(f"rank {other['rank']} failed"), debug)
        preemption.mark()
        print(f"\nstopped by {signal_name}", file=sys.stderr, flush=True)
        failures.exit_without_teardown(preemption.EXIT_CODE)  # others may be anywhere: nothing is waited for
    except Exception as raised:
        error = of_tracker(raised) or _of_encoding(raised) or _of_disk(raised) or raised
        if failures.several() or _in_process_group():
            failures.leave_with(error, debug)
        if not isinstance(error, UserError):
            raise
        print(failures.text_of(error, debug), file=sys.stderr, flush=True)
        return 1
    if _in_process_group():
        _destroy_process_group()
        failures.exit_without_teardown(0)
    return 0


def _of_encoding(error: Exception) -> UserError | None:
    """What a user reads where a file's name cannot be encoded on this system; None for any other error."""
    if isinstance(error, UnicodeEncodeError) and error.encoding == sys.getfilesystemencoding() != "utf-8":
        return UserError(f"{error.object!r} is no file name here, where they are {error.encoding}. {UTF_8}")
    return None


def _of_disk(error: Exception) -> UserError | None:
    """What a user reads where a file cannot be written; None for any other error."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        where = error.filename or "a file could not be written"
        return UserError(f"{where}: {error.strerror}. What is finished is kept: with room there the same command "
                         "continues.", "disk")  # fmt: skip
    return None


def _refuse_undecoded(argv: list[str]) -> None:
    for word in argv:
        if any(0xDC80 <= ord(letter) <= 0xDCFF for letter in word):
            raise UserError(f"{word!r}: its bytes are no text in {sys.getfilesystemencoding()}. {UTF_8}")


def _in_process_group() -> bool:
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def _destroy_process_group() -> None:
    import torch.distributed as dist

    try:
        dist.destroy_process_group()
    except Exception as error:  # the run is over; a peer may be gone already
        print(f"process group: {error}", file=sys.stderr)
