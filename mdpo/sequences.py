"""Arithmetic of token sequences: where turns begin, what sequences share, and a side's lists cut into its sequences."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np


def turn_begins(mask: Sequence[int] | np.ndarray, rows: Sequence[int] | np.ndarray = ()) -> np.ndarray:
    """Whether a turn, a run of ones, begins at each place of a mask (T,): bool (T,). Of several masks one behind the
    other `rows` are the places where they begin: there a run ends, though the next mask may begin with a one.

    Example: [0, 1, 1, 0, 1] -> true at 1 and 4; with rows [0, 2] at 1, 2 and 4.
    """
    ones = np.asarray(mask, bool)
    before = np.zeros_like(ones)
    before[1:] = ones[:-1]
    before[np.asarray(rows, np.int64)] = False
    return ones & ~before


def common_prefix(a: Sequence, b: Sequence) -> int:
    """Length of the longest common prefix of two sequences of one type, by halves: slices compare far faster than
    items do."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def sequence_lengths(row: Mapping[str, Any], side: str) -> list[int]:
    """Tokens of each sequence of a side of a tokenized row."""
    return row.get(f"{side}_lengths") or [len(row[f"{side}_ids"])]


def split(values: Sequence, lengths: Sequence[int]) -> list[Sequence]:
    """A side's ids, mask or weights by its sequences. Example: [5, 6, 7], [2, 1] -> [[5, 6], [7]]."""
    ends = [0, *accumulate(lengths)]
    return [values[start:end] for start, end in pairwise(ends)]


def distinct_tokens(sequences: Iterable[list[int]]) -> int:
    """How many tokens there are where those that sequences begin with alike count once: the nodes of their trie. In
    lexical order each shares the most with the one before it. Example: [[5, 6, 7], [5, 8], [5, 6]] -> 4."""
    ordered = sorted(sequences)
    return sum(map(len, ordered)) - sum(common_prefix(a, b) for a, b in pairwise(ordered))
