"""Values out of range, refused by the name of their key."""

import math
from collections.abc import Callable
from typing import Any

from mdpo.errors import UserError

COUNTS = """dataset_num_proc precompute_ref_batch_size dataloader_prefetch_factor ddp_timeout ref_model_sync_steps
    pad_to_multiple_of eval_accumulation_steps"""
NOT_NEGATIVE = """nll_coefficient margin_scale length_penalty learning_rate weight_decay max_grad_norm
    neftune_noise_alpha eval_delay adam_epsilon seed data_seed router_aux_loss_coef dataloader_num_workers
    warmup_steps show_answers"""


PAIRINGS = ("best_worst", "all", "adjacent", "random")  # of a row with several answers
WITHOUT_REASONING = ("keep", "mask", "drop")  # turns whose generation prompt opens a think block


def positive(value: float) -> bool:
    return 0 < value < math.inf  # also False for nan


def not_negative(value: float) -> bool:
    return 0 <= value < math.inf


def at_least_one(value: float) -> bool:
    return value >= 1


def one_of(choices: tuple[str, ...]) -> tuple[Callable[[Any], bool], str]:
    """A test and its advice, for `check_ranges`."""
    return lambda value: value in choices, f"one of {', '.join(choices)}"


DATA_RANGES = {
    "max_training_samples": (at_least_one, "a whole number >= 1, or leave it out to train on all rows"),
    "max_eval_samples": (at_least_one, "a whole number >= 1, or leave it out to evaluate on all rows"),
    "turns_without_reasoning": one_of(WITHOUT_REASONING),
    "pairs": one_of(PAIRINGS),
    "min_reward_gap": (not_negative, "a number >= 0"),
    "max_pairs_per_prompt": (at_least_one, "a whole number >= 1, or leave it out for all"),
    "on_bad_rows": one_of(("drop", "error")),
    "max_bad_fraction": (lambda share: 0 <= share <= 1, "a share between 0 and 1"),
    "test_split_size": (
        lambda size: size >= 1 if isinstance(size, int) else 0 < size < 1,
        "a whole number of rows >= 1 or a share between 0 and 1",
    ),
}


def check_ranges(config: Any, ranges: dict[str, tuple[Callable[[Any], bool], str]]) -> None:
    """Raise UserError for the first key of `ranges` (key -> test, advice) whose value is set and fails its test."""
    for key, (test, advice) in ranges.items():
        value = getattr(config, key)
        if value is not None and not test(value):
            raise UserError(f"{key}: {value!r} is out of range; give {advice}.")


def as_mixer(key: str, mixer: dict[str, float] | list[str] | None) -> dict[str, float] | None:
    """{name: share of rows} as floats in (0, 1]; a list of names means 1.0 each. Raises UserError."""
    if mixer is None:
        return None
    if isinstance(mixer, list):
        if repeated := sorted({name for name in mixer if mixer.count(name) > 1}):
            raise UserError(f"{key}: {repeated[0]!r} is listed twice; list each dataset once.")
        mixer = dict.fromkeys(mixer, 1.0)
    for name, share in mixer.items():
        if not 0 < share <= 1:
            raise UserError(f"{key}: {share!r} for {name!r} is out of range; give the share of its rows, in (0, 1].")
    return {name: float(share) for name, share in mixer.items()}
