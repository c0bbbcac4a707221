"""Values out of range, refused by the name of their key."""

import math
from collections.abc import Callable
from typing import Any

from mdpo.errors import UserError

COUNTS = """dataset_num_proc precompute_ref_batch_size dataloader_prefetch_factor ddp_timeout ref_model_sync_steps
    pad_to_multiple_of eval_accumulation_steps"""
NOT_NEGATIVE = """nll_coefficient margin_scale length_penalty learning_rate weight_decay max_grad_norm
    neftune_noise_alpha eval_delay adam_epsilon seed data_seed router_aux_loss_coef dataloader_num_workers
    warmup_steps"""


def positive(value: float) -> bool:
    return 0 < value < math.inf  # also False for nan


def not_negative(value: float) -> bool:
    return 0 <= value < math.inf


def at_least_one(value: float) -> bool:
    return value >= 1


def one_of(choices: tuple[str, ...]) -> tuple[Callable[[Any], bool], str]:
    """A test and its advice, for `check_ranges`."""
    return lambda value: value in choices, f"one of {', '.join(choices)}"


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
