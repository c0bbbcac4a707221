"""DPOTrainer: the NLL term, accumulation, evaluation by pairs, LoRA, references, saving, and what it refuses."""

import math
import shutil
import types
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from errors import refused
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig, PromptTuningConfig
from tiny import agent_rows, tiny_llama, tiny_mixtral
from trainers import close, compare_metrics, explicit, loss_and_gradients, mdpo_trainer, own, trainer_of
from transformers import AutoModelForCausalLM

from dpo_trainer import DPOTrainer
from mdpo.config.schema import MDPOConfig
from mdpo.config.validation import TOWARDS_MARGIN
from mdpo.loss.registry import LOSSES
from mdpo.reference.model import drop_weights
from mdpo.runs.checkpoints import SAVING
from mdpo.runs.output_dir import LOCK
from mdpo.runs.saved_weights import check_saved

SAME_IN_BOTH = {
    **{loss: {"loss_type": [loss]} for loss in LOSSES},
    "nll": {"nll_coefficient": 0.5},
    "length penalty": {"length_penalty": 0.05},
    "ld_alpha": {"ld_alpha": 0.3},
    "use_weighting": {"use_weighting": True},
    "precomputed": {"precompute_ref_log_probs": True},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "checkpointing": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("name", SAME_IN_BOTH)
def test_shared_prefix_changes_no_number(name, tmp_path, tokenizer):
    """Loss, gradients, every logged and evaluated figure; rows have margins and turn weights, and share all but
    the last turn."""
    options = {"beta": 0.05, **SAME_IN_BOTH[name]}
    loss = options.get("loss_type", ["sigmoid"])[0]
    options |= {"margin_scale": 2.0} if loss in TOWARDS_MARGIN | {"sigmoid", "hinge"} else {}
    options |= {"label_smoothing": 0.1} if loss in ("robust", "exo_pair", "aot", "aot_unpaired") else {}
    rows = [{"chosen": row["chosen"], "rejected": [*row["chosen"][:3], row["rejected"][3]], "margin": 0.1 * i}
            for i, row in enumerate(agent_rows(8))]  # fmt: skip
    for row in rows[::2]:
        row["chosen"] = [{**m, "weight": 0.5 if m["role"] == "assistant" else None} for m in row["chosen"]]
        row["rejected"] = [*row["chosen"][:3], row["rejected"][3]]
    packed, padded = (mdpo_trainer(tmp_path, tokenizer, rows, shared_prefix=on, **options) for on in (True, False))
    batches = [next(iter(trainer.get_train_dataloader())) for trainer in (packed, padded)]
    assert batches[0].is_packed and batches[0]["input_ids"].numel() < 0.7 * batches[1]["input_ids"].numel()
    (loss, gradients), (wanted, wanted_gradients) = (
        loss_and_gradients(trainer, batch) for trainer, batch in zip((packed, padded), batches, strict=True)
    )
    close(loss, wanted)
    for parameter, gradient in wanted_gradients.items():
        close(gradients[parameter], gradient, parameter)
    for trainer in (packed, padded):
        trainer.train()
    for got, log in zip(packed.state.log_history[:-1], padded.state.log_history[:-1], strict=True):
        assert set(got) == {*log, "num_distinct_tokens"} and got["num_tokens"] == log["num_tokens"]
        assert got["num_distinct_tokens"] < 0.7 * got["num_tokens"]
        compare_metrics(got, log)
    compare_metrics(packed.evaluate(), padded.evaluate(), "eval_")


def test_shared_prefix_with_a_mixture_of_experts(tmp_path, tokenizer):
    models = lambda: (tiny_mixtral(tokenizer, 0), tiny_mixtral(tokenizer, 1))  # noqa: E731
    packed, padded = (mdpo_trainer(tmp_path, tokenizer, models=models, shared_prefix=on) for on in (True, False))
    for trainer in (packed, padded):
        trainer.train()
    for got, log in zip(packed.state.log_history[:-1], padded.state.log_history[:-1], strict=True):
        compare_metrics(got, log)
    assert "aux_loss" in log


def test_shared_prefix_off_where_it_cannot_be(tmp_path, tokenizer, capsys):
    tuning = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    trainer = own(tmp_path, tokenizer, tiny_llama(tokenizer), peft_config=tuning, learning_rate=1e-2)
    assert "shared_prefix: off for PeftModelForCausalLM: prompt-learning PEFT" in capsys.readouterr().out
    assert not next(iter(trainer.get_train_dataloader())).is_packed


def test_a_hybrid_model_trains_on_padded_batches_by_itself(tmp_path, tokenizer, capsys):
    """Convolutions carry a state from token to token: a packed row would mix pairs."""
    from packed_pairs import tiny

    models = lambda: [tiny("Lfm2", vocab_size=len(tokenizer), layer_types=["conv", "full_attention"]) for _ in "pr"]  # noqa: E731
    trainer = mdpo_trainer(tmp_path, tokenizer, models=models, learning_rate=1e-2)
    assert "shared_prefix: off for Lfm2ForCausalLM: it has layers of the kind conv" in capsys.readouterr().out
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert trainer.state.log_history[1]["loss"] != pytest.approx(math.log(2), abs=1e-4)


def test_compute_metrics_gets_padded_logits_of_packed_batches(tmp_path, tokenizer):
    shapes = []
    for packed in (True, False):
        trainer = mdpo_trainer(tmp_path, tokenizer, agent_rows(4), shared_prefix=packed)
        trainer.compute_metrics = lambda p: {"sum": float(abs(p.predictions).sum()), "ids": int(p.label_ids.sum())}
        shapes.append(trainer.evaluate())
    assert shapes[0]["eval_sum"] == pytest.approx(shapes[1]["eval_sum"], rel=1e-5)
    assert shapes[0]["eval_ids"] == shapes[1]["eval_ids"]


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


def test_a_copied_reference_runs_by_itself(tmp_path, tokenizer):
    """Of a policy without a path: copied with the policy's scoring forward, it called the policy, and switched its
    attention between forward and recomputation, which then failed. Moved weights show which model answers."""
    trainer = own(tmp_path, tokenizer, tiny_llama(tokenizer), gradient_checkpointing=True, max_steps=1)
    ids = torch.arange(3, 9)[None]
    before = trainer.ref_model(input_ids=ids).logits
    with torch.no_grad():
        trainer.model.model.embed_tokens.weight.mul_(2)
    assert torch.equal(trainer.ref_model(input_ids=ids).logits, before)
    trainer.train()


def test_a_reference_s_share_leaves_memory_whoever_holds_it():
    """As under ZeRO-3, where `ds_tensor` is a rank's share of a weight and DeepSpeed holds on to the model."""
    model = torch.nn.Linear(8, 8, bias=False)
    model.weight.ds_tensor = share = torch.zeros(32)
    drop_weights(model)
    assert share.untyped_storage().nbytes() == 0
    drop_weights(torch.nn.Linear(8, 8))
    drop_weights(None)


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
    check_saved(tmp_path, model)
    half = {n: p for n, p in model.state_dict().items() if "layers.1" not in n}
    half["model.embed_tokens.weight"] = torch.empty(0)  # what a rank writes of a partitioned weight
    model.save_pretrained(tmp_path, state_dict=half)
    with refused("weights", tmp_path, "10 of 21 weights", "model.embed_tokens.weight", "[0]"):
        check_saved(tmp_path, model)


# Checks that the trainer calls by itself, for those who start it without run_dpo.py; those of `check_options` are in
# tests/unit/test_effects.py.
REFUSED = [
    ({"router_aux_loss_coef": 0.1}, "router_aux_loss_coef", "llama"),
    ({"pad_token": "<nowhere>"}, "pad_token", "'<nowhere>'"),
]


@pytest.mark.parametrize(("options", "key", "detail"), REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_what_only_the_trainer_refuses(options, key, detail, tmp_path, tokenizer):
    with refused(key, detail):
        mdpo_trainer(tmp_path, tokenizer, **options)


def test_the_trainer_checks_its_options(tmp_path, tokenizer, capsys):
    """One for all of `check_options`, whose lines it says."""
    with refused("discopop_tau", "no effect"):
        mdpo_trainer(tmp_path, tokenizer, discopop_tau=0.1)
    trainer_of(DPOTrainer, agent_rows(4), tmp_path, tokenizer, discopop_tau=0.1)
    assert "discopop_tau: has no effect" in capsys.readouterr().out


def test_dropout_of_lora_without_effect_is_named(tmp_path, tokenizer, capsys):
    lora = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.3, task_type="CAUSAL_LM")
    own(tmp_path, tokenizer, tiny_llama(tokenizer), peft_config=lora)
    assert "lora_dropout: 0.3 has no effect" in capsys.readouterr().out
    trainer = own(tmp_path, tokenizer, tiny_llama(tokenizer), peft_config=lora, disable_dropout=False)
    assert "lora_dropout" not in capsys.readouterr().out
    assert any(m.p == 0.3 for m in trainer.model.modules() if isinstance(m, torch.nn.Dropout))


def test_refusals_name_what_to_do(tmp_path, tokenizer):
    model = tiny_llama(tokenizer)
    with refused("ref_model", "same object"):
        own(tmp_path, tokenizer, model, model)
    with refused("ref_model_name_or_path", "ref_model "):
        own(tmp_path, tokenizer, model, tiny_llama(tokenizer), ref_model_name_or_path="elsewhere")
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with refused("sync_ref_model", "adapter"):
        own(tmp_path, tokenizer, model, peft_config=lora, sync_ref_model=True)
    with refused("train_dataset", "images", "trl.DPOTrainer"):
        own(tmp_path, tokenizer, tiny_llama(tokenizer), rows=[{**row, "images": []} for row in agent_rows(2)])
    small = tiny_llama(tokenizer)
    small.resize_token_embeddings(100)
    with refused("tokenizer", "embedding for 100."):
        own(tmp_path, tokenizer, small)
    with refused("dataset", "over-long"):
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


@pytest.mark.parametrize("steps", [1, 2])
def test_a_reference_that_moves_is_part_of_the_checkpoint(steps, tmp_path, tokenizer):
    """α = ½ after each second step. A run resumed from step 2 ends with the same reference and the same policy."""
    options = {
        "sync_ref_model": True,
        "ref_model_sync_steps": 2,
        "ref_model_mixup_alpha": 0.5,
        "num_train_epochs": 2,  # 4 steps
        "save_strategy": "steps",
        "save_steps": steps,
        "learning_rate": 1e-2,
    }
    whole = mdpo_trainer(tmp_path / "whole", tokenizer, **options)
    before = [p.clone() for p in whole.ref_model.parameters()]
    whole.train()
    folder = tmp_path / "whole" / "dpo_trainer"
    policy = AutoModelForCausalLM.from_pretrained(folder / "checkpoint-2")
    moved = AutoModelForCausalLM.from_pretrained(folder / "checkpoint-2" / "reference")
    for was, now, own_weight in zip(before, moved.parameters(), policy.parameters(), strict=True):
        torch.testing.assert_close(now, (was + own_weight) / 2)
    again = mdpo_trainer(tmp_path / "again", tokenizer, **options)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    for a, b in zip(again.ref_model.parameters(), whole.ref_model.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)
    shutil.rmtree(folder / "checkpoint-2" / "reference")
    with refused("resume_from_checkpoint", "reference/model.safetensors"):
        again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    (folder / "checkpoint-2" / "manifest.json").unlink()  # as another trainer would have left it
    with refused("resume_from_checkpoint", "checkpoint-2", "sync_ref_model"):
        again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))


def test_lora_against_another_reference_by_name(tmp_path, tokenizer):
    tiny_llama(tokenizer, seed=1).save_pretrained(tmp_path / "reference")
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    options = {"ref_model_name_or_path": str(tmp_path / "reference")}
    trainer = own(tmp_path, tokenizer, tiny_llama(tokenizer), peft_config=lora, **options)
    given = mdpo_trainer(tmp_path, tokenizer)  # seeds 0 and 1 as objects; a new adapter changes nothing yet
    batch = next(iter(trainer.get_train_dataloader()))
    close(loss_and_gradients(trainer, batch)[0], loss_and_gradients(given, batch)[0])


def test_precomputed_reference_leaves_memory_and_is_counted_on(tmp_path, tokenizer):
    trainer = mdpo_trainer(tmp_path, tokenizer, precompute_ref_log_probs=True)
    assert trainer.ref_model is None
    batch = next(iter(mdpo_trainer(tmp_path, tokenizer).get_train_dataloader()))
    with refused("precompute_ref_log_probs", "batch"):
        trainer.compute_loss(trainer.model, batch)


@pytest.mark.parametrize("packed", [True, False])
def test_all_masked_side_is_a_differentiable_zero(packed, tmp_path, tokenizer):
    trainer = mdpo_trainer(tmp_path, tokenizer, shared_prefix=packed)
    rows = [trainer.train_dataset[i] for i in range(4)]
    rows = [
        {**row, **{f"{side}_mask": [0] * len(row[f"{side}_mask"]) for side in ("chosen", "rejected")}} for row in rows
    ]
    batch = trainer.data_collator(rows)
    assert batch.is_packed == packed
    loss, gradients = loss_and_gradients(trainer, batch)
    assert loss.item() == pytest.approx(math.log(2))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients.values())


def test_model_card(tmp_path, tokenizer):
    trainer = mdpo_trainer(tmp_path, tokenizer, loss_type=["sigmoid", "hinge"])
    trainer.create_model_card(dataset_name="org/pairs", tags="agents")
    card = (tmp_path / "dpo_trainer" / "README.md").read_text()
    for words in ("- agents", "- trl", "- dpo", "org/pairs", "sigmoid + hinge", "2409.02392"):
        assert words in card, words


def test_ten_lines_for_trl_run_unchanged(tmp_path, tokenizer):
    """The script names DPOTrainer alone: with trl's import or ours it trains and ends with the same weights."""
    tiny_llama(tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    Dataset.from_list(agent_rows(8)).to_json(tmp_path / "pairs.jsonl")
    script = f"""
from datasets import load_dataset
from trl import DPOConfig
rows = load_dataset("json", data_files={str(tmp_path / "pairs.jsonl")!r}, split="train")
args = DPOConfig(OUT, max_steps=2, per_device_train_batch_size=4, use_cpu=True, bf16=False, report_to="none")
trainer = DPOTrainer({str(tmp_path / "base")!r}, args=args, train_dataset=rows, eval_dataset=rows)
trainer.train()
trainer.evaluate()
trainer.save_model(OUT)
"""
    weights = []
    for source in ("trl", "dpo_trainer"):
        names = {"OUT": str(tmp_path / source)}
        exec(f"from {source} import DPOTrainer\n{script}", names)  # noqa: S102
        weights.append(AutoModelForCausalLM.from_pretrained(tmp_path / source))
    for p, q in zip(*(model.parameters() for model in weights), strict=True):
        close(p, q)


def test_push_to_hub(tmp_path, tokenizer, monkeypatch):
    """At each checkpoint and at the end, to a stand-in for the hub: model, card and tokenizer; not the lock, not what
    is being written, not the checkpoints."""
    pushed = []

    class Hub:
        def create_repo(self, name, **kwargs):
            return types.SimpleNamespace(repo_id=f"me/{name}")

        def upload_folder(self, repo_id, folder_path, commit_message, ignore_patterns, run_as_future=False, **kwargs):
            names = [str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()]
            pushed.append((repo_id, commit_message, set(filter_repo_objects(names, ignore_patterns=ignore_patterns))))
            done = Future()
            done.set_result(None)
            return done

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    trainer = mdpo_trainer(
        tmp_path, tokenizer, push_to_hub=True, hub_strategy="every_save", hub_token="hf_x", save_strategy="steps",
        save_steps=1, max_steps=2,
    )  # fmt: skip
    folder = tmp_path / "dpo_trainer"
    (folder / LOCK).write_text("process 1 on this-machine")
    (folder / SAVING / "checkpoint-9").mkdir(parents=True)
    (folder / SAVING / "checkpoint-9" / "model.safetensors").write_text("half")
    trainer.train()
    trainer.save_model()
    messages = [f"Training in progress, step {n}" for n in (1, 2)] + ["Model save"]
    assert [(repo, message) for repo, message, _ in pushed] == [("me/dpo_trainer", message) for message in messages]
    for _, _, names in pushed:
        assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= names
        assert not [name for name in names if name.startswith((".", "_", "checkpoint-"))]
