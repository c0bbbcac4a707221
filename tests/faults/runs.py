"""Runs that tests kill, signal and inspect: started by the forge, or by a real launcher."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import torch
from repository import ROOT
from safetensors.torch import load_file

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file"]
MARK = "MDPO_TEST_RUN"  # identifies all processes that a run has started
PASSING = {
    "epoch",
    "peak_memory_gb",
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
    "total_flos",
}
WAIT_S = 420  # much more than anything here takes


def environment(mark: str, env: dict[str, str] | None = None) -> dict[str, str]:
    return {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", MARK: mark, **(env or {})}


def wait(condition: Callable[[], object], description: str, text: Callable[[], str] = str, every: float = 0.01):
    """The result of `condition`, as soon as it is true."""
    end = time.monotonic() + WAIT_S
    while not (result := condition()):
        assert time.monotonic() < end, f"{description} never came\n{text()[-3000:]}"
        time.sleep(every)
    return result


class Run:
    """One start of run_dpo.py. `log` is its output so far."""

    def __init__(self, output: Path, mark: str):
        self.output, self.mark, self.code = output, mark, None

    @property
    def log(self) -> str:
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def until(self, condition: Callable[[], object], description: str):
        """Waits for the condition, or fails where the run ends before it."""

        def condition_or_end():
            over = self.ended()  # first: what the condition asks for may come with the end
            return condition() or (over and AssertionError(f"{description}: the run ended first\n{self.log[-3000:]}"))

        if isinstance(outcome := wait(condition_or_end, description, lambda: self.log, 0.002), AssertionError):
            raise outcome
        return outcome

    def until_log(self, text: str):
        return self.until(lambda: text in self.log, text)

    def processes(self) -> list[int]:
        """All running processes of this start."""
        processes = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                alive = (process / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
                if alive and f"{MARK}={self.mark}".encode() in (process / "environ").read_bytes().split(b"\0"):
                    processes.append(int(process.name))
            except OSError:
                continue
        return processes

    def kill(self) -> None:
        """SIGKILL to everything at once."""
        while processes := self.processes():
            for process in processes:
                try:
                    os.kill(process, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.01)

    def end(self) -> int:
        """Its exit code, once it and all processes that it started have ended."""
        try:
            wait(lambda: self.ended() and not self.processes(), "the end", lambda: self.log)
        finally:
            self.kill()
        return self.code


class ForgedRun(Run):
    def __init__(self, forge: "Forge", argv: list[str], output: Path, env: dict[str, str]):
        super().__init__(output, uuid.uuid4().hex)
        self.folder = forge.folder
        self.process = forge.begin(argv, output, environment(self.mark, env))

    def processes(self) -> list[int]:
        """The environment of a fork is not in /proc: its session is."""
        processes = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                state, _, _, session = (process / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(session) == self.process and state != "Z":
                    processes.append(int(process.name))
            except OSError:
                continue
        return processes

    def ended(self) -> bool:
        if (file := self.folder / f"{self.process}.code").exists():
            self.code = int(file.read_text())
        return self.code is not None

    def signal(self, number: int) -> None:
        os.kill(self.process, number)


class LaunchedRun(Run):
    def __init__(self, config: str, argv: list[str], output: Path, env: dict[str, str]):
        super().__init__(output, uuid.uuid4().hex)
        with open(output, "ab") as file:
            self.launcher = subprocess.Popen(
                [*LAUNCH, f"{Path('training_configs', config)}.yaml", "run_dpo.py", *argv],
                cwd=ROOT, env={**os.environ, **environment(self.mark, env)}, stdout=file, stderr=file,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def ended(self) -> bool:
        self.code = self.launcher.poll()
        return self.code is not None

    def trainers(self) -> dict[int, int]:
        """rank -> process."""
        trainers = {}
        for process in self.processes():
            try:  # a short-lived one, a compiler say, may be gone by now
                variables = Path(f"/proc/{process}/environ").read_bytes().decode(errors="replace").split("\0")
                parent = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            ranks = [int(variable.removeprefix("RANK=")) for variable in variables if variable.startswith("RANK=")]
            if ranks and parent == self.launcher.pid:
                trainers[ranks[0]] = process
        return trainers


class Forge:
    """The process that forks; see forge.py."""

    def __init__(self, folder: Path):
        self.folder, self.started = folder, 0
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests/faults/forge.py"), str(folder)],
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=open(folder / "stderr.txt", "w"),
        )  # fmt: skip
        line = self.process.stdout.readline()
        while line and line.strip() != "ready":
            line = self.process.stdout.readline()
        assert line, (folder / "stderr.txt").read_text()

    def begin(self, argv: list[str], output: Path, env: dict[str, str]) -> int:
        json.dump({"argv": argv, "out": str(output), "env": env}, self.process.stdin)
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def run(self, *argv: str, env: dict[str, str] | None = None) -> ForgedRun:
        self.started += 1
        return ForgedRun(self, [str(a) for a in argv], self.folder / f"{self.started}.txt", env or {})

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(60)


def existing(folder: Path, pattern: str) -> list[Path]:
    """The paths that exist now; folders may vanish during the search."""
    while True:
        try:
            return list(folder.glob(pattern))
        except FileNotFoundError:
            continue


def steps(out: Path) -> list[int]:
    """Steps of the complete checkpoints, in order."""
    return sorted(int(path.parent.name.split("-")[1]) for path in existing(out, "checkpoint-*/manifest.json"))


def history(out: Path) -> list[dict]:
    """The log history, without times, speed and memory."""
    logs = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [
        {k: v for k, v in log.items() if k not in PASSING and "runtime" not in k and "per_second" not in k}
        for log in logs
    ]


def differing(out: Path, undisturbed: Path, tolerance: float = 0.0) -> list[str]:
    """Names of weights and logged values that differ between two finished runs; bit by bit, unless with a tolerance."""
    weights, expected_weights = (load_file(folder / "model.safetensors") for folder in (out, undisturbed))
    differences = [
        name for name in set(weights) | set(expected_weights) if name not in weights or name not in expected_weights
    ]
    differences += [
        n for n, w in expected_weights.items() if n in weights and (weights[n] - w).norm() > tolerance * w.norm()
    ]
    a, b = history(out), history(undisturbed)
    differences += [f"{len(a)} logs, not {len(b)}"] if len(a) != len(b) else []
    for log, expected_log in zip(a, b, strict=False):
        for key, value in expected_log.items():
            pair = (torch.tensor(float(log.get(key, "inf"))), torch.tensor(float(value)))
            if not torch.isclose(*pair, rtol=tolerance, atol=tolerance, equal_nan=True):
                differences.append(f"step {expected_log['step']}: {key} {log.get(key)}, not {value}")
    return differences
