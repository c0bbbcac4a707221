"""Several processes that generate, each with the whole policy: on GPUs each has one of them, on a CPU they share its
threads, of which a small model's steps leave most idle. Conversations, tools and records stay in this process."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from mdpo.config.recipe import Recipe
from mdpo.errors import UserError
from mdpo.rollouts.episode import Sampled
from mdpo.rollouts.options import AUTO, SamplingOptions
from mdpo.rollouts.server_commands import device_groups
from mdpo.runs.preemption import end_with_parent

ROOT = Path(__file__).resolve().parents[2]
AUTO_CPU = 2  # processes of a CPU, where nobody says how many
END_S = 10.0  # from the end of a process's pipe to its own
SEEDS_APART = 1_000_003  # between the seeds of two processes


class Child:
    """One process (`process_child.py`). Of the pipe it gets first what it loads, then (number, prompt, max_new_tokens);
    it sends the ids that end a turn and the tokens of its context, then (number, Sampled); in place of either the
    UserError that it fails with."""

    def __init__(self, number: int, environment: dict[str, str]):
        ours, theirs = Pipe()
        self.number, self.pipe, self.ended = number, ours, ""
        self.turns: dict[int, asyncio.Future] = {}
        # Without the current folder, where a file may be called as a module is.
        command = [sys.executable, "-P", "-m", "mdpo.rollouts.process_child", str(theirs.fileno()), str(number)]
        with theirs:
            self.process = subprocess.Popen(
                command,
                env=environment,
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL if number else None,  # what it says the first one says too
                preexec_fn=_of_this_process,  # noqa: PLW1509
            )

    def receive(self) -> Any:
        """The next message. Raises UserError where the process is gone."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            try:
                code = self.process.wait(END_S)
            except subprocess.TimeoutExpired:  # its pipe is closed, and it does not end
                self.process.kill()
                code = self.process.wait()
            raise UserError(
                f"processes: process {self.number} ended with exit code {code}; its error is above, if it wrote one. "
                "What has ended is kept: the same command continues.",
                "processes",
            ) from None

    def read(self, loop: asyncio.AbstractEventLoop) -> None:
        """Of a thread: hands each turn to who waits for it, to the end."""
        try:
            while True:
                loop.call_soon_threadsafe(self._settle, *self.receive())
        except Exception as error:
            self.ended = str(error)
            with suppress(RuntimeError):  # the loop has been closed since
                loop.call_soon_threadsafe(self._fail)

    def _settle(self, number: int, found: Sampled | UserError) -> None:
        future = self.turns.pop(number, None)
        if future is None or future.done():
            return
        if isinstance(found, UserError):
            future.set_exception(found)
        else:
            future.set_result(found)

    def _fail(self) -> None:
        for number in list(self.turns):
            self._settle(number, UserError(self.ended, "processes"))


class Processes:
    """In use as a context. The turns of a conversation, those of one asyncio task, go to the same process, whose cache
    has its beginning; its first one to the process that has the fewest. Raises UserError where one does not start."""

    def __init__(self, checkpoint: str, recipe: Recipe, options: SamplingOptions, seed: int):
        count, precision = options.processes, torch.backends.fp32_precision
        places = options.in_flight and -(-options.in_flight // count)
        self.loads = [
            (checkpoint, recipe, replace(options, in_flight=places), seed + SEEDS_APART * n, precision)
            for n in range(count)
        ]
        self.environments = environments(count, recipe.training.device.type)
        self.children: list[Child] = []
        self.of: WeakKeyDictionary[asyncio.Task, Child] = WeakKeyDictionary()
        self.asked, self.threads = 0, dict[Child, threading.Thread]()

    def __enter__(self) -> "Processes":
        try:
            for number, environment in enumerate(self.environments):
                self.children.append(Child(number, environment))
                with suppress(OSError):  # it is gone: `receive` says so
                    self.children[-1].pipe.send(self.loads[number])
            loading = {child.pipe: child for child in self.children}
            while loading:
                for pipe in wait(list(loading)):
                    found = loading.pop(pipe).receive()
                    if isinstance(found, UserError):
                        raise found
                    self.stops, self.context = found
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        """Nobody waits any more for what the processes are at."""
        for child in self.children:
            child.process.kill()
        for child in self.children:
            child.process.wait()
            with socket.socket(fileno=os.dup(child.pipe.fileno())) as end, suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)  # for the thread, whoever else has the other end
            if child in self.threads:
                self.threads[child].join()
            child.pipe.close()

    async def sample(self, prompt: list[int], max_new_tokens: int) -> Sampled:
        """Raises UserError where the process fails."""
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None
        if task not in self.of:
            held = Counter(self.of.values())  # the conversations that have ended are gone
            self.of[task] = min(self.children, key=held.__getitem__)
        child = self.of[task]
        if child not in self.threads:
            self.threads[child] = threading.Thread(target=child.read, args=(loop,), daemon=True)
            self.threads[child].start()
        if child.ended:
            raise UserError(child.ended, "processes")
        number, self.asked = self.asked, self.asked + 1
        future = child.turns[number] = loop.create_future()
        with suppress(OSError):  # it is gone: the thread says so
            child.pipe.send((number, prompt, max_new_tokens))
        return await future


def _of_this_process() -> None:
    """Of a child: it ends with this process, and Ctrl-C is for this one alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def counted(options: SamplingOptions, device: str) -> SamplingOptions:
    """With the number of processes in place of "auto": one for each GPU, on a CPU two where it has as many threads, and
    one on any other device. Raises UserError for a number that the device cannot have."""
    if options.processes == AUTO:
        there = {"cuda": torch.cuda.device_count(), "cpu": min(torch.get_num_threads(), AUTO_CPU)}.get(device, 1)
        return replace(options, processes=max(1, min(there, options.in_flight or there)))
    if options.in_flight and options.in_flight < options.processes:
        raise UserError(
            f"--in_flight: {options.in_flight} leaves some of {options.processes} processes without a conversation.",
            "in_flight",
        )
    if options.processes > 1:
        environments(options.processes, device)
    return options


def environments(count: int, device: str) -> list[dict[str, str]]:
    """Raises UserError where there are fewer GPUs, or devices of another kind."""
    if device not in ("cpu", "cuda"):
        raise UserError(f"--processes: several are for CUDA GPUs and CPUs; this is a {device} device.", "processes")
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    threads = {} if device == "cuda" else {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // count))}
    devices = device_groups(count, int(device == "cuda"), "processes")
    return [{**os.environ, "PYTHONPATH": path, **threads, **own} for own in devices]
