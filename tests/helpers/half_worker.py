"""Runs of several_runs.py in half precision: accelerate launch … half_worker.py RUNS.json

Each tells the dtypes of its tensors. Of a run called wrong-… the batch goes through Trainer's own `_prepare_input`,
which casts it to DeepSpeed's dtype: the negative control. A CPU without float16 units is told that it has them."""

import sys
from functools import partial

from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from several_runs import main
from transformers import Trainer

from dpo_trainer import DPOTrainer
from mdpo.runs.entrypoint import run

CPU_Accelerator.is_fp16_supported = lambda self: True
prepare = DPOTrainer._prepare_for_training


def tell_dtypes(self, *args, **kwargs):
    """Prints the real dtypes of a run's tensors, once DeepSpeed has them."""
    prepared = prepare(self, *args, **kwargs)
    if not self.is_deepspeed_enabled:
        return prepared
    optimizer = self.model_wrapped.optimizer
    masters = getattr(optimizer, "single_partition_of_fp32_groups", None) or optimizer.fp32_partitioned_groups_flat
    reference = [p.dtype for p in self.ref_model.parameters()] if self.ref_model is not None else []
    kinds = {p.dtype for p in self.model.parameters()}, set(reference), {master.dtype for master in masters}
    if self.is_world_process_zero():
        print("seen:", *("/".join(sorted(map(str, kind))) or "none" for kind in kinds))
    return prepared


DPOTrainer._prepare_for_training = tell_dtypes


prepare_input = DPOTrainer._prepare_input


def choose(name: str) -> None:
    DPOTrainer._prepare_input = Trainer._prepare_input if name.startswith("wrong") else prepare_input


if __name__ == "__main__":
    sys.exit(run(partial(main, before=choose), sys.argv[1:]))
