"""What a recipe may say: our dataclasses beside trl.ModelConfig, and the table of keys that older recipes use.

`mdpo.recipe` fills them from YAML and the command line. Values that no run could use are refused here, by name.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from trl import DPOConfig

from mdpo.types import UserError


def _positive(value: float) -> bool:
    return 0 < value < math.inf  # also False for nan


def _not_negative(value: float) -> bool:
    return 0 <= value < math.inf


def _at_least_one(value: float) -> bool:
    return value >= 1


def _check_ranges(config: Any, ranges: dict[str, tuple[Callable[[Any], bool], str]]) -> None:
    """Raise UserError for the first key of `ranges` (key -> test, advice) whose value is set and fails its test."""
    for key, (test, advice) in ranges.items():
        value = getattr(config, key)
        if value is not None and not test(value):
            raise UserError(f"{key}: {value!r} is out of range; give {advice}.")


@dataclass
class DataArguments:
    """Which rows are trained on and evaluated, and how they are rendered. A list given for a mixer becomes a dict."""

    dataset_mixer: dict[str, float] | list[str] = field(
        default_factory=dict,
        metadata={"help": "Training sets: name or path -> share of that set's rows, in (0, 1]. A list means 1.0 each."},
    )
    dataset_splits: list[str] = field(
        default_factory=lambda: ["train", "test"],
        metadata={"help": "Splits to read. Those with 'train' in their name are trained on, the others evaluated."},
    )
    dataset_configs: list[str] | None = field(
        default=None, metadata={"help": "Configuration name of each set in dataset_mixer, in the same order."}
    )
    eval_dataset_mixer: dict[str, float] | list[str] | None = field(
        default=None, metadata={"help": "Separate held-out sets, written as dataset_mixer; all splits are evaluated."}
    )
    test_split_size: float | int | None = field(
        default=None,
        metadata={"help": "Held out by prompt, seeded, from sets with one split: rows (int) or a share in (0, 1)."},
    )
    max_training_samples: int | None = field(default=None, metadata={"help": "Train on at most this many pairs."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on at most this many pairs."})
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Tokenizer to use in place of the model's own."}
    )
    chat_template: str | None = field(
        default=None, metadata={"help": "Path of a jinja file to use in place of the tokenizer's chat template."}
    )
    chat_template_kwargs: dict | None = field(
        default=None, metadata={"help": "Variables passed to the chat template, such as {enable_thinking: false}."}
    )

    def __post_init__(self):
        """Turn lists of sets into shares of 1.0. Raises UserError for values that no run could use."""
        for key in ("dataset_mixer", "eval_dataset_mixer"):
            setattr(self, key, _as_mixer(key, getattr(self, key)))
        if not self.dataset_mixer:
            raise UserError("dataset_mixer: names no set; give at least one, as {NAME_OR_PATH: 1.0}.")
        if not any("train" in split for split in self.dataset_splits):
            raise UserError(f"dataset_splits: {self.dataset_splits!r} has no name with 'train' in it; add one.")
        if self.dataset_configs is not None and len(self.dataset_configs) != len(self.dataset_mixer):
            raise UserError(
                f"dataset_configs: {len(self.dataset_configs)} names for the {len(self.dataset_mixer)} sets of "
                "dataset_mixer; give one for each, in the same order."
            )
        if self.chat_template and any(mark in self.chat_template for mark in ("{%", "{{", "\n")):
            raise UserError("chat_template: holds a template's text; save it as a .jinja file and give that path.")
        _check_ranges(
            self,
            {
                "max_training_samples": (_at_least_one, "a whole number >= 1, or leave it out to train on all rows"),
                "max_eval_samples": (_at_least_one, "a whole number >= 1, or leave it out to evaluate on all rows"),
                "test_split_size": (
                    lambda size: size >= 1 if isinstance(size, int) else 0 < size < 1,
                    "a whole number of rows >= 1 or a share between 0 and 1",
                ),
            },
        )


def _as_mixer(key: str, sets: dict[str, float] | list[str] | None) -> dict[str, float] | None:
    """{name: share of rows} as floats in (0, 1]; a list of names means 1.0 each. Raises UserError."""
    if sets is None:
        return None
    if isinstance(sets, list):
        if repeated := sorted({name for name in sets if sets.count(name) > 1}):
            raise UserError(f"{key}: {repeated[0]!r} is listed twice; list each set once.")
        sets = dict.fromkeys(sets, 1.0)
    for name, share in sets.items():
        if not 0 < share <= 1:
            raise UserError(f"{key}: {share!r} for {name!r} is out of range; give the share of its rows, in (0, 1].")
    return {name: float(share) for name, share in sets.items()}


@dataclass(repr=False)
class MDPOConfig(DPOConfig):
    """trl.DPOConfig with what multi-turn DPO needs. A plain DPOConfig in its place gives TRL's behaviour."""

    __repr__ = DPOConfig.__str__  # TrainingArguments' own, which hides tokens; DPOConfig's repr shows them

    mask_user_turns: bool = field(
        default=True,
        metadata={"help": "Supervise only what the policy itself says. False: everything after the prompt, as in TRL."},
    )
    nll_coefficient: float = field(
        default=0.0, metadata={"help": "Weight of the chosen side's negative log-likelihood added to the loss."}
    )
    truncation_mode: str = field(
        default="drop",
        metadata={
            "help": "A pair with a side over max_length is dropped and counted ('drop') or cut ('keep_start').",
            "choices": ["drop", "keep_start"],
        },
    )
    ref_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Reference model, where it is not the policy that training starts from."}
    )
    sanity_check: bool = field(
        default=False, metadata={"help": "Train on a few pairs only, to see that a recipe runs end to end."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start afresh in an output_dir that already holds a run."}
    )
    resume_from_checkpoint: str | bool | None = field(
        default=None, metadata={"help": "Checkpoint folder to continue from; true for the last one in output_dir."}
    )

    def __post_init__(self):
        """Raises UserError for values out of range, before TrainingArguments touches any device."""
        modes = type(self).__dataclass_fields__["truncation_mode"].metadata["choices"]
        _check_ranges(
            self,
            {
                "beta": (_positive, "a number > 0"),
                "nll_coefficient": (_not_negative, "a number >= 0"),
                "max_length": (lambda length: length >= 2, "a whole number of tokens >= 2, or null for no limit"),
                "truncation_mode": (lambda mode: mode in modes, " or ".join(modes)),
                "learning_rate": (_not_negative, "a number >= 0"),
                "num_train_epochs": (_positive, "a number > 0"),
                "per_device_train_batch_size": (_at_least_one, "a whole number of pairs >= 1"),
                "per_device_eval_batch_size": (_at_least_one, "a whole number of pairs >= 1"),
                "gradient_accumulation_steps": (_at_least_one, "a whole number >= 1"),
                "dataset_num_proc": (_at_least_one, "a whole number >= 1, or leave it out"),
            },
        )
        super().__post_init__()


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


# From alignment-handbook, transformers 4, TRL before 1.0 and the first M-DPO scripts; tests/test_config.py checks
# every entry against the installed packages.
_RENAMED = """torch_dtype=dtype evaluation_strategy=eval_strategy preprocessing_num_workers=dataset_num_proc
    per_gpu_train_batch_size=per_device_train_batch_size per_gpu_eval_batch_size=per_device_eval_batch_size
    hub_model_revision=hub_revision push_to_hub_model_id=hub_model_id push_to_hub_token=hub_token no_cuda=use_cpu
    xpu_backend=ddp_backend rpo_alpha=nll_coefficient masking_user_turn=mask_user_turns
    ref_model=ref_model_name_or_path"""
_REFUSED = {
    "only whole sequences are measured; set max_length (prompt and answer together)": """max_prompt_length
        max_completion_length max_target_length max_seq_length""",
    "name the training sets in dataset_mixer, as {NAME_OR_PATH: 1.0}": "dataset_name dataset_mixture train_dir",
    "name the held-out set in eval_dataset_mixer, as {NAME_OR_PATH: 1.0}": "eval_dir",
    "use dataset_configs": "dataset_config",
    "use dataset_splits, as [train, test]": "dataset_train_split dataset_test_split",
    "rows are pairs of conversations, complete in the columns chosen and rejected": """dataset_text_field text_column
        dataset_kwargs dataset_streaming tools auto_insert_empty_system_msg choose_type margin_scale""",
    "the chat template decides it; another one is given with chat_template": "eot_token",
    "a prompt is never supervised": "mask_prompt",
    "use truncation_mode": "truncation_side",
    "TensorBoard files go into output_dir; the variable TENSORBOARD_LOGGING_DIR moves them": "logging_dir",
    "use logging_steps": "log_freq",
    "use project, or the variables WANDB_PROJECT and WANDB_ENTITY": "wandb_project wandb_entity",
    "use include_num_input_tokens_seen": "include_tokens_per_second",
    "use optim": "optimizer_type",
    "weights are always written as safetensors": "save_safetensors",
    "choose precision with bf16, fp16 and dtype": "fp16_backend half_precision_backend fp16_opt_level",
    "the device is found without it; use_cpu: true keeps a run on the CPU": """use_mps_device use_ipex jit_mode_eval
        tpu_num_cores tpu_metrics_debug mp_parameters ray_scope""",
    "use torch_compile": "torchdynamo",
    "use accelerator_config": "dispatch_batches split_batches",
    "use the accelerate file under training_configs/": "fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap tp_size",
    "put the organisation in hub_model_id, as ORGANISATION/NAME": "push_to_hub_organization",
    "use model_revision": "base_model_revision model_code_revision",
    "use gradient_checkpointing_kwargs, as {use_reentrant: false}": "gradient_checkpointing_use_reentrant",
    "the reference is the policy at the start, or ref_model_name_or_path": """reference_free force_use_ref_model
        ref_model_init_kwargs ref_adapter_name model_adapter_name""",
    "nothing takes its place; leave it out": """generate_during_eval use_liger_loss use_num_logits_to_keep past_index
        use_logits_to_keep use_legacy_prediction_loop base_model_attribute_name ignore_bias_buffers len_penalty
        padding_value label_pad_token_id is_encoder_decoder eos_padding""",
}
RETIRED_KEYS: dict[str, Retired] = {
    **{old: Retired(to=new) for old, new in (pair.split("=") for pair in _RENAMED.split())},
    "warmup_ratio": Retired("warmup_steps", _ratio_as_steps),
    "group_by_length": Retired("train_sampling_strategy", _switch("group_by_length", "random")),
    "use_flash_attention_2": Retired("attn_implementation", _switch("flash_attention_2", None)),
    "adafactor": Retired("optim", _switch("adafactor", "adamw_torch_fused")),
    "include_inputs_for_metrics": Retired("include_for_metrics", _switch(["inputs"], [])),
    **{key: Retired(advice=advice) for advice, keys in _REFUSED.items() for key in keys.split()},
}
