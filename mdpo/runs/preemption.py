"""Preemption: requested by SIGTERM, SIGINT, SIGUSR1 or SIGHUP, whatever a run is doing, or by the end of its launcher.

In training the request is kept until the step ends, and all ranks stop together with a checkpoint (ResumableTrainer
asks `requested`). Elsewhere, where nothing has to be finished first, `Preempted` is raised at once. While a run writes
its results, which takes less time than starting again, a request waits for the end.
"""

import ctypes
import os
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from mdpo.errors import Preempted

LAUNCHER_GONE = signal.SIGUSR2  # what this process asks the kernel for; nobody else sends it
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, LAUNCHER_GONE)
STOP_AT_ONCE = (signal.SIGTERM, signal.SIGINT)  # where they come a second time
# A launcher forwards what the terminal has sent to all already: within this time it is the same request.
SAME_REQUEST_S = 3.0
EXIT_CODE = 75  # EX_TEMPFAIL: try again later. Launchers turn it into 1
MARKER = "PREEMPTED"
PR_SET_PDEATHSIG = 1


class _Request:
    def __init__(self):
        self.name, self.at, self.folder = "", 0.0, None  # of the first signal; where the marker goes
        self.deferred = False  # a request waits until the caller asks
        self.process = os.getpid()


_request = _Request()


@contextmanager
def listening():
    """Within it the signals are handled here, except ignored ones (nohup, a shell's &). A process that a launcher
    started stops too when the launcher is gone, however it ended. For a process's main thread."""
    global _request
    _request = _Request()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, action in before.items():
        if action != signal.SIG_IGN:
            signal.signal(number, _on_signal)
    if {"LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"} & set(os.environ) and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, LAUNCHER_GONE)
    try:
        yield
    finally:
        for number, action in before.items():
            signal.signal(number, action)


def end_with_parent() -> None:
    """Of Linux, for a child's `preexec_fn`: SIGTERM when its parent's thread is gone, however it ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _on_signal(number: int, frame) -> None:
    name, now = signal.Signals(number).name, time.monotonic()
    if os.getpid() != _request.process:  # a forked worker of a dataset or loader: its parent decides, by SIGTERM
        if number == signal.SIGTERM:
            os._exit(128 + number)
        return
    if _request.name:
        if number in STOP_AT_ONCE and now - _request.at > SAME_REQUEST_S:
            os.write(2, f"\n{name} again: stopped at once; a checkpoint being written is lost.\n".encode())
            mark()
            os._exit(EXIT_CODE)
        return
    _request.name, _request.at = "the launcher's end" if number == LAUNCHER_GONE else name, now
    if not _request.deferred:
        raise Preempted(_request.name)
    os.write(2, f"\n{_request.name}: stopping at the next step boundary, with a checkpoint.\n".encode())


def requested() -> str:
    """The name of the first signal that came; empty where none did."""
    return _request.name


@contextmanager
def defer_signals():
    """Within it a request waits until the caller asks `requested`."""
    before, _request.deferred = _request.deferred, True
    try:
        yield
    finally:
        _request.deferred = before


def set_marker_dir(folder: str | Path) -> None:
    """From now on the marker is written into `folder`, and signals that have waited for that are delivered."""
    _request.folder = Path(folder)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def mark() -> None:
    """Writes the marker, by which scripts/launch.slurm tells a run to be requeued from one that failed."""
    if _request.folder is None:
        return
    try:
        _request.folder.mkdir(parents=True, exist_ok=True)
        (_request.folder / MARKER).write_text(f"{_request.name}\n", encoding="utf-8")
    except OSError as error:
        print(f"{_request.folder / MARKER} cannot be written: {error}", file=sys.stderr)
