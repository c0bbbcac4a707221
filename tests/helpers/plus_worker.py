"""Runs of several_runs.py under ZeRO++'s secondary partition: accelerate launch … plus_worker.py RUNS.json

Before each run's first optimizer step rank 0 prints the bytes of its shares: of the policy, of the policy once more,
of the reference, of the reference once more. A run called wrong-… keeps the policy's further shares from one step to
the next: the negative control."""

import sys
from functools import partial

from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from several_runs import main

from dpo_trainer import DPOTrainer
from mdpo.runs.entrypoint import run

Optimizer = DeepSpeedZeroOptimizer_Stage3
prepare, step, invalidate = DPOTrainer._prepare_for_training, Optimizer.step, Optimizer.invalidate_secondary_tensor
untold: list[DPOTrainer] = []


def remember(self, *args, **kwargs):
    untold[:] = [self]
    return prepare(self, *args, **kwargs)


def tell_shares(self, *args, **kwargs):
    trainer = untold.pop() if untold else None
    if trainer is not None and trainer.is_world_process_zero():
        models = [list(model.parameters()) for model in (trainer.model, trainer.ref_model) if model is not None]
        kinds = [[getattr(p, name) for p in model] for model in models for name in ("ds_tensor", "ds_secondary_tensor")]
        print("shares:", *(sum(tensor.nbytes for tensor in kind if tensor is not None) for kind in kinds))
    return step(self, *args, **kwargs)


DPOTrainer._prepare_for_training, Optimizer.step = remember, tell_shares


def choose(name: str) -> None:
    stale = name.startswith("wrong")
    Optimizer.invalidate_secondary_tensor = (lambda self: None) if stale else invalidate


if __name__ == "__main__":
    sys.exit(run(partial(main, before=choose), sys.argv[1:]))
