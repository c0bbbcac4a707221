"""What becomes of each option of a recipe: one table of all of them, and a line for those that change nothing.

An option works (`WORKS` names the file that reads it), is refused where it is set (`REFUSED`, and `INSTEAD` of
mdpo.config.validation), is named by a line where it is set (`NAMED`), or asks for what happens anyway (`QUIET`).
tests/test_effects.py compares the table with the dataclasses' fields.
"""

from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import Any

from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames
from trl import DPOConfig

from mdpo.errors import UserError

WORKS = {
    "transformers/trainer.py": """num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs
        weight_decay adam_beta1 adam_beta2 adam_epsilon optim optim_args gradient_accumulation_steps max_grad_norm
        bf16 fp16 activation_checkpointing activation_checkpointing_kwargs
        use_cache neftune_noise_alpha torch_empty_cache_steps logging_nan_inf_filter
        include_num_input_tokens_seen disable_tqdm report_to eval_strategy save_strategy save_only_model push_to_hub
        hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision load_best_model_at_end
        metric_for_best_model greater_is_better full_determinism seed data_seed accelerator_config
        dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
        dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order
        ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph deepspeed debug
        skip_memory_metrics eval_on_start""",
    "transformers/trainer_callback.py": "logging_strategy logging_first_step eval_delay",
    "transformers/trainer_optimizer.py": "optim_target_modules",
    "transformers/training_args.py": """tf32 logging_steps eval_steps save_steps log_on_each_node log_level
        log_level_replica use_cpu ddp_backend ddp_timeout warmup_steps per_device_eval_batch_size""",
    "transformers/integrations/integration_utils.py": """run_name project trackio_space_id trackio_bucket_id
        trackio_static_space_id""",
    "trl/trainer/utils.py": """lora_r lora_alpha lora_dropout lora_target_modules lora_target_parameters
        lora_modules_to_save lora_task_type use_rslora use_dora load_in_8bit load_in_4bit bnb_4bit_quant_type
        use_bnb_nested_quant bnb_4bit_quant_storage use_peft""",
    "dpo_trainer.py": """output_dir per_device_train_batch_size gradient_checkpointing gradient_checkpointing_kwargs
        train_sampling_strategy router_aux_loss_coef disable_dropout precompute_ref_log_probs
        precompute_ref_batch_size ld_alpha use_weighting sync_ref_model pad_token trust_remote_code
        model_init_kwargs pad_to_multiple_of ref_model_name_or_path shared_prefix fused_ops reference_cache_dir""",
    "mdpo/loss/registry.py": """loss_type loss_weights f_divergence_type f_alpha_divergence_coef label_smoothing beta
        discopop_tau nll_coefficient margin_scale length_penalty""",
    "mdpo/reference/model.py": "ref_model_mixup_alpha ref_model_sync_steps",
    "mdpo/data/prepare.py": """max_length truncation_mode mask_user_turns dataset_mixer dataset_splits dataset_configs
        eval_dataset_mixer test_split_size max_training_samples max_eval_samples chat_template_kwargs
        allow_different_prompts dataset_num_proc sanity_check attn_implementation dtype model_revision""",
    "mdpo/masking/tokenizer.py": "tokenizer_name_or_path chat_template model_name_or_path",
    "mdpo/runs/output_dir.py": "overwrite_output_dir resume_from_checkpoint",
    "mdpo/runs/resumable_trainer.py": "save_total_limit",
    "mdpo/runs/guarded_trainer.py": "max_nonfinite_steps",
    "run_dpo.py": "on_bad_rows max_bad_fraction",
}
QUIET = {
    "do_train": "run_dpo.py trains; false is refused",
    "do_eval": "run_dpo.py evaluates where there are pairs for it; a value that says something else is refused",
    "local_rank": "older launchers pass it; ranks come from the environment",
}
# Set to anything but the default, these say that something else would happen than does.
REFUSED = {
    "label_smoothing_factor": "is of Trainer's own loss; use label_smoothing, with loss_type robust or exo_pair",
    "do_predict": "nothing here predicts; scripts/evaluate.py measures a model",
    "liger_kernel_config": "there is no use_liger_kernel here; the LM head already runs in chunks",
    "eval_use_gather_object": "figures are gathered as numbers",
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
    """Option -> (whether what it needs is there, how it is not)."""
    evaluated, saved, logged = args.eval_strategy.value, args.save_strategy.value, args.logging_strategy.value
    saving = saved != "no", "with save_strategy: no"
    pushed = args.push_to_hub, "without push_to_hub: true"
    tracked = "trackio" in (args.report_to or []), "without trackio in report_to"
    no_warmup = {SchedulerType.CONSTANT, SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY}
    kind = args.lr_scheduler_type
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
        "dataloader_in_order": (args.dataloader_num_workers > 0, "without dataloader_num_workers"),
        "gradient_checkpointing_kwargs": (bool(args.gradient_checkpointing), "without gradient_checkpointing"),
    }


def reads_targets(optim: OptimizerNames) -> bool:
    """Whether an optimizer looks at optim_target_modules."""
    return optim.value.startswith(("galore", "apollo"))


def is_set(args: Any, key: str) -> bool:
    """Whether an option, if there is one of that name, has another value than its default."""
    for field in fields(args):
        if field.name == key:
            default = field.default if field.default_factory is MISSING else field.default_factory()
            return getattr(args, key) != default
    return False


def contradicted(args: DPOConfig) -> Iterator[str]:
    """A sentence for each option that says something else than what happens."""
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
    there = [key for key in EVALUATION[1:] if recipe.get(key)]
    there += ["dataset_splits"] if any("train" not in split for split in splits) else []
    if recipe.get("do_eval") is False and (there or args.eval_strategy != "no"):
        what = f"{there[0] if there else 'eval_strategy'} asks for an evaluation"
        raise UserError(f"do_eval: false, but {what}. Set dataset_splits: [train] and no other held-out pairs.")
    if recipe.get("do_eval") and not there:
        raise UserError(f"do_eval: there is nothing to evaluate on; set one of {', '.join(EVALUATION)}.")
