"""Where the time of our training step goes: seconds and shares by part, from torch's profiler on the CPU.

python benchmarks/parts.py "long shared history"
"""

import os
import sys
import tempfile

import bench_dpo
import torch
import workloads
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback

from dpo_trainer import DPOTrainer
from mdpo.config.schema import MDPOConfig

STEPS = 4  # the last one is profiled
PARTS = {  # part -> substrings of its operators' names; the first match counts
    "attention": ("scaled_dot_product",),
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "compiled RMSNorm, SwiGLU, softmax": ("CompiledFxGraph",),
    "optimizer and clipping": ("_fused_adamw", "linalg_vector_norm", "Optimizer", "aten::stack"),
}


class LastStep(TrainerCallback):
    def __init__(self):
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == STEPS - 1:
            self.profile.start()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == STEPS:
            self.profile.stop()


def shares(profile) -> dict[str, float]:
    """Seconds of each part: self time of its operators, without the operators that they call."""
    seconds = dict.fromkeys([*PARTS, "the rest"], 0.0)
    for event in profile.key_averages():
        part = next((p for p, substrings in PARTS.items() if any(word in event.key for word in substrings)), "the rest")
        seconds[part] += event.self_cpu_time_total / 1e6
    return seconds


def main(name: str) -> None:
    workload = workloads.WORKLOADS[name]
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "per_device_train_batch_size": workload.pairs,
            "max_steps": STEPS,
            "train_sampling_strategy": "sequential",  # pairs of one prompt stay together
            "max_length": 8192,
            "bf16": False,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "precompute_ref_log_probs": True,
            "reference_cache_dir": folder,
            "model_init_kwargs": {"dtype": "float32"},
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        rows = Dataset.from_list(workload.rows(workload.pairs * STEPS))
        model = str(workloads.ROOT / "models/smollm2-135m-instruct")
        tokenizer = workloads.tokenizer(model, workload.template)
        arguments = {"train_dataset": rows, "processing_class": tokenizer}
        trainer = DPOTrainer(model, args=MDPOConfig(folder, **settings), **arguments)
        profiler = LastStep()
        trainer.add_callback(profiler)
        trainer.train()
    seconds_of_part = shares(profiler.profile)
    table = Table(title=f"a step of {name}, {sum(seconds_of_part.values()):.2f} s, {torch.get_num_threads()} threads")
    table.add_column("part")
    table.add_column("seconds", justify="right")
    table.add_column("share", justify="right")
    for part, seconds in seconds_of_part.items():
        table.add_row(part, f"{seconds:.2f}", f"{seconds / sum(seconds_of_part.values()):.0%}")
    Console(width=80).print(table)


if __name__ == "__main__":
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:  # glibc reads it when a process starts
        os.execve(
            sys.executable, [sys.executable, *sys.argv], os.environ | {k: str(v) for k, v in bench_dpo.MALLOC.items()}
        )
    main(sys.argv[1] if len(sys.argv) > 1 else "agent pairs")
