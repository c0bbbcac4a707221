"""Trainers of tiny models, and comparisons of two of them."""

import pytest
from datasets import Dataset
from tiny import agent_rows, tiny_llama
from trl import DPOConfig

from dpo_trainer import DPOTrainer
from mdpo.config.schema import MDPOConfig

BETA = 0.1


def trainer_of(cls, rows, tmp_path, tokenizer, config=DPOConfig, models=None, peft_config=None, **options):
    """A trainer of tiny models; `models` makes (policy, reference) anew for each trainer."""
    defaults = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "learning_rate": 1e-3,
        "max_length": 300,
        "beta": BETA,
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    args = config(str(tmp_path / cls.__module__), **{**defaults, **options})
    data = Dataset.from_list(rows) if isinstance(rows, list) else rows
    policy, reference = models() if models else (tiny_llama(tokenizer, seed=0), tiny_llama(tokenizer, seed=1))
    return cls(
        policy,
        reference,
        args,
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def explicit(rows):
    return [{"prompt": r["chosen"][:1], "chosen": r["chosen"][1:], "rejected": r["rejected"][1:]} for r in rows]


def close(actual, expected, name=""):
    assert (actual - expected).norm() <= 1e-5 * expected.norm() + 1e-12, name


def loss_and_gradients(trainer, batch):
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    trainer._metrics["train"].clear() if hasattr(trainer, "_metrics") else trainer.tables.train.clear()
    return loss.detach(), gradients


SMOOTHED = {"exo_pair": 0.01, "robust": 0.1, "aot": 0.1, "aot_unpaired": 0.1}


def compare_metrics(actual, expected, prefix=""):
    scale = abs(expected[f"{prefix}logps/chosen"]) + abs(expected[f"{prefix}logps/rejected"])
    for key, value in expected.items():
        if any(word in key for word in ("runtime", "per_second")):
            continue
        absolute = 1e-5 * scale * (BETA if "reward" in key or "loss" in key else 1.0)
        if "accuracies" in key and abs(expected[f"{prefix}rewards/margins"]) <= absolute:
            continue  # policy = reference: the sign of a rounding error
        assert actual[key] == pytest.approx(value, rel=1e-4, abs=max(absolute, 1e-6)), key


def mdpo_trainer(tmp_path, tokenizer, rows=None, **options):
    return trainer_of(DPOTrainer, rows or agent_rows(8), tmp_path, tokenizer, config=MDPOConfig, **options)


def own(tmp_path, tokenizer, model, ref_model=None, rows=None, config=MDPOConfig, peft_config=None, **options):
    """A trainer on our own model objects, saved first so that a reference can be loaded from its path."""
    args = config(
        str(tmp_path / "out"),
        per_device_train_batch_size=4,
        report_to="none",
        use_cpu=True,
        max_length=300,
        disable_tqdm=True,
        logging_steps=1,
        **{"bf16": False, **options},
    )
    data = Dataset.from_list(rows or agent_rows(8))
    return DPOTrainer(model, ref_model, args, train_dataset=data, processing_class=tokenizer, peft_config=peft_config)


def rows_with_margins(n=8):
    return [{**row, "margin": 0.1 * i} for i, row in enumerate(agent_rows(n))]
