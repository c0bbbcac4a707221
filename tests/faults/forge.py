"""Starts of run_dpo.py without the ten seconds of its imports: a process that has imported them and forks.

Reads a line of JSON for each start, {"argv", "out", "env"}, and answers with the number of the new process, which is a
real one: it leads a session of its own, takes signals, and is killed like any other. When it ends its exit code is
written to OUT.code. Nothing has been computed here before the fork, so that no thread is missing after it.
"""

import json
import os
import runpy
import signal
import sys
from pathlib import Path

import mdpo.reporting.progress
import run_dpo  # noqa: F401  for its imports

mdpo.reporting.progress.BETWEEN_LINES_S = 0  # every log is a line: steps are counted by them


def begin(argv: list[str], out: str, env: dict[str, str]) -> int:
    process = os.fork()
    if process:
        return process
    os.setsid()
    os.environ.update(env)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run behind a shell's &
    with open(out, "ab", 0) as file, open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(handle, "w", buffering=1) for handle in (1, 2))
    sys.argv = ["run_dpo.py", *argv]
    code = 1
    try:
        runpy.run_path("run_dpo.py", run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)


def reap(number, frame) -> None:
    while True:
        try:
            process, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not process:
            return
        draft = Path(sys.argv[1], f"{process}.tmp")
        draft.write_text(str(os.waitstatus_to_exitcode(status)))
        draft.rename(Path(sys.argv[1], f"{process}.code"))


if __name__ == "__main__":
    signal.signal(signal.SIGCHLD, reap)
    print("ready", flush=True)
    for line in sys.stdin:
        print(begin(**json.loads(line)), flush=True)
