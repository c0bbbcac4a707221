"""The containers that travel between the stages."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

SIDES = ("chosen", "rejected")
Message = dict[str, Any]  # role, content, and for tool use: tool_calls, name, tool_call_id


@dataclass
class Pair:
    """One preference pair in messages (or plain strings), before any tokenizer.

    `chosen` and `rejected` are whole conversations: the prompt's messages first. `n_prompt` messages of them are
    context on both sides; their assistant turns are not supervised. `weights` holds a number for each message of
    chosen and of rejected, empty lists where all are 1. `margin` is the row's, in units of reward. `remarks` name what
    the report counts of rows that are kept, `unread` the fields of messages that nothing reads.
    """

    chosen: list[Message] | str
    rejected: list[Message] | str
    n_prompt: int  # messages; for plain strings, characters
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    weights: tuple[list[float], list[float]] = ([], [])
    margin: float | None = None
    prompt_given: bool = True  # in plain strings; else the prompt is what both sides begin with
    remarks: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)


@dataclass
class TokenizedPair:
    """Token ids and masks of one pair. `mask[t] == 1` where token t is supervised; `weights[t]` multiplies its log
    ratio, and the whole list is empty where all are 1.

    `shared_len` is the length of the longest common prefix of (id, mask, weight), in tokens. `longest` is the longer
    side before any cut; `cut` says that a turn ends in its middle.
    Example: chosen_ids [1, 5, 6, 2], chosen_mask [0, 0, 1, 1], rejected_ids [1, 5, 7, 2] -> shared_len 2.
    """

    chosen_ids: list[int]
    chosen_mask: list[int]
    rejected_ids: list[int]
    rejected_mask: list[int]
    shared_len: int
    chosen_weights: list[float] = field(default_factory=list)
    rejected_weights: list[float] = field(default_factory=list)
    longest: int = 0
    cut: bool = False
    remarks: list[str] = field(default_factory=list)  # as `Pair.remarks`


@dataclass
class PairLogps:
    """Log-probs of B pairs, each token's times its weight, summed over supervised tokens: float64, nats, shape (B,).
    Token counts are of supervised tokens whose turn's weight is not 0: int64, shape (B,)."""

    chosen: torch.Tensor
    rejected: torch.Tensor
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor


def turn_begins(mask: Sequence[int] | np.ndarray, rows: Sequence[int] | np.ndarray = ()) -> np.ndarray:
    """Whether a turn, a run of ones, begins at each place of a mask (T,): bool (T,). Of several masks one behind the
    other `rows` are the places where they begin: there a run ends, though the next mask may go on with a one.

    Example: [0, 1, 1, 0, 1] -> true at 1 and 4; with rows [0, 2] at 1, 2 and 4.
    """
    ones = np.asarray(mask, bool)
    before = np.zeros_like(ones)
    before[1:] = ones[:-1]
    before[np.asarray(rows, np.int64)] = False
    return ones & ~before


def common_prefix(a: Sequence, b: Sequence) -> int:
    """Length of the longest common prefix of two sequences."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
