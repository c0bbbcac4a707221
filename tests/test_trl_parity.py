"""With a plain trl.DPOConfig this trainer is trl.DPOTrainer: same loss, gradients, metrics and steps on the same rows.

float32, a reference that differs from the policy; 1e-5 relative to a tensor's norm, rewards 1e-5 · β · |logps|.
"""

import pytest
import torch
import trl
from datasets import Dataset
from tiny import CHATML, agent_rows, tiny_llama, tokenizer_for, trl_template
from trl import DPOConfig

from dpo_trainer import DPOTrainer
from mdpo.config import MDPOConfig

BETA = 0.1


def trainer_of(cls, rows, tmp_path, tokenizer, config=DPOConfig, **options):
    defaults = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
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
    data = Dataset.from_list(rows)
    return cls(
        tiny_llama(tokenizer, seed=0),
        tiny_llama(tokenizer, seed=1),
        args,
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer,
    )


def explicit(rows):
    return [{"prompt": r["chosen"][:1], "chosen": r["chosen"][1:], "rejected": r["rejected"][1:]} for r in rows]


def plain(rows):
    join = lambda messages: " ".join(m["content"] for m in messages)  # noqa: E731
    return [{"prompt": join(r["chosen"][:1]), "chosen": join(r["chosen"][1:]), "rejected": "No. " * (i + 1)}
            for i, r in enumerate(rows)]  # fmt: skip


def implicit_plain(rows):
    return [{"chosen": r["prompt"] + " " + r["chosen"], "rejected": r["prompt"] + " " + r["rejected"]}
            for r in plain(rows)]  # fmt: skip


def with_tools(rows):
    tools = [{"type": "function", "function": {"name": "python", "description": "Runs code.", "parameters": {}}}]
    return [{**r, "tools": tools, "chat_template_kwargs": {"enable_thinking": False}} for r in explicit(rows)]


FORMATS = {
    "implicit": (lambda rows: rows, CHATML),
    "explicit": (explicit, CHATML),
    "plain": (plain, CHATML),
    "implicit_plain": (implicit_plain, CHATML),
    "tools": (with_tools, trl_template("qwen3")),
    "unstable_prefix": (explicit, trl_template("qwen3_5_think")),  # the prompt's own rendering is no prefix
}


def close(got, wanted, name=""):
    assert (got - wanted).norm() <= 1e-5 * wanted.norm() + 1e-12, name


def loss_and_gradients(trainer, batch):
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    trainer._metrics["train"].clear() if hasattr(trainer, "_metrics") else trainer._tables["train"].clear()
    return loss.detach(), gradients


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("options", [{}, {"max_length": 150}], ids=["whole", "keep_start"])
def test_sigmoid_equals_trl(name, options, tmp_path):
    reshape, template = FORMATS[name]
    tokenizer = tokenizer_for(template, "byte", eos="<|im_end|>")
    rows = reshape(agent_rows(8))
    if name == "tools":  # the template's words about tools come first
        options = {"max_length": 600 + options.get("max_length", 300)}
    ours, theirs = (trainer_of(cls, rows, tmp_path, tokenizer, **options) for cls in (DPOTrainer, trl.DPOTrainer))
    batch, their_batch = (next(iter(t.get_train_dataloader())) for t in (ours, theirs))
    for key in ("input_ids", "attention_mask", "completion_mask"):
        assert torch.equal(batch[key], their_batch[key]), key
    loss, gradients = loss_and_gradients(ours, batch)
    their_loss, their_gradients = loss_and_gradients(theirs, their_batch)
    close(loss, their_loss)
    assert their_loss.item() != pytest.approx(0.6931, abs=0.05)  # the reference is another model
    for parameter, wanted in their_gradients.items():
        close(gradients[parameter], wanted, parameter)
    if "keep_start" in str(tmp_path):
        assert batch["attention_mask"].sum(1).max() == options["max_length"]
        return
    ours.train()
    theirs.train()
    for got, wanted in zip(ours.state.log_history[:-1], theirs.state.log_history[:-1], strict=True):
        assert set(got) == set(wanted)
        compare_metrics(got, wanted)
    for p, q in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        close(p.data, q.data)
    compare_metrics(ours.evaluate(), theirs.evaluate(), prefix="eval_")


def compare_metrics(got, wanted, prefix=""):
    scale = abs(wanted[f"{prefix}logps/chosen"]) + abs(wanted[f"{prefix}logps/rejected"])
    for key, value in wanted.items():
        if any(word in key for word in ("runtime", "per_second")):
            continue
        absolute = 1e-5 * scale * (BETA if "reward" in key or "loss" in key else 1.0)
        assert got[key] == pytest.approx(value, rel=1e-4, abs=max(absolute, 1e-6)), key


def test_collator_of_trl_gives_the_same_loss(tmp_path):
    tokenizer = tokenizer_for(CHATML, "byte", eos="<|im_end|>")
    theirs = trainer_of(trl.DPOTrainer, agent_rows(4), tmp_path, tokenizer)
    ours = trainer_of(DPOTrainer, agent_rows(4), tmp_path, tokenizer)
    batch = next(iter(theirs.get_train_dataloader()))
    close(loss_and_gradients(ours, dict(batch))[0], loss_and_gradients(theirs, dict(batch))[0])


def test_turn_masks_are_the_difference(tmp_path):
    """The wrong twin: the same rows under MDPOConfig supervise fewer tokens and give another loss, and with
    mask_user_turns off the same as TRL."""
    tokenizer = tokenizer_for(CHATML, "byte", eos="<|im_end|>")
    rows = agent_rows(4)
    trl_like = trainer_of(DPOTrainer, rows, tmp_path, tokenizer)
    masked = trainer_of(DPOTrainer, rows, tmp_path, tokenizer, config=MDPOConfig, max_length=300)
    unmasked = trainer_of(DPOTrainer, rows, tmp_path, tokenizer, config=MDPOConfig, mask_user_turns=False)
    losses, tokens = {}, {}
    for name, trainer in {"trl": trl_like, "masked": masked, "unmasked": unmasked}.items():
        batch = next(iter(trainer.get_train_dataloader()))
        losses[name], _ = loss_and_gradients(trainer, batch)
        tokens[name] = batch["completion_mask"].sum().item()
    assert losses["unmasked"] == losses["trl"]
    assert tokens["masked"] < tokens["trl"] == tokens["unmasked"]
    assert (losses["masked"] - losses["trl"]).abs() > 1e-3
