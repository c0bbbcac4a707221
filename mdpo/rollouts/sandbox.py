"""Runs a Python program that a model wrote, isolated from everything else, and returns what it printed.

    Sandbox().run("print(6 * 7)")  # RunResult(output="42\\n", ended="ok", seconds=0.07)

Guaranteed, on Linux with namespaces: the program is a separate `python -I -S` with its own session, user, process,
mount, network and IPC namespace. It sees Python, its packages and the system's libraries, read-only, and an empty /tmp
in memory that vanishes; no other file, no process outside, no network (not even 127.0.0.1), no environment, no stdin.
Time, memory a process, processes, size of files and of output are limited. All of its processes end with it.

Not guaranteed: it is the same kernel, without a filter of system calls, so a hole in the kernel is a hole here.
Memory is limited for each process, not for all of them together (`processes` × `memory_mb` at most).

`namespaces=False` is for machines whose kernel refuses namespaces, such as containers: then the program is the same
user on the same file system with the same network, and a child that leaves its session outlives it. Limits of time,
memory, output and files, the empty environment and the temporary working folder stay; that of processes does not.
"""

import json
import os
import selectors
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from mdpo.errors import UserError

CHILD = Path(__file__).with_name("sandbox_child.py")
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}  # NumPy's threads would use up `processes`
CHUNK = 1 << 16  # bytes


@dataclass(frozen=True)
class Limits:
    """Of one run: wall-clock seconds, MiB of address space a process, MiB a file and in /tmp, processes and threads,
    bytes of output."""

    seconds: float = 10.0
    memory_mb: int = 1024
    file_mb: int = 16
    folder_mb: int = 64
    processes: int = 16
    output_bytes: int = 1 << 16


@dataclass(frozen=True)
class RunResult:
    """`output` is stdout and stderr as they came. `ended` is ok, error (exit code not 0, or a signal), timeout, memory
    or flood (more than `output_bytes`, of which the first are in `output`). `seconds` of wall-clock time."""

    output: str
    ended: str
    seconds: float


class Sandbox:
    """Programs may run in parallel, from several threads. Raises UserError where the kernel gives no namespaces."""

    def __init__(self, limits: Limits | None = None, namespaces: bool = True):
        self.limits, self.namespaces = limits or Limits(), namespaces
        executable = os.path.realpath(sys.executable)
        packages = list(dict.fromkeys(os.path.realpath(sysconfig.get_path(p)) for p in ("purelib", "platlib")))
        python = [os.path.realpath(p) for p in (sys.base_prefix, sys.base_exec_prefix)]
        self._order = {
            **asdict(self.limits),
            "namespaces": namespaces,
            "executable": executable,
            "packages": packages,
            "python": [*python, *packages],
            "environment": ENVIRONMENT,
        }
        self._works = False
        probe = self.run("print(6 * 7)")
        if probe.output != "42\n":
            raise UserError(f"The sandbox's Python does not work: {probe.ended}: {probe.output.strip()[-300:]}")
        self._works = True

    def run(self, code: str) -> RunResult:
        """Runs one program. Raises UserError where it cannot be started; whatever the program does is in the result."""
        with tempfile.TemporaryDirectory(prefix="mdpo-sandbox-", ignore_cleanup_errors=True) as folder:
            Path(folder, "main.py").write_text(code, encoding="utf-8", errors="replace")
            read_status, write_status = os.pipe()
            try:
                process = self._start(os.path.realpath(folder), write_status)
            except OSError:
                os.close(read_status)
                raise
            finally:
                os.close(write_status)
            with os.fdopen(read_status, "rb") as status:
                return self._watch(process, status)

    def _start(self, folder: str, status_fd: int) -> subprocess.Popen:
        order = {**self._order, "folder": folder, "status_fd": status_fd}
        return subprocess.Popen(
            [self._order["executable"], "-I", "-S", str(CHILD), json.dumps(order)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=ENVIRONMENT,
            start_new_session=True,
            pass_fds=[status_fd],
        )

    def _watch(self, process: subprocess.Popen, status) -> RunResult:
        """Waits for the launcher, not for the end of its output, which a child may keep open forever."""
        began, most = time.monotonic(), self.limits.output_bytes
        output, stopped = bytearray(), None
        ended = os.pidfd_open(process.pid)
        os.set_blocking(process.stdout.fileno(), False)
        with selectors.DefaultSelector() as selector, process.stdout:
            for source in (ended, process.stdout.fileno()):
                selector.register(source, selectors.EVENT_READ)
            while stopped is None:
                left = began + self.limits.seconds - time.monotonic()
                ready = {key.fd for key, _ in selector.select(max(left, 0))}
                if process.stdout.fileno() in ready and not _read(process.stdout.fileno(), output, most):
                    selector.unregister(process.stdout.fileno())
                if len(output) > most:
                    stopped = "flood"
                elif ended in ready:
                    break
                elif left <= 0:
                    stopped = "timeout"
            os.killpg(process.pid, signal.SIGKILL)  # not waited for yet, so the number is still its own
            process.wait()
            os.close(ended)
            while len(output) <= most and _read(process.stdout.fileno(), output, most):
                pass
        seconds, text = time.monotonic() - began, output[:most].decode("utf-8", errors="replace")
        if stopped is None:
            stopped = "flood" if len(output) > most else self._verdict(status.read(), text)
        return RunResult(text, stopped, seconds)

    def _verdict(self, report: bytes, output: str) -> str:
        if not report and self._works:  # the program has killed what would have reported
            return "error"
        report = json.loads(report or b'{"refused": "it ended without a report"}')
        if "refused" in report:
            advice = (
                "Where that cannot be changed (as in many containers), --allow_unisolated_code runs the model's code "
            )
            raise UserError(
                f"The sandbox cannot be built: {report['refused']}. It needs Linux with user namespaces, or root. "
                f"{advice}with limits of time and memory alone: with this user's files and network."
            )
        code = os.waitstatus_to_exitcode(report["status"])
        if code == -signal.SIGXCPU:
            return "timeout"
        if code and output.rstrip().rpartition("\n")[2].startswith("MemoryError"):
            return "memory"
        return "error" if code else "ok"


def _read(source: int, output: bytearray, most: int) -> bool:
    """Appends what can be read, at most one byte more than `most` in all; False at the end, or if nothing is ready."""
    try:
        chunk = os.read(source, min(CHUNK, most + 1 - len(output)))
    except BlockingIOError:
        return False
    output += chunk
    return bool(chunk)
