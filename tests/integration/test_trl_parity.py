"""With a plain trl.DPOConfig this trainer is trl.DPOTrainer: same loss, gradients, metrics and steps on the same rows.

float32, a reference that differs from the policy; 1e-5 relative to a tensor's norm, rewards 1e-5 · β · |logps|.
"""

import math

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny import CHATML, agent_rows, tiny_llama, tiny_mixtral, tokenizer_for, trl_template
from trainers import SMOOTHED, close, compare_metrics, explicit, loss_and_gradients, trainer_of

from dpo_trainer import DPOTrainer
from mdpo.config.schema import MDPOConfig
from mdpo.config.validation import OF_DIFFERENCE
from mdpo.loss.registry import OF_TRL


def plain(rows):
    join = lambda messages: " ".join(m["content"] for m in messages)  # noqa: E731
    return [{"prompt": join(r["chosen"][:1]), "chosen": join(r["chosen"][1:]), "rejected": "No. " * (i + 1)}
            for i, r in enumerate(rows)]  # fmt: skip


def implicit_plain(rows):
    return [{"chosen": r["prompt"] + " " + r["chosen"], "rejected": r["prompt"] + " " + r["rejected"]}
            for r in plain(rows)]  # fmt: skip


def short_rows(n):
    answers = (
        " 6.",
        " Paris.",
        " The answer is 12.",
        " it is sunny",
        " rivers and hills",
        " Thank you.",
        " 12",
        " 3 * 4",
    )
    return [{"prompt": f"What is {i} * 4?", "chosen": answers[i % 8], "rejected": answers[(i + 3) % 8]}
            for i in range(n)]  # fmt: skip


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


def same_as_trl(rows, tmp_path, tokenizer, whole_run=True, **options):
    """Batches, loss and gradients of the first one, then two steps with their metrics, weights and an evaluation."""
    ours, theirs = (trainer_of(cls, rows, tmp_path, tokenizer, **options) for cls in (DPOTrainer, trl.DPOTrainer))
    batch, their_batch = (next(iter(t.get_train_dataloader())) for t in (ours, theirs))
    for key in ("input_ids", "attention_mask", "completion_mask"):
        assert torch.equal(batch[key], their_batch[key]), key
    loss, gradients = loss_and_gradients(ours, batch)
    their_loss, their_gradients = loss_and_gradients(theirs, their_batch)
    close(loss, their_loss)
    for parameter, wanted in their_gradients.items():
        close(gradients[parameter], wanted, parameter)
    assert any(wanted.norm() > 1e-6 for wanted in their_gradients.values())
    if whole_run:
        ours.train()
        theirs.train()
        assert len(ours.state.log_history) >= 3
        for got, wanted in zip(ours.state.log_history[:-1], theirs.state.log_history[:-1], strict=True):
            assert set(got) == set(wanted)
            compare_metrics(got, wanted)
        weights = dict(theirs.model.named_parameters())
        for name, weight in ours.model.named_parameters():
            close(weight.data, weights[name].data, name)
        compare_metrics(ours.evaluate(), theirs.evaluate(), prefix="eval_")
    return ours, theirs, their_loss.item()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "keep_start"])
def test_formats(name, cut, tmp_path):
    reshape, template = FORMATS[name]
    tokenizer = tokenizer_for(template, "byte", eos="<|im_end|>")
    rows, options = reshape(agent_rows(8)), {"max_length": 900}
    if cut:
        whole = trainer_of(DPOTrainer, rows, tmp_path, tokenizer, **options).train_dataset
        options = {"max_length": max(len(ids) for ids in whole["chosen_ids"]) - 10}
    ours, _, loss = same_as_trl(rows, tmp_path, tokenizer, whole_run=not cut, **options)
    assert loss != pytest.approx(math.log(2), abs=5e-4)  # the reference is another model
    longest = max(len(ids) for ids in ours.train_dataset["chosen_ids"])
    assert longest == options["max_length"] if cut else longest < options["max_length"]


def nearby(tokenizer, noise=0.01):
    """A policy that is its reference and a little noise: small log ratios. Far from it, and over many tokens, float32's
    error of a log-prob would be more than 1e-5 of a loss that grows exponentially with its ratios."""
    policy, reference = (tiny_llama(tokenizer, seed=0, initializer_range=0.1) for _ in range(2))
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(torch.randn_like(weight) * noise)
    return policy, reference


@pytest.mark.parametrize("loss", OF_TRL)
def test_losses(loss, tmp_path, tokenizer):
    models = lambda: nearby(tokenizer)  # noqa: E731
    options = {"label_smoothing": SMOOTHED.get(loss, 0.0), "models": models, "loss_type": [loss]}
    options |= {"discopop_tau": 0.2} if loss == "discopop" else {}  # its default, 0.05, makes 20 errors of one
    ours, *_ = same_as_trl(short_rows(8), tmp_path, tokenizer, **options)
    assert abs(ours.state.log_history[0]["rewards/margins"]) > 1e-3


DIVERGENCES = {
    "forward_kl": {},
    "js_divergence": {},
    "alpha_divergence": {"f_alpha_divergence_coef": 0.3},
    "alpha_1": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
}


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("loss", sorted(OF_DIFFERENCE - {"sft"}))
def test_divergences(loss, divergence, tmp_path, tokenizer):
    options = {"f_divergence_type": divergence, **DIVERGENCES[divergence], "label_smoothing": SMOOTHED.get(loss, 0.0)}
    options |= {"discopop_tau": 0.5} if loss == "discopop" else {}
    models = lambda: nearby(tokenizer)  # noqa: E731
    same_as_trl(short_rows(4), tmp_path, tokenizer, whole_run=False, models=models, loss_type=[loss], **options)


OPTIONS = {
    "mixture": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "mixture_unweighted": {"loss_type": ["sigmoid", "hinge"]},
    "ld_alpha": {"ld_alpha": 0.3},
    "ld_alpha_ipo": {"ld_alpha": 0.0, "loss_type": ["ipo", "sft"]},
    "ld_alpha_precomputed": {"ld_alpha": 0.3, "precompute_ref_log_probs": True},
    "use_weighting": {"use_weighting": True},
    "use_weighting_mixture": {"use_weighting": True, "loss_type": ["sigmoid", "apo_zero"], "loss_weights": [1.0, 0.5]},
    "precomputed": {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 3},
    "sync": {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.6},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "beta": {"beta": 0.2},
    "padded": {"pad_to_multiple_of": 64},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, tmp_path, tokenizer):
    *_, loss = same_as_trl(agent_rows(8), tmp_path, tokenizer, **OPTIONS[name])
    plain = trainer_of(DPOTrainer, agent_rows(8), tmp_path, tokenizer)
    if name not in ("precomputed", "sync", "accumulation", "checkpointing", "padded"):  # these change no first loss
        assert loss != pytest.approx(loss_and_gradients(plain, next(iter(plain.get_train_dataloader())))[0].item())


def lora_models(tokenizer):
    return tiny_llama(tokenizer, seed=0), None


@pytest.mark.parametrize("options", [{}, {"precompute_ref_log_probs": True}, {"gradient_checkpointing": True}])
def test_lora_from_a_config(options, tmp_path, tokenizer):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    models = lambda: lora_models(tokenizer)  # noqa: E731
    same_as_trl(agent_rows(8), tmp_path, tokenizer, models=models, peft_config=lora, **options)


@pytest.mark.parametrize("options", [{}, {"precompute_ref_log_probs": True}])
def test_peft_model_with_its_own_adapter_as_reference(options, tmp_path, tokenizer):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)

    def models():
        torch.manual_seed(3)
        return get_peft_model(tiny_llama(tokenizer, seed=0), lora), None

    ours, _, loss = same_as_trl(agent_rows(8), tmp_path, tokenizer, models=models, **options)
    assert loss == pytest.approx(math.log(2), abs=1e-6)  # its own copy, not the model without the adapter
    frozen = {n: p for n, p in ours.model.named_parameters() if ".ref." in n}
    assert frozen and not any(p.requires_grad for p in frozen.values())


def test_peft_model_with_an_explicit_reference(tmp_path, tokenizer):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)

    def models():
        torch.manual_seed(3)
        return get_peft_model(tiny_llama(tokenizer, seed=0), lora), tiny_llama(tokenizer, seed=1)

    same_as_trl(agent_rows(8), tmp_path, tokenizer, models=models)


def test_prompt_tuning(tmp_path, tokenizer):
    tuning = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    models = lambda: lora_models(tokenizer)  # noqa: E731
    same_as_trl(agent_rows(8), tmp_path, tokenizer, models=models, peft_config=tuning)


@pytest.mark.parametrize("coefficient", [None, 0.5, 0.0])
def test_mixture_of_experts(coefficient, tmp_path, tokenizer):
    models = lambda: (tiny_mixtral(tokenizer, 0), tiny_mixtral(tokenizer, 1))  # noqa: E731
    options = {} if coefficient is None else {"router_aux_loss_coef": coefficient}
    ours, *_ = same_as_trl(agent_rows(8), tmp_path, tokenizer, models=models, **options)
    assert ("aux_loss" in ours.state.log_history[0]) == (coefficient != 0.0)


def test_several_evaluation_sets_and_a_new_one(tmp_path, tokenizer):
    """TRL logs the figures of every set under the same names; here each has its own, and they are those that TRL finds
    for the set alone. The sets are new ones, of another format, and the reference's log-probs are made for them too."""
    ours, theirs = (
        trainer_of(cls, agent_rows(4), tmp_path, tokenizer, precompute_ref_log_probs=True)
        for cls in (DPOTrainer, trl.DPOTrainer)
    )
    new = Dataset.from_list(explicit(agent_rows(8)))
    sets = {"a": new.select(range(4)), "b": new}
    together = ours.evaluate(sets)
    compare_metrics(ours.evaluate(new), theirs.evaluate(new), "eval_")
    for name, rows in sets.items():
        alone = {k: v for k, v in theirs.evaluate(rows).items() if "runtime" not in k and "per_second" not in k}
        wanted = {k.replace("eval_", f"eval_{name}_", 1): v for k, v in alone.items() if k != "epoch"}
        compare_metrics(together, wanted, f"eval_{name}_")


@pytest.mark.parametrize("reshape", [explicit, plain, lambda rows: rows], ids=["explicit", "plain", "implicit"])
def test_streams(reshape, tmp_path, tokenizer, capsys):
    rows = reshape(agent_rows(8))
    same_as_trl(Dataset.from_list(rows).to_iterable_dataset(), tmp_path, tokenizer, max_steps=2)
    assert "rows read" in capsys.readouterr().out


def test_compute_metrics(tmp_path, tokenizer):
    shapes = []
    for cls in (DPOTrainer, trl.DPOTrainer):
        trainer = trainer_of(cls, agent_rows(4), tmp_path, tokenizer)
        trainer.compute_metrics = lambda p: {"sum": float(abs(p.predictions).sum()), "ids": int(p.label_ids.sum())}
        shapes.append(trainer.evaluate())
    assert shapes[0]["eval_sum"] == pytest.approx(shapes[1]["eval_sum"], rel=1e-5)
    assert shapes[0]["eval_ids"] == shapes[1]["eval_ids"]


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
    unmasked = trainer_of(
        DPOTrainer, rows, tmp_path, tokenizer, config=MDPOConfig, mask_user_turns=False, shared_prefix=False
    )
    losses, tokens = {}, {}
    for name, trainer in {"trl": trl_like, "masked": masked, "unmasked": unmasked}.items():
        batch = next(iter(trainer.get_train_dataloader()))
        losses[name], _ = loss_and_gradients(trainer, batch)
        tokens[name] = len(batch["pair"])
    assert losses["unmasked"] == losses["trl"]
    assert tokens["masked"] < tokens["trl"] == tokens["unmasked"]
    assert (losses["masked"] - losses["trl"]).abs() > 1e-3
