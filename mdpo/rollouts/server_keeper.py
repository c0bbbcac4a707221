"""Keeps one server that `mdpo.rollouts.serving` starts, as `python -I -S server_keeper.py OWNER COMMAND …`: not a
module to import.

The command, and all that it starts, ends when stdin is closed or the process OWNER has died, however it did: a child
that it had forked may keep stdin open. What a
command leaves behind that ended by itself is killed: vLLM's engine outlives its API server. Children that were
orphaned, or have a session of their own, come to this process (PR_SET_CHILD_SUBREAPER). All are in its process group,
for sampling to kill if this process is; where both are killed at once, only the command's first process ends.
Exit code: the command's, 128 + N where signal N ended it.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
import time

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
GRACE_S = 10.0  # between the request to stop and SIGKILL


def main(owner: int, command: list[str]) -> int:
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # the end of stdin decides; SIG_IGN would be inherited
    try:
        server = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL),  # if this process itself is killed
        )
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        return 127
    ended, owners = os.pidfd_open(server.pid), still_there(owner)
    ready = select.select([0, ended, *owners], [], [])[0] if owners else []
    if ended not in ready:
        for process in descendants():
            send(process, signal.SIGTERM)
        select.select([ended], [], [], GRACE_S)
    while left := descendants():
        for process in left:
            send(process, signal.SIGKILL)
        time.sleep(0.05)
        reap(server)
    code = server.wait()
    return code if code >= 0 else 128 - code


def still_there(process: int) -> list[int]:
    """A descriptor that can be read when the process has ended; none where it has already."""
    try:
        return [os.pidfd_open(process)]
    except ProcessLookupError:
        return []


def descendants() -> list[int]:
    """All processes below this one that have not ended."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                    state, parent = file.read().rpartition(")")[2].split()[:2]
            except OSError:
                continue
            if state != "X":
                children.setdefault(int(parent), []).append(int(name))
    found, waiting = [], [os.getpid()]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def send(process: int, number: int) -> None:
    try:
        os.kill(process, number)
    except (ProcessLookupError, PermissionError):  # it has ended, or is another user's
        pass


def reap(server: subprocess.Popen) -> None:
    """Waits for what has ended, the server with its Popen."""
    server.poll()
    while True:
        try:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if found is None:
            return
        server.poll() if found.si_pid == server.pid else os.waitpid(found.si_pid, 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
