"""Of a tokenized dataset: turns, tokens and sequences of each row's sides, why sequences begin, tokens in all."""

import re
from collections import Counter
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from mdpo.data.whole_columns import whole_numbers
from mdpo.types import SIDES, turn_begins

UNKNOWN = "no reason is known"


def arrow_lists(table, column: str):
    """A column of lists as one Arrow array; None where there is no such column."""
    return table.column(column).combine_chunks() if column in table.column_names else None


def counts_by_row(masks, lengths=None) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of an Arrow list of masks: runs of ones, tokens, ones and sequences of each row. `lengths` is the Arrow list of
    the tokens of each sequence, empty in a row that is one; a run ends where a sequence does."""
    offsets = np.asarray(masks.offsets, np.int64)
    bits = np.asarray(masks.values.slice(offsets[0], offsets[-1] - offsets[0]), np.int64)
    starts = offsets[:-1] - offsets[0]
    inner, sequences = _inner_starts(starts, lengths)
    begins = turn_begins(bits, np.concatenate([starts, inner])).astype(np.int64)
    return np.add.reduceat(begins, starts), np.diff(offsets), np.add.reduceat(bits, starts), sequences


def _inner_starts(starts: np.ndarray, lengths) -> tuple[np.ndarray, np.ndarray]:
    """Where sequences after a row's first begin, for rows that begin at `starts`, and how many sequences each row has.
    Example: starts [0, 5], lengths [[2, 2, 1], []] -> [2, 4], [3, 1]."""
    if lengths is None:
        return np.zeros(0, np.int64), np.ones_like(starts)
    offsets = np.asarray(lengths.offsets, np.int64)
    counts = np.diff(offsets)
    before = np.concatenate(
        [[0], np.cumsum(np.asarray(lengths.values.slice(offsets[0], offsets[-1] - offsets[0]), np.int64))]
    )
    row = np.repeat(np.arange(len(starts)), counts)
    first = offsets[:-1] - offsets[0]  # each row's first sequence, as an index into `before`
    places = starts[row] + before[:-1] - before[first[row]]
    later = np.arange(len(row)) != first[row]
    return places[later], np.maximum(counts, 1)


class Reasons:
    """Why sequences after a side's first one begin, message numbers left out."""

    def __init__(self) -> None:
        self.several, self.sequences, self.sides = 0, Counter[str](), Counter[str]()

    def add(self, sequences: np.ndarray, breaks) -> None:
        """`sequences` of each row of a side, and the Arrow list of its breaks, None where there is no such column."""
        for i in np.flatnonzero(sequences > 1).tolist():
            known = (breaks[i].as_py() if breaks is not None else None) or [UNKNOWN] * int(sequences[i] - 1)
            of_side = Counter(re.sub(r"\bmessage \d+", "message N", reason) for reason in known)
            self.sequences += of_side
            self.sides.update(of_side.keys())
            self.several += 1

    def as_dict(self) -> dict[str, Any]:
        reasons = {reason: {"sides": self.sides[reason], "sequences": n} for reason, n in self.sequences.items()}
        return {"sides": self.several, "reasons": reasons}


def token_totals(rows: Dataset) -> tuple[int, int]:
    """Tokens of all sequences of all pairs, and those that are distinct within their pair."""
    tables = rows.select_columns([f"{side}_ids" for side in SIDES]).with_format("arrow").iter(batch_size=1000)
    tokens = sum(pc.sum(pc.list_value_length(column)).as_py() or 0 for table in tables for column in table.columns)
    return tokens, int(whole_numbers(rows, "distinct").sum())


def rank_imbalance(rows: Dataset, pairs: int, ranks: int = 8, seed: int = 0) -> float | None:
    """How much longer the busiest of `ranks` works than all on average, simulated from lengths: the most tokens of a
    rank over the mean, those that a pair's sequences begin with alike once, in shuffled batches of `pairs` a rank; None
    where there is no such step."""
    tokens = whole_numbers(rows, "distinct")
    steps = len(tokens) // (ranks * pairs)
    if not steps:
        return None
    shuffled = np.random.default_rng(seed).permutation(tokens)[: steps * ranks * pairs]
    of_ranks = shuffled.reshape(steps, ranks, pairs).sum(2)
    return float((of_ranks.max(1) / of_ranks.mean(1)).mean())
