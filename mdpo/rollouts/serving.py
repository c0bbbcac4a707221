"""Servers that sampling starts itself, from a command: waited for, started again when they die, stopped at the end.

Each is kept by a small process of its own (`server_keeper.py`), so that nothing of a server outlives sampling, however
that ends. Addresses are of this machine.
"""

import asyncio
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from mdpo.config.recipe import Recipe
from mdpo.console import say
from mdpo.errors import UserError
from mdpo.rollouts.load_policy import adapter_config
from mdpo.rollouts.server_commands import device_groups, free_ports, served_words
from mdpo.runs.preemption import end_with_parent

ROOT = Path(__file__).resolve().parents[2]
KEEPER = Path(__file__).with_name("server_keeper.py")
START_S = 1800.0  # from a server's start to its first answer, at most
SAID_S = 15.0  # between two lines of progress
LOOK_S = 0.2  # between two looks at each server
STOP_S = 30.0  # from the request to stop to its end
DEATHS, WITHIN_S = 3, 3600.0  # a server that dies more often in that time is given up
TAIL = 12  # lines of a log that an error shows


@contextmanager
def servable(checkpoint: str, recipe: Recipe, save: Path) -> Iterator[str]:
    """What servers load: the checkpoint; of an adapter a whole model, in a folder beside the trajectories that is
    removed at the end. Raises UserError where it cannot be merged."""
    if adapter_config(checkpoint) is None:
        yield checkpoint
        return
    folder, dtype = save.with_name(f".{save.stem}.merged").resolve(), str(recipe.model.dtype)
    shutil.rmtree(folder, ignore_errors=True)  # a killed start has left it
    command = [sys.executable, str(ROOT / "scripts/merge_adapter.py"), checkpoint, str(folder)]
    command += [f"--base={recipe.model.model_name_or_path}"]
    command += [f"--dtype={dtype}"] if dtype in ("float32", "bfloat16", "float16") else []
    say(f"serve: the adapter is served merged: {shlex.join(command)}")
    try:
        if code := subprocess.run(command, preexec_fn=end_with_parent).returncode:  # noqa: PLW1509
            raise UserError(f"serve: the adapter was not merged (exit code {code}); the error is above.", "serve")
        yield str(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Served:
    """One server. `state` is starting, up or given up."""

    number: int
    port: int
    words: list[str]
    log: Path
    environment: dict[str, str]
    process: subprocess.Popen | None = None
    state: str = "starting"
    began: float = 0.0  # when its process started
    log_begins: int = 0  # where the process's own lines begin in the log
    starts: int = 0
    deaths: list[float] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        """Raises UserError where the log cannot be written."""
        command = [sys.executable, "-I", "-S", str(KEEPER), str(os.getpid()), *self.words]
        try:
            with self.log.open("ab", buffering=0) as log:
                log.write(f"--- {shlex.join(self.words)}\n".encode())
                self.log_begins = log.tell()
                self.process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=self.environment, start_new_session=True
                )
        except OSError as error:
            raise UserError(f"serve: {self.log}: {error.strerror}.", "serve") from error
        self.state, self.began = "starting", time.monotonic()
        self.starts += 1

    def answers(self) -> bool:
        """Whether /health or /v1/models is there: a server may have only one of them."""
        with httpx.Client(trust_env=False, follow_redirects=False, timeout=2.0) as client:
            for url in (f"http://127.0.0.1:{self.port}/health", f"{self.address}/models"):
                with suppress(httpx.HTTPError):
                    if client.get(url).status_code == 200:
                        return True
        return False

    def stop(self) -> None:
        """Returns when nothing of the server is left, ended by itself or not."""
        if self.process is None:
            return
        self.process.stdin.close()
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            say(f"serve: server {self.number} did not end within {STOP_S:g} s; it is killed")
            self.process.kill()
        if self.process.wait() < 0:  # the keeper itself was killed: its group is left
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def last_lines(self) -> str:
        with self.log.open("rb") as log:
            log.seek(self.log_begins)
            lines = log.read().decode(errors="replace").splitlines()
        return "\n".join(f"    {line}" for line in lines[-TAIL:]) or "    (it wrote nothing)"


class Servers:
    """In use as a context, within which a thread looks after them. `gpus` of this machine belong to each, 0 leaves its
    environment as it is. Raises UserError where one does not start."""

    def __init__(self, command: str, model: str, save: Path, count: int = 1, gpus: int = 0):
        served_words(command)
        devices, ports = device_groups(count, gpus), free_ports(count)
        self.servers = []
        for number, (port, own) in enumerate(zip(ports, devices, strict=True)):
            log = save.with_name(f"{save.stem}.server-{number}.log")
            words = served_words(command, model, port)
            self.servers.append(Served(number, port, words, log, {**os.environ, **own}))
        self.by_address = {server.address: server for server in self.servers}
        self._ends, self._failure = threading.Event(), ""
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Servers":
        try:
            for server in self.servers:
                server.start()
                say(f"serve: server {server.number}: {shlex.join(server.words)}; log {server.log}")
            self._wait()
            self._thread.start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_) -> None:
        self._ends.set()
        self._thread.join()
        self._stop()

    def up(self) -> list[str]:
        """The addresses that answer. Raises UserError where none will again."""
        if self._failure:
            raise UserError(self._failure, "serve")
        return [server.address for server in self.servers if server.state == "up"]

    def starts(self, address: str) -> int:
        """How often a server has been started."""
        return self.by_address[address].starts

    async def died(self, address: str, starts: int) -> bool:
        """Whether the server of that start is gone. A connection breaks a little before that can be seen."""
        server = self.by_address[address]
        await asyncio.sleep(3 * LOOK_S)
        return (server.starts, server.state) != (starts, "up")

    def _wait(self) -> None:
        """Until all answer, the first time."""
        said = began = time.monotonic()
        while True:
            time.sleep(LOOK_S)
            for server in self.servers:
                if why := self._look(server):
                    raise UserError(f"serve: server {server.number} {why}. {server.log} ends with\n"
                                    f"{server.last_lines()}", "serve")  # fmt: skip
            there = sum(server.state == "up" for server in self.servers)
            if there == len(self.servers):
                break
            if time.monotonic() - said >= SAID_S:
                said = time.monotonic()
                say(f"serve: {there} of {len(self.servers)} servers answer after {said - began:.0f} s")
        say(f"serve: {there} of {there} servers answer")

    def _look(self, server: Served) -> str:
        """What is wrong with a server; "" for nothing. One that answers the first time is up from now on."""
        code = server.process.poll()
        if code is not None:
            return f"ended with exit code {code}" + (" while it started" if server.state == "starting" else "")
        if server.state == "starting":
            if server.answers():
                server.state = "up"
            elif time.monotonic() - server.began > START_S:
                return f"did not answer within {START_S:g} s"
        return ""

    def _watch(self) -> None:
        try:
            while not self._ends.wait(LOOK_S):
                for server in self.servers:
                    before = server.state
                    if before == "given up":
                        continue
                    if why := self._look(server):
                        self._again(server, why)
                    elif server.state != before:
                        say(f"serve: server {server.number} answers again")
        except Exception as error:  # a full disk, for example: nobody looks after the servers any more
            self._failure = str(error) if isinstance(error, UserError) else f"serve: {error!r}."

    def _again(self, server: Served, why: str) -> None:
        """Starts a server that died, or gives it up."""
        server.stop()
        now = time.monotonic()
        server.deaths = [*(t for t in server.deaths if now - t < WITHIN_S), now]
        if len(server.deaths) <= DEATHS:
            say(f"serve: server {server.number} {why}; start {len(server.deaths)} of {DEATHS} begins")
            server.start()
            return
        server.state = "given up"
        say(f"serve: server {server.number} {why}, for the {len(server.deaths)}th time; it is given up")
        if all(s.state == "given up" for s in self.servers):
            self._failure = (f"serve: no server is left. {server.log} ends with\n{server.last_lines()}\nWhat has ended "
                             "is kept: the same command continues.")  # fmt: skip

    def _stop(self) -> None:
        for server in self.servers:  # all are asked before one is waited for
            if server.process is not None:
                server.process.stdin.close()
        for server in self.servers:
            server.stop()
