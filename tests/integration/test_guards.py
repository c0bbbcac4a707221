"""Steps whose loss or gradient is not finite: not applied, named, and the end of a run where they go on."""

import math

import pytest
import torch
from datasets import Dataset
from errors import refused
from tiny import agent_rows, tiny_llama
from transformers import TrainerCallback

from dpo_trainer import DPOTrainer
from mdpo.config.schema import MDPOConfig
from mdpo.forward.collators import REFERENCE


class Weights(TrainerCallback):
    """A weight before training and after each step."""

    def __init__(self):
        self.seen = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.seen.append(model.model.layers[0].mlp.up_proj.weight.detach().clone())

    on_step_end = on_train_begin

    def moved(self) -> list[bool]:
        return [not torch.equal(a, b) for a, b in zip(self.seen, self.seen[1:], strict=False)]


def trainer_of(folder, tokenizer, spoilt: dict[int, float], **options):
    """(trainer, its Weights): six steps of two pairs in their order. Row number -> what stands in place of its chosen
    side's reference log-probs."""
    settings = {
        "max_length": 400, "learning_rate": 1e-2, "per_device_train_batch_size": 2, "num_train_epochs": 1,
        "train_sampling_strategy": "sequential", "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "bf16": False, "use_cpu": True, "seed": 3, "disable_tqdm": True,
        "precompute_ref_log_probs": True, "reference_cache_dir": str(folder / "cache"), **options,
    }  # fmt: skip
    weights = Weights()
    trainer = DPOTrainer(
        tiny_llama(tokenizer),
        args=MDPOConfig(str(folder / "out"), **settings),
        train_dataset=Dataset.from_list([{**row, "key": f"pair-{i}"} for i, row in enumerate(agent_rows(12))]),
        processing_class=tokenizer,
        callbacks=[weights],
    )
    name = REFERENCE["chosen"]

    def spoil(row, i):
        return {name: [spoilt[i]] * len(row[name]) if i in spoilt else row[name]}

    trainer.train_dataset = trainer.train_dataset.map(spoil, with_indices=True, features=trainer.train_dataset.features)
    return trainer, weights


def saved(steps: int) -> dict:
    return {"save_strategy": "steps", "save_steps": steps}


@pytest.mark.parametrize("value", [math.nan, math.inf])  # inf: a loss of inf whose gradient is 0
@pytest.mark.parametrize(("bf16", "clip"), [(False, 1.0), (False, 0.0), (True, 1.0)])
def test_a_loss_that_is_not_finite(value, bf16, clip, tokenizer, tmp_path, capsys):
    """Rows 4 and 5 are the third step; row 4 alone is at fault."""
    trainer, weights = trainer_of(tmp_path, tokenizer, {4: value}, bf16=bf16, max_grad_norm=clip)
    trainer.train()
    assert weights.moved() == [True, True, False, True, True, True]
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert "warning: step 3: the loss of row pair-4 is not finite; the step is skipped." in capsys.readouterr().out
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [math.isfinite(log["loss"]) for log in logs] == [True, True, False, True, True, True]
    assert [log.get("nonfinite_steps") for log in logs] == [None, None, 1, 1, 1, 1]


def test_a_gradient_that_is_not_finite(tokenizer, tmp_path, capsys):
    """No row can be told from the other: all of the step are named."""
    trainer, weights = trainer_of(tmp_path, tokenizer, {}, gradient_accumulation_steps=2)
    trainer.model.lm_head.weight.register_hook(lambda g: g * math.nan if trainer.state.global_step == 1 else g)
    trainer.train()
    assert weights.moved() == [True, False, True]
    said = "step 2: a gradient, though no loss, of the step with rows pair-4, pair-5, pair-6, pair-7 is not finite"
    assert said in capsys.readouterr().out


def test_too_many_in_a_row_end_the_run_with_the_last_good_checkpoint(tokenizer, tmp_path):
    trainer, weights = trainer_of(
        tmp_path, tokenizer, dict.fromkeys((2, 6, 8, 10), math.nan), max_nonfinite_steps=3, **saved(1)
    )
    with refused("step", "step 6: ", "row pair-10 ", "3 in a row", "max_nonfinite_steps"):
        trainer.train()
    assert weights.moved() == [True, False, True, False, False]  # step 6 never ended; 2 alone was no row of three
    last = torch.load(tmp_path / "out" / "checkpoint-5" / "optimizer.pt", weights_only=True)
    assert all(state["exp_avg"].isfinite().all() for state in last["state"].values())


def test_without_the_guard_the_weights_are_lost(tokenizer, tmp_path):
    """The wrong twin: Trainer's own behavior, which a plain DPOConfig keeps."""
    trainer, weights = trainer_of(tmp_path, tokenizer, {4: math.nan})
    trainer.args.max_nonfinite_steps = None
    trainer.train()
    assert not any(weight.isfinite().all() for weight in weights.seen[3:])


@pytest.mark.parametrize("skipping", [False, True])
def test_averages_go_on_where_a_checkpoint_falls_between_two_logs(skipping, tokenizer, tmp_path):
    """Logs every fourth step, a checkpoint at the third: what the first three steps gathered is in it, and a step that
    was left out is in no average."""
    spoilt = {2: math.nan} if skipping else {}
    logs = []
    for name, resume in (("whole", None), ("again", tmp_path / "whole" / "out" / "checkpoint-3")):
        trainer, _ = trainer_of(tmp_path / name, tokenizer, spoilt, logging_steps=4, **saved(3))
        trainer.train(resume_from_checkpoint=resume and str(resume))
        logs.append([{k: v for k, v in log.items() if "_runtime" not in k and "per_second" not in k}
                     for log in trainer.state.log_history])  # fmt: skip
    assert logs[0] == logs[1]
    assert logs[0][0]["step"] == 4 and math.isfinite(logs[0][0]["rewards/margins"])
