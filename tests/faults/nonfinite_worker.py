"""Under a ZeRO launch, two processes: row 5, which rank 1 alone sees, has NaN as reference log-probs, and later a
gradient of rank 0 is NaN. Writes which steps moved the weights, and whether they stayed finite."""

import json
import math
import sys
from pathlib import Path

import torch
from datasets import Dataset
from tiny import CHATML, agent_rows, tokenizer_for
from transformers import TrainerCallback

from dpo_trainer import DPOTrainer
from mdpo.config.schema import MDPOConfig
from mdpo.errors import UserError
from mdpo.forward.collators import REFERENCE
from mdpo.reference.model import whole


class Weights(TrainerCallback):
    def __init__(self):
        self.history = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        weight = model.model.layers[0].mlp.up_proj.weight
        with whole(weight):
            self.history.append(weight.detach().float().clone())

    on_step_end = on_train_begin


def main(folder: Path, precision: str) -> None:
    args = MDPOConfig(
        str(folder / "out"), max_length=400, learning_rate=1e-2, per_device_train_batch_size=1, max_steps=6,
        train_sampling_strategy="sequential", logging_steps=1, save_strategy="no", report_to="none", use_cpu=True,
        bf16=precision == "bf16", seed=3, disable_tqdm=True, precompute_ref_log_probs=True, max_nonfinite_steps=2,
        reference_cache_dir=str(folder / "cache"), max_grad_norm=float(sys.argv[3]),
    )  # fmt: skip
    tokenizer = tokenizer_for(CHATML, "byte", eos="<|im_end|>")
    weights = Weights()
    trainer = DPOTrainer(
        str(folder / "model"),
        args=args,
        train_dataset=Dataset.from_list([{**row, "key": f"pair-{i}"} for i, row in enumerate(agent_rows(12))]),
        processing_class=tokenizer,
        callbacks=[weights],
    )
    name = REFERENCE["chosen"]
    trainer.train_dataset = trainer.train_dataset.map(
        lambda row, i: {name: [math.nan] * len(row[name]) if i == 5 else row[name]},
        with_indices=True, features=trainer.train_dataset.features,
    )  # fmt: skip
    loss_guard = trainer.nonfinite.loss

    def guarded(loss):  # the fifth and sixth step: the loss is finite, its gradient on rank 0 is not
        loss = loss_guard(loss)
        if trainer.state.global_step >= 4 and args.process_index == 0:
            loss.register_hook(lambda gradient: gradient * math.nan)
        return loss

    trainer.nonfinite.loss = guarded
    error = ""
    try:
        trainer.train()
    except UserError as e:
        error = str(e)
    if args.process_index == 0:
        moved = [not torch.equal(a, b) for a, b in zip(weights.history, weights.history[1:], strict=False)]
        finite = all(bool(weight.isfinite().all()) for weight in weights.history)
        (folder / "found.json").write_text(json.dumps({"moved": moved, "finite": finite, "error": error}))


main(Path(sys.argv[1]), sys.argv[2])
