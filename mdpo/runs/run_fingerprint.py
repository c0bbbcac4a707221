"""What makes two starts the same run, compared before resuming from a checkpoint."""

import dataclasses
import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xxhash
from datasets import Dataset

from mdpo.config.caches import default_folder
from mdpo.config.parsing import FIELDS
from mdpo.ranks import row_ranks
from mdpo.reference.fingerprint import named_digest

# Keys that change nothing in what is learned: a new value simply applies from the resume on.
FREE = (
    "output_dir",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "run_name",
    "project",
    "trackio_space_id",
    "trackio_bucket_id",
    "trackio_static_space_id",
    "report_to",
    "disable_tqdm",
    "logging_strategy",
    "logging_first_step",
    "logging_steps",
    "logging_nan_inf_filter",
    "log_level",
    "log_level_replica",
    "log_on_each_node",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "save_only_model",
    "eval_strategy",
    "eval_steps",
    "eval_delay",
    "eval_on_start",
    "eval_accumulation_steps",
    "eval_use_gather_object",
    "per_device_eval_batch_size",
    "do_train",
    "do_eval",
    "do_predict",
    "prediction_loss_only",
    "load_best_model_at_end",
    "metric_for_best_model",
    "greater_is_better",
    "push_to_hub",
    "hub_model_id",
    "hub_strategy",
    "hub_token",
    "hub_private_repo",
    "hub_always_push",
    "hub_revision",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "dataloader_persistent_workers",
    "dataloader_prefetch_factor",
    "dataset_num_proc",
    "reference_cache_dir",
    "precompute_ref_batch_size",
    "eval_dataset_mixer",
    "max_eval_samples",
    "max_nonfinite_steps",
    "show_answers",
    "ddp_timeout",
    "debug",
    "torch_empty_cache_steps",
    "use_cpu",
    "local_rank",
    "trust_remote_code",
    "skip_memory_metrics",
    "include_for_metrics",
    "include_num_input_tokens_seen",
    "batch_eval_metrics",
    "on_bad_rows",
    "max_bad_fraction",
    "deepspeed",
)
# Where data or weights are and how they are named: their contents are compared instead.
NAMES = (
    "dataset_mixer",
    "dataset_splits",
    "dataset_configs",
    "test_split_size",
    "max_training_samples",
    "sanity_check",
    "model_name_or_path",
    "model_revision",
    "ref_model_name_or_path",
    "tokenizer_name_or_path",
    "chat_template",
    "chat_template_kwargs",
    "allow_different_prompts",
    "turns_without_reasoning",
    "pairs",
    "min_reward_gap",
    "max_pairs_per_prompt",
    "truncation_mode",
    "max_length",
    "mask_user_turns",
)
# Other values give the same numbers up to rounding.
ROUNDING = (
    "shared_prefix",
    "fused_ops",
    "attn_implementation",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "activation_checkpointing",
    "activation_checkpointing_kwargs",
    "precompute_ref_log_probs",
    "torch_compile",
    "torch_compile_backend",
    "torch_compile_mode",
    "tf32",
    "pad_to_multiple_of",
    "versions",
)
# What runs from before a key or a fact did, where that is not its default.
BEFORE = {"group_pairs": False, "row_ranks": 1}
# Only their product counts, together with the number of processes.
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "peft")


def recipe_facts(values: dict[str, Any], args) -> dict[str, Any]:
    """Of a recipe's resolved values: every key that a run depends on, at its value or default, and how it is spread
    over processes. Plain JSON data."""
    keys = {key: values.get(key, _default(key)) for key in FIELDS if key not in (*FREE, *NAMES)}
    plugin = args.deepspeed_plugin
    facts = {
        "keys": keys,
        "names": {key: values.get(key, _default(key)) for key in NAMES if key in FIELDS},
        "processes": args.world_size,
        "global_batch": args.train_batch_size * args.gradient_accumulation_steps * (args.world_size // row_ranks()),
        "row_ranks": row_ranks(),
        "zero_stage": 0 if plugin is None else plugin.zero_stage,
        "versions": {name: version(name) for name in PACKAGES},
    }
    return json.loads(json.dumps(facts, default=str))


def content_facts(recipe, tokenizer, train: Dataset) -> dict[str, str | None]:
    """Digests of what the names stand for: weights of policy and reference, tokenizer with template, training pairs."""
    cache, revision = Path(recipe.training.reference_cache_dir or default_folder()), recipe.model.model_revision
    reference = recipe.training.ref_model_name_or_path
    tokenizer_facts = {
        "vocabulary": tokenizer.get_vocab(),
        "template": tokenizer.chat_template,
        "eos": tokenizer.eos_token,
    }
    return {
        "model": _weights(recipe.model.model_name_or_path, revision, cache),
        "reference": _weights(reference, None, cache) if reference else None,
        "tokenizer": xxhash.xxh3_128_hexdigest(json.dumps(tokenizer_facts, sort_keys=True, default=str).encode()),
        "pairs": pairs_digest(train),
    }


def _weights(name: str, revision: str | None, cache: Path) -> str:
    try:
        return named_digest(name, revision, cache) or name
    except OSError:  # the hub cannot be reached: the trainer says so if it must be
        return name


def pairs_digest(train: Dataset) -> str:
    """Of tokenized pairs in their order: each row's digest (ids, masks and turn weights), margins, and weights where
    there are any."""
    digest = xxhash.xxh3_128()
    for batch in train.select_columns(["digest", "margin", "weight"]).iter(batch_size=1000):
        digest.update("".join(batch["digest"]).encode())
        digest.update(json.dumps(batch["margin"]).encode())
        if any(weight is not None for weight in batch["weight"]):
            digest.update(json.dumps(batch["weight"]).encode())
    return digest.hexdigest()


def _default(key: str) -> Any:
    field = FIELDS[key]
    has_factory = field.default_factory is not dataclasses.MISSING
    value = field.default_factory() if has_factory else field.default
    return getattr(value, "value", value)  # of an Enum


def differences(then: dict, now: dict) -> tuple[list[str], list[str]]:
    """(what makes it another run, what changes its rounding only), a line each: `beta: 0.1 → 0.2`."""
    refused, rounding = [], []
    same_batch = then.get("global_batch") == now["global_batch"]
    for name, old, new in _changed(then, now):
        only_rounding = name in ROUNDING or name.partition(" ")[0] in ROUNDING or (name in BATCH and same_batch)
        (rounding if only_rounding else refused).append(f"{name}: {old} → {new}")
    return refused, rounding


def _changed(then: dict, now: dict) -> Iterator[tuple[str, Any, Any]]:
    old_keys = then.get("keys", {})
    for key, new in now["keys"].items():
        old = old_keys.get(key, BEFORE.get(key, _default(key))) if key in FIELDS else old_keys.get(key)
        if json.dumps(old, default=str) != json.dumps(new, default=str):
            yield key, old, new
    for name in ("processes", "row_ranks", "zero_stage"):
        old, new = (facts.get(name, BEFORE.get(name)) for facts in (then, now))
        if old != new:
            yield name, old, new
    for name, new in now["versions"].items():
        if then.get("versions", {}).get(name) != new:
            yield f"versions of {name}", then.get("versions", {}).get(name), new
    for name, new in now.get("contents", {}).items():
        old = then.get("contents", {}).get(name)
        if old != new:
            yield name, f"{str(old)[:8]}…", f"{str(new)[:8]}…{_renamed(then, now)}"


def _renamed(then: dict, now: dict) -> str:
    """The names that changed too, which mostly explain other contents."""
    old = then.get("names", {})
    changed = [f"{key}: {old.get(key)} → {new}" for key, new in now["names"].items() if old.get(key) != new]
    return f" ({'; '.join(changed)})" if changed else ""
