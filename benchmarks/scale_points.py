"""One measured point of benchmarks/scale.py, in processes of its own: python benchmarks/scale_points.py POINT.json

POINT.json says what is measured; each rank writes what it found beside it, as POINT-RANK.json.
"""

import functools
import json
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

STARTED = time.time()
STAGES = {  # the functions of a start, as (module, name), and the stage that their own time counts for
    ("mdpo.data.prepare", "load_datasets"): "load",
    ("mdpo.data.prepare", "tokenize_dataset"): "tokenize and mask",
    ("mdpo.data.prepare", "prepare_pairs"): "mix, hold out",
    ("mdpo.data.prepare", "_tell"): "report",
    ("mdpo.data.prepare", "token_totals"): "report",
    ("mdpo.data.prepare", "rank_imbalance"): "report",
    ("run_dpo", "check_lengths"): "digest and lengths",
    ("run_dpo", "content_facts"): "digest and lengths",
    ("dpo_trainer", "Reference.precompute"): "reference cache",
    ("run_dpo", "_trainer"): "trainer",
    ("dpo_trainer", "DPOTrainer.train"): "sampler to the first step",
}
ORDER = ["imports", *dict.fromkeys(STAGES.values()), "the rest", "the first step"]


def status(field: str) -> float:
    """GB of this process by a line of /proc/self/status: VmHWM, the most resident memory since `forget_peak`, or
    RssAnon, what is resident now without pages of files, which all ranks share."""
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) * 1024 / 1e9 for line in file if line.startswith(field))


def forget_peak() -> None:
    with suppress(OSError):  # a kernel that does not let us: then the peak is the whole process's
        Path("/proc/self/clear_refs").write_text("5")


class Stages:
    """The seconds of each stage by itself, what it calls of other stages not counted, and the most memory of this
    process's own (without pages of files) while it was the innermost one."""

    def __init__(self) -> None:
        self.seconds, self.memory = dict.fromkeys(ORDER, 0.0), dict.fromkeys(ORDER, 0.0)
        self._open, self._since = ["the rest"], time.time()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.look()
            time.sleep(0.1)

    def look(self) -> None:
        stage = self._open[-1]
        self.memory[stage] = max(self.memory[stage], status("RssAnon"))

    def change(self) -> None:
        """Counts the time since the last change for the innermost stage."""
        now = time.time()
        self.seconds[self._open[-1]] += now - self._since
        self._since = now
        self.look()

    def wrap(self, owner: Any, name: str, stage: str) -> None:
        inner = getattr(owner, name)

        @functools.wraps(inner)
        def timed(*args, **kwargs):
            self.change()
            self._open.append(stage)
            try:
                return inner(*args, **kwargs)
            finally:
                self.change()
                self._open.pop()

        setattr(owner, name, timed)


def wrap_all(stages: Stages) -> None:
    """All of STAGES; a function is wrapped where it is looked up."""
    import importlib

    import run_dpo

    for (module, name), stage in STAGES.items():
        owner = importlib.import_module(module)
        *path, last = name.split(".")
        stages.wrap(functools.reduce(getattr, path, owner), last, stage)
    run_dpo.prepare_pairs = importlib.import_module("mdpo.data.prepare").prepare_pairs


def start(point: dict[str, Any], write) -> None:
    """A run of run_dpo.py until its first step is done."""
    began = time.time()
    stages = Stages()
    import run_dpo

    stages.change()
    stages.seconds["imports"] = stages.seconds.pop("the rest") + began - STARTED
    stages.seconds["the rest"] = 0.0
    wrap_all(stages)
    if point["stand_in"]:
        stand_in_reference()

    def first_step(*_args, **_kwargs) -> None:
        stages.change()
        stages._open.append("the first step")

    def done(*_args, **_kwargs) -> None:
        stages.change()
        write({"stages": {name: stages.seconds[name] for name in ORDER}, "own_gb": stages.memory})
        os._exit(0)

    run_dpo.StepTimer.on_step_begin, run_dpo.StepTimer.on_step_end = first_step, done
    sys.exit(run_dpo.run(run_dpo.main, point["argv"]))


def stand_in_reference() -> None:
    """In place of the reference's forward pass zeros, one of each supervised token: of a million pairs the pass of
    even the smallest model would take hours. Everything around it is real."""
    import torch

    from mdpo.reference import frozen

    class Zeros:
        def __init__(self, n: int):
            self.logps = torch.zeros(n)

    frozen.score_reference = lambda model, policy, accelerator, batch, layout: Zeros(len(batch.sequence_of_token))


def steps(point: dict[str, Any], write) -> None:
    """Some steps of DPOTrainer on long pairs; the seconds are those of steps after the first."""
    from datasets import Dataset
    from scale_inputs import long_rows
    from transformers import TrainerCallback

    from dpo_trainer import DPOTrainer
    from mdpo.config.schema import MDPOConfig

    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.began = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            seconds.append(time.perf_counter() - self.began)

    args = MDPOConfig(
        point["folder"],
        per_device_train_batch_size=point["pairs"],
        max_steps=point["steps"],
        max_length=None,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        precompute_ref_log_probs=True,
        reference_cache_dir=f"{point['folder']}/reference",
        model_init_kwargs={"dtype": "float32"},
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    data = Dataset.from_list(long_rows(point["rows"], point["tokens"]))
    trainer = DPOTrainer(point["model"], args=args, train_dataset=data)
    trainer.add_callback(Clock())
    before = status("VmRSS")
    forget_peak()
    trainer.train()
    tokens = trainer.state.log_history[0]["num_tokens"]
    later = sorted(seconds[1:])
    write({"seconds": later[len(later) // 2], "tokens": tokens, "before_gb": before, "step_gb": status("VmHWM")})


def main(path: Path) -> None:
    point = json.loads(path.read_text(encoding="utf-8"))

    def write(found: dict[str, Any]) -> None:
        import resource

        kib = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        found |= {"peak_gb": max(kib[0] * 1024 / 1e9, found.get("step_gb", 0)), "child_gb": kib[1] * 1024 / 1e9}
        result = path.with_name(f"{path.stem}-{os.environ.get('RANK', '0')}.json")
        result.write_text(json.dumps(found) + "\n", encoding="utf-8")

    {"steps": steps, "start": start}[point["kind"]](point, write)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
