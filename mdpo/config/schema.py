"""What a recipe may say: our dataclasses beside trl.ModelConfig.

`mdpo.config.recipe` fills them from YAML and the command line. Values that no run could use are refused here, by name.
"""

from dataclasses import dataclass, field

from trl import DPOConfig

from mdpo.config.ranges import (
    COUNTS,
    DATA_RANGES,
    NOT_NEGATIVE,
    PAIRINGS,
    WITHOUT_REASONING,
    as_mixer,
    at_least_one,
    check_ranges,
    not_negative,
    positive,
)
from mdpo.errors import UserError


@dataclass
class DataArguments:
    """Which rows are trained on and evaluated, and how they are rendered. A list given for a mixer becomes a dict."""

    dataset_mixer: dict[str, float] | list[str] = field(
        default_factory=dict,
        metadata={"help": "Training datasets: name or path -> share of its rows, in (0, 1]. A list means 1.0 each."},
    )
    dataset_splits: list[str] = field(
        default_factory=lambda: ["train", "test"],
        metadata={"help": "Splits to read. Those with 'train' in their name are trained on, the others evaluated."},
    )
    dataset_configs: list[str] | None = field(
        default=None, metadata={"help": "Configuration name of each dataset in dataset_mixer, in the same order."}
    )
    eval_dataset_mixer: dict[str, float] | list[str] | None = field(
        default=None, metadata={"help": "Separate held-out datasets, written as dataset_mixer; all splits count."}
    )
    test_split_size: float | int | None = field(
        default=None,
        metadata={"help": "Held out by prompt, seeded, where a dataset has one split: rows, or a share in (0, 1)."},
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
    allow_different_prompts: bool = field(
        default=False, metadata={"help": "Keep pairs whose two sides begin with different prompts."}
    )
    turns_without_reasoning: str = field(
        default="keep",
        metadata={
            "help": "A turn without thoughts where the policy was to think: learn it, 'mask' it, 'drop' its pair.",
            "choices": [*WITHOUT_REASONING],
        },
    )
    pairs: str = field(
        default="best_worst",
        metadata={"help": "Which answers of a row with several are compared, see rows.md.", "choices": [*PAIRINGS]},
    )
    min_reward_gap: float = field(
        default=0.0, metadata={"help": "Of a row with several answers: compare those that differ by at least this."}
    )
    max_pairs_per_prompt: int | None = field(default=None, metadata={"help": "At most this many pairs of such a row."})
    on_bad_rows: str = field(
        default="drop",
        metadata={
            "help": "A row that cannot be trained on is dropped and counted ('drop') or ends the run ('error').",
            "choices": ["drop", "error"],
        },
    )
    max_bad_fraction: float = field(
        default=0.2,
        metadata={"help": "The run ends before training where more than this share of a dataset is dropped."},
    )

    def __post_init__(self):
        """Turn lists of datasets into shares of 1.0. Raises UserError for values that no run could use."""
        for key in ("dataset_mixer", "eval_dataset_mixer"):
            setattr(self, key, as_mixer(key, getattr(self, key)))
        if not self.dataset_mixer:
            raise UserError("dataset_mixer: names no dataset; give at least one, as {NAME_OR_PATH: 1.0}.")
        if not any("train" in split for split in self.dataset_splits):
            raise UserError(f"dataset_splits: {self.dataset_splits!r} has no name with 'train' in it; add one.")
        if self.dataset_configs is not None and len(self.dataset_configs) != len(self.dataset_mixer):
            raise UserError(
                f"dataset_configs: {len(self.dataset_configs)} names for the {len(self.dataset_mixer)} datasets "
                "of dataset_mixer; give one for each, in the same order."
            )
        if self.chat_template and any(mark in self.chat_template for mark in ("{%", "{{", "\n")):
            raise UserError("chat_template: contains a template's text; save it as a .jinja file and give that path.")
        check_ranges(self, DATA_RANGES)


# Our keys where a plain trl.DPOConfig is given.
TRL_VALUES = {
    "mask_user_turns": False,
    "nll_coefficient": 0.0,
    "margin_scale": 0.0,
    "length_penalty": 0.0,
    "ref_model_name_or_path": None,
    "shared_prefix": False,
    "group_pairs": False,
    "fused_ops": False,
    "reference_cache_dir": None,
    "sanity_check": False,
    "overwrite_output_dir": False,
    "max_nonfinite_steps": None,
    "show_answers": 0,
}


@dataclass(repr=False)
class MDPOConfig(DPOConfig):
    """trl.DPOConfig with what multi-turn DPO needs. A plain DPOConfig in its place gives TRL's behavior."""

    __repr__ = DPOConfig.__str__  # TrainingArguments' own, which hides tokens; DPOConfig's repr shows them
    of_trl = False  # no key: whether it stands for a plain trl.DPOConfig

    mask_user_turns: bool = field(
        default=True,
        metadata={
            "help": "Supervise only tokens that the policy samples. False: everything after the prompt, as in TRL."
        },
    )
    nll_coefficient: float = field(
        default=0.0, metadata={"help": "Adds so much of the chosen side's -log p per token to each pair's loss (RPO)."}
    )
    margin_scale: float = field(
        default=0.0,
        metadata={
            "help": "Times a row's `margin`: the reward difference to reach, in sigmoid, hinge, kl, rev_kl, tv and "
            "hellinger."
        },
    )
    length_penalty: float = field(
        default=0.0,
        metadata={"help": "Alpha of R-DPO, per supervised token by which chosen is longer; with loss sigmoid."},
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
    shared_prefix: bool = field(
        default=True,
        metadata={
            "help": "Compute tokens that both sides of a pair share once, in rows without padding. Same numbers."
        },
    )
    group_pairs: bool = field(
        default=True,
        metadata={"help": "Keep the pairs of one prompt in one micro-batch, as far as it holds them."},
    )
    fused_ops: bool = field(
        default=True,
        metadata={"help": "Compile norms, gated activations and the LM head's softmax. Same numbers, less memory."},
    )
    reference_cache_dir: str | None = field(
        default=None,
        metadata={"help": "Where precomputed reference log-probs are cached; by default $HF_HOME/mdpo-reference."},
    )
    sanity_check: bool = field(
        default=False, metadata={"help": "32 training and 8 held-out rows of each dataset, to see that a recipe runs."}
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Clears an earlier run and starts anew, every time: leave it out of runs that may stop."},
    )
    resume_from_checkpoint: str | bool | None = field(
        default=None,
        metadata={
            "help": "A run resumes from the newest complete checkpoint in output_dir, if there is one. A folder: from "
            "that one; true: from the newest, which has to be there; false: never."
        },
    )
    max_nonfinite_steps: int = field(
        default=3,
        metadata={
            "help": "So many non-finite steps (NaN or Inf loss or gradient) in a row end the run; each is skipped."
        },
    )

    show_answers: int = field(
        default=0, metadata={"help": "Show the policy's greedy turns in so many held-out pairs, before and after."}
    )

    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Trainer's own filter of logged losses; non-finite steps are skipped without it."},
    )

    @classmethod
    def with_trl_behaviour(cls, args: DPOConfig) -> "MDPOConfig":
        """An MDPOConfig as it is; a plain trl.DPOConfig as one with its values and every departure from TRL off."""
        if isinstance(args, MDPOConfig):
            return args
        lifted = object.__new__(cls)  # its own __init__ would look for devices again
        vars(lifted).update({**TRL_VALUES, **vars(args), "of_trl": True})
        return lifted

    def __post_init__(self):
        """Raises UserError for values out of range, before TrainingArguments touches any device."""
        modes = type(self).__dataclass_fields__["truncation_mode"].metadata["choices"]
        check_ranges(
            self,
            {
                "beta": (positive, "a number > 0"),
                "max_length": (lambda length: length >= 2, "a whole number of tokens >= 2, or null for no limit"),
                "truncation_mode": (lambda mode: mode in modes, " or ".join(modes)),
                "num_train_epochs": (positive, "a number > 0"),
                "per_device_train_batch_size": (at_least_one, "a whole number of pairs >= 1"),
                "per_device_eval_batch_size": (at_least_one, "a whole number of pairs >= 1"),
                "gradient_accumulation_steps": (at_least_one, "a whole number >= 1"),
                "max_nonfinite_steps": (at_least_one, "a whole number of steps >= 1"),
                **dict.fromkeys(
                    COUNTS.split(), (lambda n: n == "auto" or n >= 1, "a whole number >= 1, or leave it out")
                ),
                **dict.fromkeys(NOT_NEGATIVE.split(), (not_negative, "a number >= 0")),
                **dict.fromkeys(("adam_beta1", "adam_beta2"), (lambda beta: 0 <= beta < 1, "a number in [0, 1)")),
                **dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), (not_negative, "a number > 0")),
                "include_num_input_tokens_seen": (
                    lambda value: value in (True, False, "all", "non_padding", "no"),
                    "all, non_padding or no",
                ),
                "discopop_tau": (positive, "a number > 0"),
                "ref_model_mixup_alpha": (lambda alpha: 0 <= alpha <= 1, "a number in [0, 1]"),
                "max_steps": (lambda steps: steps == -1 or steps >= 1, "a whole number >= 1, or -1 for all epochs"),
            },
        )
        unset = self.accelerator_config is None
        super().__post_init__()
        if unset and self.dataloader_pin_memory:  # else each tensor of a batch waits for the GPU on its way there
            self.accelerator_config.non_blocking = True
