"""What a run leaves behind besides weights: its figures as JSON and as a table."""

import json
import platform
import resource
import time
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback

REPORT, RESOLVED = "run_report.json", "recipe_resolved.yaml"
PACKAGES = ("torch", "transformers", "trl", "accelerate", "deepspeed", "datasets", "peft", "numpy")
# Row of the table: what it is called, and its metric.
SHOWN = (
    ("DPO loss", "eval_loss"),
    ("reward accuracy", "eval_rewards/accuracies"),
    ("mean reward margin", "eval_rewards/margins"),
    ("log-probs chosen", "eval_logps/chosen"),
    ("log-probs rejected", "eval_logps/rejected"),
)


def peak_memory_gb(device) -> float:
    """Highest memory of this process so far, in GB (1e9 bytes): the GPU's where there is one, else resident memory."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class StepTimer(TrainerCallback):
    """Seconds between the begin and the end of optimiser steps: training alone, no evaluation, no saving."""

    def __init__(self):
        self.seconds, self.steps, self._began = 0.0, 0, None

    def on_step_begin(self, args, state, control, **kwargs):
        self._began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds, self.steps = self.seconds + time.perf_counter() - self._began, self.steps + 1

    def figures(self, args) -> dict[str, float]:
        """Pairs of all processes; the last step of an epoch may have had fewer pairs than it is counted with."""
        pairs = self.steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return {
            "steps": self.steps,
            "train_seconds": self.seconds,
            "pairs_per_second": pairs / self.seconds if self.seconds else 0.0,
        }


def write_report(folder: str | Path, figures: dict, history: list[dict], data: dict) -> dict:
    """Writes `run_report.json` into the output folder and returns it: figures, the evaluation before the first step if
    there was one, the first loss, what became of every row, versions and machine."""
    report = {
        **figures,
        "before": next((log for log in history if "eval_loss" in log and log["step"] == 0), {}),
        "first_loss": next((log["loss"] for log in history if "loss" in log), None),
        "data": data,
        "versions": {p: version(p) for p in PACKAGES} | {"python": platform.python_version()},
        "machine": {"system": platform.platform(), "processor": platform.processor() or platform.machine()},
    }
    Path(folder, REPORT).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return report


def show_result(report: dict) -> None:
    """The table at the end of a run: held-out figures before and after, speed and memory."""
    console = Console(highlight=False)
    before, after = report["before"], report["after"]
    if after:
        table = Table(title=f"held-out pairs: {int(after['eval_pairs'])}")
        shown = {name: metrics for name, metrics in (("before", before), ("after", after)) if metrics}
        table.add_column("")
        for name in shown:
            table.add_column(name, justify="right")
        for name, key in SHOWN:
            table.add_row(name, *(f"{metrics[key]:.4f}" for metrics in shown.values()))
        console.print(table)
    if report["first_loss"] is not None:
        console.print(f"first training loss {report['first_loss']:.4f}")
    speed = f"{report['pairs_per_second']:.2f} pairs/s over {report['steps']} steps"
    memory = f"peak memory {report['peak_memory_gb']:.2f} GB a process"
    console.print(f"{speed}, {report['train_seconds']:.0f} s of training, {memory}")
