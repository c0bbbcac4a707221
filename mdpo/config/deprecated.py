"""Retired keys of older recipes, of alignment-handbook and of the first M-DPO scripts: today's name, or advice."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Retired:
    """An older key. Either `to` is today's key, or `advice` says what to do and only null and false are let pass.

    `convert` turns the old value into today's where it changes; its ValueError says which value is wanted.
    """

    to: str | None = None
    convert: Callable[[Any], Any] | None = None
    advice: str = ""


def _ratio_as_steps(ratio: Any) -> float:
    """warmup_steps below 1 is a share of all steps, rounded up, just as warmup_ratio was; but 1 means one step."""
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio < 1:
        raise ValueError("a share of all steps in [0, 1) is wanted; or set warmup_steps")
    return float(ratio)


def _switch(on: Any, off: Any) -> Callable[[Any], Any]:
    """A convert() for a boolean key that is now a choice."""

    def convert(value: Any) -> Any:
        if not isinstance(value, bool):
            raise ValueError("true or false is wanted")
        return on if value else off

    return convert


# From alignment-handbook, transformers 4, TRL before 1.0 and the first M-DPO scripts; tests/unit/test_config.py checks
# every entry against the installed packages.
_RENAMED = {
    "torch_dtype": "dtype",
    "evaluation_strategy": "eval_strategy",
    "preprocessing_num_workers": "dataset_num_proc",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "hub_model_revision": "hub_revision",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
    "no_cuda": "use_cpu",
    "xpu_backend": "ddp_backend",
    "rpo_alpha": "nll_coefficient",
    "masking_user_turn": "mask_user_turns",
    "ref_model": "ref_model_name_or_path",
}
_REFUSED = {
    "only whole sequences are measured; set max_length (prompt and answer together)": (
        "max_prompt_length",
        "max_completion_length",
        "max_target_length",
        "max_seq_length",
    ),
    "name the training datasets in dataset_mixer, as {NAME_OR_PATH: 1.0}": (
        "dataset_name",
        "dataset_mixture",
        "train_dir",
    ),
    "name the held-out dataset in eval_dataset_mixer, as {NAME_OR_PATH: 1.0}": ("eval_dir",),
    "use dataset_configs": ("dataset_config",),
    "use dataset_splits, as [train, test]": (
        "dataset_train_split",
        "dataset_test_split",
    ),
    "rows are pairs of conversations, complete in the columns chosen and rejected": (
        "dataset_text_field",
        "text_column",
        "dataset_kwargs",
        "tools",
        "auto_insert_empty_system_msg",
        "choose_type",
    ),
    (
        "rows of a stream can be neither counted, reported nor scored before training; "
        "datasets are read from disk as they are needed, so they may be larger than memory"
    ): (
        "dataset_streaming",
        "streaming",
    ),
    "the chat template decides it; another one is given with chat_template": ("eot_token",),
    "a prompt is never supervised": ("mask_prompt",),
    "use truncation_mode": ("truncation_side",),
    "TensorBoard files go into output_dir; the variable TENSORBOARD_LOGGING_DIR moves them": ("logging_dir",),
    "use logging_steps": ("log_freq",),
    "use project, or the variables WANDB_PROJECT and WANDB_ENTITY": (
        "wandb_project",
        "wandb_entity",
    ),
    "use include_num_input_tokens_seen": ("include_tokens_per_second",),
    "use optim": ("optimizer_type",),
    "weights are always written as safetensors; leave it out": ("save_safetensors",),
    "choose precision with bf16, fp16 and dtype": (
        "fp16_backend",
        "half_precision_backend",
        "fp16_opt_level",
    ),
    "the device is found without it; use_cpu: true keeps a run on the CPU": (
        "use_mps_device",
        "use_ipex",
        "jit_mode_eval",
        "tpu_num_cores",
        "tpu_metrics_debug",
        "mp_parameters",
        "ray_scope",
    ),
    "leave it out; fused_ops, on by default, compiles what gains by it": ("torchdynamo",),
    "use accelerator_config": (
        "dispatch_batches",
        "split_batches",
    ),
    "use the accelerate file under training_configs/": (
        "fsdp_min_num_params",
        "fsdp_transformer_layer_cls_to_wrap",
        "tp_size",
    ),
    "put the organization in hub_model_id, as ORGANIZATION/NAME": ("push_to_hub_organization",),
    "use model_revision": (
        "base_model_revision",
        "model_code_revision",
    ),
    "use gradient_checkpointing_kwargs, as {use_reentrant: false}": ("gradient_checkpointing_use_reentrant",),
    "the reference is the policy at the start, or ref_model_name_or_path": (
        "reference_free",
        "force_use_ref_model",
        "ref_model_init_kwargs",
        "ref_adapter_name",
        "model_adapter_name",
    ),
    "use length_penalty; the sign of the old one was the wrong way round": ("len_penalty",),
    "nothing takes its place; leave it out": (
        "generate_during_eval",
        "use_liger_loss",
        "use_num_logits_to_keep",
        "past_index",
        "use_logits_to_keep",
        "use_legacy_prediction_loop",
        "base_model_attribute_name",
        "ignore_bias_buffers",
        "padding_value",
        "label_pad_token_id",
        "is_encoder_decoder",
        "eos_padding",
    ),
}
RETIRED_KEYS: dict[str, Retired] = {
    **{old: Retired(to=new) for old, new in _RENAMED.items()},
    "warmup_ratio": Retired("warmup_steps", _ratio_as_steps),
    "group_by_length": Retired("train_sampling_strategy", _switch("group_by_length", "random")),
    "use_flash_attention_2": Retired("attn_implementation", _switch("flash_attention_2", None)),
    "adafactor": Retired("optim", _switch("adafactor", "adamw_torch_fused")),
    "include_inputs_for_metrics": Retired("include_for_metrics", _switch(["inputs"], [])),
    **{key: Retired(advice=advice) for advice, keys in _REFUSED.items() for key in keys},
}
