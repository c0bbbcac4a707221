"""What each option of a recipe does: one table of all of them, and a line for those that change nothing.

An option works (`WORKS` of mdpo.config.option_readers names the file that reads it), is refused where it is set
(`REFUSED`, and `INSTEAD` of mdpo.config.validation), is named by a line where it is set (`NAMED`), or asks for what
happens anyway (`QUIET`). tests/unit/test_effects.py compares the table with the dataclasses' fields.
"""

from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import Any

from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames
from trl import DPOConfig

from mdpo.errors import UserError

QUIET = {
    "do_train": "run_dpo.py trains; false is refused",
    "do_eval": "run_dpo.py evaluates where there are pairs for it; a value that says something else is refused",
    "local_rank": "older launchers pass it; ranks come from the environment",
}
# Set to anything but the default, these ask for something else than what happens.
REFUSED = {
    "label_smoothing_factor": "is of Trainer's own loss; use label_smoothing, with loss_type robust or exo_pair",
    "do_predict": "nothing here predicts; scripts/evaluate.py measures a model",
    "liger_kernel_config": "there is no use_liger_kernel here; the LM head already runs in chunks",
    "eval_use_gather_object": "metrics are gathered as numbers",
}
# Refused by checks of their own, in mdpo/config/validation.py and mdpo/config/parallelism.py.
REFUSED_ELSEWHERE = {"fsdp", "fsdp_config", "parallelism_config"}
_METRICS = "only a compute_metrics would see it, and a recipe has none"
NAMED = {
    "average_tokens_across_devices": "the loss is a mean over pairs, not over tokens",
    "prediction_loss_only": "an evaluation keeps no logits anyway",
    "eval_do_concat_batches": _METRICS,
    "eval_accumulation_steps": _METRICS,
    "include_for_metrics": _METRICS,
    "batch_eval_metrics": _METRICS,
    "label_names": "rows are pairs of token ids with masks",
    "length_column_name": "lengths are those of the token ids",
    "remove_unused_columns": "columns that are not used never reach a batch",
}
EVALUATION = ("dataset_splits", "eval_dataset_mixer", "test_split_size")


def without_effect(args: DPOConfig) -> Iterator[str]:
    """A line for each option that is set and changes nothing in this run, though it may in another."""
    for key, why in NAMED.items():
        if is_set(args, key):
            yield f"{key}: has no effect: {why}."
    for key, (met, condition) in _conditions(args).items():
        if not met and is_set(args, key):
            yield f"{key}: has no effect {condition}."


def _conditions(args: DPOConfig) -> dict[str, tuple[bool, str]]:
    """Option -> (whether what it needs is there, the words for where it is not)."""
    evaluated, saved, logged = args.eval_strategy.value, args.save_strategy.value, args.logging_strategy.value
    saving = saved != "no", "with save_strategy: no"
    pushed = args.push_to_hub, "without push_to_hub: true"
    tracked = "trackio" in (args.report_to or []), "without trackio in report_to"
    no_warmup = {SchedulerType.CONSTANT, SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY}
    kind, sampling = args.lr_scheduler_type, args.train_sampling_strategy
    return {
        "eval_steps": (evaluated == "steps", f"with eval_strategy: {evaluated}"),
        "eval_delay": (evaluated != "no", "with eval_strategy: no"),
        "logging_steps": (logged == "steps", f"with logging_strategy: {logged}"),
        "save_steps": (saved == "steps", f"with save_strategy: {saved}"),
        **dict.fromkeys(("save_total_limit", "save_only_model"), saving),
        **dict.fromkeys(("hub_strategy", "hub_private_repo", "hub_always_push", "hub_token", "hub_revision"), pushed),
        **dict.fromkeys(("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"), tracked),
        "num_train_epochs": (args.max_steps <= 0, f"beside max_steps: {args.max_steps}"),
        "warmup_steps": (kind not in no_warmup, f"with lr_scheduler_type: {kind.value}, which has no warm-up"),
        "optim_target_modules": (reads_targets(args.optim), f"with optim: {args.optim.value}"),
        "greater_is_better": (args.metric_for_best_model is not None, "without metric_for_best_model"),
        "group_pairs": (sampling == "random", f"with train_sampling_strategy: {sampling}"),
        "dataloader_in_order": (args.dataloader_num_workers > 0, "without dataloader_num_workers"),
        "gradient_checkpointing_kwargs": (bool(args.gradient_checkpointing), "without gradient_checkpointing"),
    }


def reads_targets(optim: OptimizerNames) -> bool:
    """Whether an optimizer reads optim_target_modules."""
    return optim.value.startswith(("galore", "apollo"))


def is_set(args: Any, key: str) -> bool:
    """Whether an option, if there is one of that name, has another value than its default."""
    for field in fields(args):
        if field.name == key:
            default = field.default if field.default_factory is MISSING else field.default_factory()
            return getattr(args, key) != default
    return False


def contradicted(args: DPOConfig) -> Iterator[str]:
    """A sentence for each option that asks for something else than what happens."""
    for key, why in REFUSED.items():
        if is_set(args, key):
            yield f"{key}: has no effect: {why}."
    if any("tpu" in option.value for option in args.debug):
        yield "debug: tpu_metrics_debug is for TPUs, which are not supported; leave it out."


def refuse_other_runs(args: DPOConfig, recipe: dict) -> None:
    """Raises UserError where the keys that were set, with their values, ask run_dpo.py not to train, not to evaluate
    where it will, or to evaluate on nothing."""
    if recipe.get("do_train") is False:
        raise UserError("do_train: false, but run_dpo.py trains. scripts/evaluate.py only evaluates; or leave it out.")
    splits = recipe.get("dataset_splits", ["train", "test"])
    asking = [key for key in EVALUATION[1:] if recipe.get(key)]
    asking += ["dataset_splits"] if any("train" not in split for split in splits) else []
    if recipe.get("do_eval") is False and (asking or args.eval_strategy != "no"):
        cause = f"{asking[0] if asking else 'eval_strategy'} asks for an evaluation"
        raise UserError(f"do_eval: false, but {cause}. Set dataset_splits: [train] and no other held-out pairs.")
    if recipe.get("do_eval") and not asking:
        raise UserError(f"do_eval: there is nothing to evaluate on; set one of {', '.join(EVALUATION)}.")
