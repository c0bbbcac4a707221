"""math-verify in processes of its own, asked from any thread: it ends what takes too long by alarms, which only a
process's main thread has, and powers of powers hold the interpreter until then.

As a program, without mdpo: a line of JSON [gold, answer] in, a line true or false out."""

import atexit
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from threading import BoundedSemaphore, Timer

SECONDS = 25.0  # for an answer, after which its process is killed: math-verify's alarms come after 5 in each step
places = BoundedSemaphore(len(os.sched_getaffinity(0)))
free: list[subprocess.Popen] = []


def verified(gold: str, answer: str) -> bool:
    """Whether math-verify takes two answers for the same; False also where it comes to no end. Raises RuntimeError
    where its process fails."""
    with places:
        child = _taken()
        timer = Timer(SECONDS, child.kill)
        timer.start()
        with suppress(BrokenPipeError):
            child.stdin.write(json.dumps([gold, answer]) + "\n")
            child.stdin.flush()
        line = child.stdout.readline()
        timer.cancel()
        if line:
            free.append(child)
            return json.loads(line)
        child.communicate()
        if child.returncode == -signal.SIGKILL:  # the timer, or a system without memory
            return False
        raise RuntimeError(f"math-verify's process ended with exit code {child.returncode}; its error is above")


def _taken() -> subprocess.Popen:
    """A process that nobody asks. It ends with the pipe, and Ctrl-C is not for it."""
    while True:
        try:
            child = free.pop()
        except IndexError:
            command = [sys.executable, "-P", str(Path(__file__))]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            return subprocess.Popen(command, process_group=0, **pipes)
        if child.poll() is None:
            return child


@atexit.register
def end() -> None:
    while free:
        child = free.pop()
        child.kill()
        child.communicate()


def main() -> None:
    from math_verify import parse, verify

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a parser prints is no answer
    for line in sys.stdin:
        right = verify(*(parse(f"\\boxed{{{text}}}") for text in json.loads(line)))
        print(json.dumps(bool(right)), file=answers, flush=True)


if __name__ == "__main__":
    main()
