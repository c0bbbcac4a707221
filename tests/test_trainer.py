"""DPOTrainer: the NLL term, accumulation, evaluation by pairs, LoRA, references, saving, and what it refuses."""

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from test_trl_parity import close, explicit, loss_and_gradients, trainer_of
from tiny import CHATML, agent_rows, tiny_llama, tokenizer_for
from transformers import AutoModelForCausalLM

from dpo_trainer import NOT_YET, DPOTrainer
from mdpo.checkpoints import check_saved, expected_weights
from mdpo.config import MDPOConfig
from mdpo.types import UserError


@pytest.fixture
def tokenizer():
    return tokenizer_for(CHATML, "byte", eos="<|im_end|>")


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


def test_nll_term_is_added_per_pair(tmp_path, tokenizer):
    plain = mdpo_trainer(tmp_path, tokenizer)
    with_nll = mdpo_trainer(tmp_path, tokenizer, nll_coefficient=0.5)
    batch = next(iter(plain.get_train_dataloader()))
    base, logps = plain.compute_loss(plain.model, batch, return_outputs=True)
    total = with_nll.compute_loss(with_nll.model, batch)
    per_pair = [-l / n for l, n in zip(logps.chosen.tolist(), logps.chosen_tokens.tolist(), strict=True)]  # noqa: E741
    assert total.item() == pytest.approx(base.item() + 0.5 * sum(per_pair) / len(per_pair), rel=1e-6)
    assert len(set(logps.chosen_tokens.tolist())) > 1  # a mean over all tokens would be another number
    with_nll.train()
    assert "nll_loss" in with_nll.state.log_history[0]


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16-autocast"])
def test_first_loss_is_ln2_where_policy_is_reference(bf16, tmp_path, tokenizer):
    model = tiny_llama(tokenizer)
    model.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    trainer = own(tmp_path, tokenizer, model, bf16=bf16)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert trainer.state.log_history[0]["rewards/accuracies"] == 0.0


def test_reference_from_another_path(tmp_path, tokenizer):
    tiny_llama(tokenizer, seed=0).save_pretrained(tmp_path / "base")
    tiny_llama(tokenizer, seed=1).save_pretrained(tmp_path / "reference")
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    trainer = own(tmp_path, tokenizer, policy, ref_model_name_or_path=str(tmp_path / "reference"))
    given = mdpo_trainer(tmp_path, tokenizer, beta=0.1)  # policy seed 0, reference seed 1, as objects
    batch = next(iter(trainer.get_train_dataloader()))
    close(loss_and_gradients(trainer, batch)[0], loss_and_gradients(given, batch)[0])


@pytest.mark.parametrize(("pairs", "accumulation"), [(4, 1), (2, 2), (1, 4)])
def test_accumulation_does_not_change_the_step(pairs, accumulation, tmp_path, tokenizer):
    """4 × 1, 2 × 2 and 1 × 4 pairs give the same weights after two steps."""

    def weights(pairs, accumulation):
        options = {"per_device_train_batch_size": pairs, "gradient_accumulation_steps": accumulation}
        trainer = mdpo_trainer(tmp_path, tokenizer, **options)
        trainer.train()
        assert trainer.state.global_step == 2
        return trainer.state.log_history, list(trainer.model.parameters())

    wanted_log, wanted = weights(4, 1)
    log, got = weights(pairs, accumulation)
    for p, q in zip(got, wanted, strict=True):
        assert (p - q).norm() <= 1e-4 * q.norm()
    assert log[0]["loss"] == pytest.approx(wanted_log[0]["loss"], rel=1e-5)
    assert log[0]["rewards/margins"] == pytest.approx(wanted_log[0]["rewards/margins"], abs=1e-3)


def test_evaluation_is_weighted_by_pairs(tmp_path, tokenizer):
    """7 pairs in batches of 4 (the second is smaller) and of 1 give the same figures, each a mean over 7 pairs."""
    rows = agent_rows(7)
    whole, single = (mdpo_trainer(tmp_path, tokenizer, rows, per_device_eval_batch_size=n) for n in (4, 1))
    got, wanted = whole.evaluate(), single.evaluate()
    assert got["eval_pairs"] == wanted["eval_pairs"] == 7
    in_reward = 1e-5 * 0.1 * abs(wanted["eval_logps/chosen"])  # a margin is a small difference of large sums
    for key in ("eval_loss", "eval_rewards/margins", "eval_entropy", "eval_logps/chosen"):
        assert got[key] == pytest.approx(wanted[key], rel=1e-5, abs=in_reward), key
    losses = [single.compute_loss(single.model, batch).item() for batch in single.get_eval_dataloader()]
    assert wanted["eval_loss"] == pytest.approx(sum(losses) / 7, rel=1e-5)
    assert abs(got["eval_loss"] - (sum(losses[:4]) / 4 + sum(losses[4:]) / 3) / 2) > 1e-4  # TRL's mean of batches


def test_lora_is_its_own_reference(tmp_path, tokenizer):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = own(tmp_path, tokenizer, tiny_llama(tokenizer), peft_config=lora, learning_rate=1e-2, num_train_epochs=4)
    assert trainer.ref_model is None
    base = trainer.model.get_base_model().model.embed_tokens.weight.clone()
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < 0.9 * losses[0]
    assert torch.equal(base, trainer.model.get_base_model().model.embed_tokens.weight)
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_gradient_checkpointing_changes_nothing(tmp_path, tokenizer):
    plain, checkpointed = (mdpo_trainer(tmp_path, tokenizer, gradient_checkpointing=on) for on in (False, True))
    checkpointed.model.gradient_checkpointing_enable()
    batch = next(iter(plain.get_train_dataloader()))
    loss, gradients = loss_and_gradients(plain, batch)
    again, recomputed = loss_and_gradients(checkpointed, batch)
    close(again, loss)
    for name, wanted in gradients.items():
        close(recomputed[name], wanted, name)


def test_saved_model_gives_the_trainers_own_log_probs(tmp_path, tokenizer):
    trainer = mdpo_trainer(tmp_path, tokenizer, save_strategy="steps", save_steps=1, save_only_model=True)
    trainer.train()
    folder = max((tmp_path / "dpo_trainer").glob("checkpoint-*"))
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[1, 20, 30, 40]])
    torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits)


def test_incomplete_checkpoint_is_noticed(tmp_path, tokenizer):
    model = tiny_llama(tokenizer)
    model.save_pretrained(tmp_path)
    check_saved(tmp_path, expected_weights(model))
    half = {n: p for n, p in model.state_dict().items() if "layers.1" not in n}
    half["model.embed_tokens.weight"] = torch.empty(0)  # what a rank writes of a partitioned weight
    model.save_pretrained(tmp_path, state_dict=half)
    with pytest.raises(UserError, match="weights were not written whole"):
        check_saved(tmp_path, expected_weights(model))


@pytest.mark.parametrize("key", NOT_YET)
def test_options_that_would_do_nothing_are_refused(key, tmp_path, tokenizer):
    values = {"loss_type": ["hinge"], "loss_weights": [1.0], "ld_alpha": 0.5, "f_divergence_type": "forward_kl"}
    value = values.get(key, 0.1 if key == "label_smoothing" else True)
    with pytest.raises(UserError, match=key):
        mdpo_trainer(tmp_path, tokenizer, **{key: value})


def test_refusals_name_what_to_do(tmp_path, tokenizer):
    model = tiny_llama(tokenizer)
    with pytest.raises(UserError, match="same object"):
        own(tmp_path, tokenizer, model, model)
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(UserError, match="leave ref_model out"):
        own(tmp_path, tokenizer, model, tiny_llama(tokenizer), peft_config=lora)
    small = tiny_llama(tokenizer)
    small.resize_token_embeddings(100)
    with pytest.raises(UserError, match="embedding for 100"):
        own(tmp_path, tokenizer, small)
    with pytest.raises(UserError, match="over-long"):
        own(tmp_path, tokenizer, tiny_llama(tokenizer), rows=[agent_rows(1)[0] | {}] * 2, max_steps=1, seed=1,
            config=lambda *a, **k: MDPOConfig(*a, **{**k, "max_length": 20}))  # fmt: skip


def test_explicit_prompt_supervises_the_same_as_an_implicit_one(tmp_path, tokenizer):
    implicit, with_prompt = (
        mdpo_trainer(tmp_path, tokenizer, rows) for rows in (agent_rows(4), explicit(agent_rows(4)))
    )
    for a, b in zip(implicit.train_dataset, with_prompt.train_dataset, strict=True):
        assert {k: a[k] for k in ("chosen_ids", "chosen_mask", "rejected_ids", "rejected_mask")} == {
            k: b[k] for k in ("chosen_ids", "chosen_mask", "rejected_ids", "rejected_mask")
        }
