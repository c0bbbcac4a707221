"""The token forest: sequences that begin alike share these tokens, so that each distinct token is computed once.

It is the trie of a batch's sequences over token ids, in one row, depth first: a node's first child stands next to it,
and children come in the order in which sequences first need them. A node's position is its depth. A *run* is a chain of
first children, as long as it can be; what a run attends to is its ancestors and itself, so each is causal attention of
the last Q of K tokens:

    sequences 5 6 7 8 | 5 6 9 | 5 6 | 3      row       5 6 7 8   9   3
                                             position  0 1 2 3   2   0
                                             runs      [4, -1]   [1, 1]   [1, -1]: tokens, and the parent's index
                                             ends      3, 4, 1, 5: where each sequence's last token is
"""

from bisect import bisect, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch

# A copied key is read and written in forward and backward, 8 bytes a number in float32; a score costs 2 products of the
# same length. By a CPU core's 5 GB/s and 30 GFLOP/s, estimated, a key's copy takes as long as 6 scores.
SCORES_PER_COPY = 6


class Row(NamedTuple):
    """A forest of N tokens as it stands in a batch: numbers and lists, which every carrier of batches passes on."""

    ids: np.ndarray  # (N,) int64
    positions: np.ndarray  # (N,) int64, each token's depth
    runs: list[list[int]]  # of each run its tokens, and its parent's index in the row, -1 at a root
    ends: list[int]  # the index of each sequence's last token


@dataclass
class _Chain:
    """A run while the forest grows: its tokens are those of depth `first` … `end` - 1."""

    first: int
    parent: "_Chain | None"
    end: int = 0
    parts: list[np.ndarray] = field(default_factory=list)
    branches: "list[_Chain]" = field(default_factory=list)
    start: int = 0  # in the row

    def index(self, depth: int) -> int:
        return self.start + depth - self.first


def plant(sequences: Sequence[np.ndarray]) -> Row:
    """The forest of sequences of ids, int64, each of one token at least."""
    roots: list[_Chain] = []
    tips: list[_Chain] = []  # the chain of each sequence's last token
    for sequence, (shared, other) in zip(sequences, _nearest(sequences), strict=True):
        chain = tips[other] if shared else None
        while chain is not None and chain.first >= shared:
            chain = chain.parent
        if shared < len(sequence):
            if chain is None or shared < chain.end:  # else it goes on where an earlier sequence ended
                siblings = roots if chain is None else chain.branches
                chain = _Chain(shared, chain)
                siblings.append(chain)
            chain.parts.append(sequence[shared:])
            chain.end = len(sequence)
        assert chain is not None
        tips.append(chain)
    chains = _depth_first(roots)
    return Row(
        np.concatenate([part for chain in chains for part in chain.parts]),
        np.concatenate([np.arange(chain.first, chain.end) for chain in chains]),
        [[c.end - c.first, -1 if c.parent is None else c.parent.index(c.first - 1)] for c in chains],
        [chain.index(len(sequence) - 1) for chain, sequence in zip(tips, sequences, strict=True)],
    )


def apart(sequences: Sequence[np.ndarray]) -> Row:
    """The same row without sharing: each sequence is a tree of its own."""
    lengths = [len(sequence) for sequence in sequences]
    positions = np.concatenate([np.arange(length) for length in lengths])
    runs, ends = [[length, -1] for length in lengths], [end - 1 for end in accumulate(lengths)]
    return Row(np.concatenate(list(sequences)), positions, runs, ends)


def _depth_first(roots: list[_Chain]) -> list[_Chain]:
    """Chains in the row's order, with their starts: behind a chain what branches off, from its last token backward."""
    pending, chains, n = roots[::-1], [], 0
    while pending:
        chain = pending.pop()
        chain.start, n = n, n + chain.end - chain.first
        chains.append(chain)
        pending += sorted(chain.branches, key=lambda branch: -branch.first)[::-1]
    return chains


def _nearest(sequences: Sequence[np.ndarray]) -> list[tuple[int, int]]:
    """For each sequence how many tokens it shares at most with an earlier one, and which that is.

    Of sequences in order (of their bytes: any order will do), two share what all neighbors between them share, so that
    the most is shared with one of the two nearest earlier ones."""
    texts = [np.ascontiguousarray(sequence).tobytes() for sequence in sequences]
    order = sorted(range(len(texts)), key=texts.__getitem__)
    alike = [_shared(sequences[a], sequences[b]) for a, b in pairwise(order)]
    earlier: list[int] = []  # ranks
    nearest = []
    for rank in np.argsort(order, kind="stable").tolist():
        at = bisect(earlier, rank)
        spans = [(other, *sorted((rank, other))) for other in earlier[max(at - 1, 0) : at + 1]]
        nearest.append(max(((min(alike[low:high]), order[other]) for other, low, high in spans), default=(0, -1)))
        insort(earlier, rank)
    return nearest


def _shared(a: np.ndarray, b: np.ndarray) -> int:
    """`common_prefix` of arrays."""
    least = min(len(a), len(b))
    other = np.flatnonzero(a[:least] != b[:least])
    return int(other[0]) if len(other) else least


class Unit(NamedTuple):
    """What one call of attention serves: a run, or several that hang on one token, without any on themselves."""

    sizes: tuple[int, ...]  # tokens of each run
    before: int  # ancestors of the first token
    parent: int  # the unit that the last ancestor is in, -1 without ancestors
    grows: bool  # whether runs hang on it


class Forest:
    """What attention derives from a row's runs, once for all layers."""

    def __init__(self, runs: Sequence[Sequence[int]], ends: Sequence[int] = (), spread=None):
        self.sizes, self.parents = [size for size, _ in runs], [parent for _, parent in runs]
        self.starts = [0, *accumulate(self.sizes)][:-1]
        self.ends = list(ends)
        self.spread = spread  # over ranks: a `mdpo.forward.sequence_parallel.Spread`
        self._on: dict = {}  # tensors by device and what they are

    def run_of(self, index: int) -> int:
        return bisect(self.starts, index) - 1

    @cached_property
    def before(self) -> list[int]:
        """Of each run how many ancestors its first token has, which is its depth."""
        depths: list[int] = []
        for parent in self.parents:
            run = self.run_of(parent) if parent >= 0 else -1
            depths.append(depths[run] + parent - self.starts[run] + 1 if parent >= 0 else 0)
        return depths

    @property
    def positions(self) -> np.ndarray:
        """(N,) each token's depth."""
        return np.concatenate(
            [np.arange(depth, depth + size) for depth, size in zip(self.before, self.sizes, strict=True)]
        )

    @cached_property
    def keys(self) -> list[np.ndarray]:
        """Of each run the tokens that its last one sees, as indices in the row, int64: ancestors, then its own."""
        keys: list[np.ndarray] = []
        for start, size, before, parent in zip(self.starts, self.sizes, self.before, self.parents, strict=True):
            own = np.arange(start, start + size)
            keys.append(np.concatenate([keys[self.run_of(parent)][:before], own]) if before else own)
        return keys

    def path(self, index: int) -> np.ndarray:
        """The tokens from a root to the one at `index`."""
        run = self.run_of(index)
        return self.keys[run][: self.before[run] + index - self.starts[run] + 1]

    @cached_property
    def paths(self) -> list[np.ndarray]:
        """The tokens of each sequence, as indices in the row."""
        return [self.path(end) for end in self.ends]

    @property
    def counts(self) -> torch.Tensor:
        """(1, N): how many tokens of the padded layout each one replaces, one for each sequence that it is in."""
        return torch.from_numpy(np.bincount(np.concatenate(self.paths), minlength=sum(self.sizes)))[None]

    @property
    def key_sizes(self) -> list[int]:
        return [before + size for before, size in zip(self.before, self.sizes, strict=True)]

    @cached_property
    def units(self) -> list[Unit]:
        """Runs in the row's order, short neighbors joined: what is masked among them costs less than another copy of
        their ancestors' keys."""
        grown = {self.run_of(parent) for parent in self.parents if parent >= 0}
        units: list[Unit] = []
        unit_of_run: list[int] = []
        last = None  # what the runs of the last unit hang on, where another may join them
        for run, (size, before, parent) in enumerate(zip(self.sizes, self.before, self.parents, strict=True)):
            leaf = before > 0 and run not in grown
            if leaf and parent == last and 2 * size * sum(units[-1].sizes) <= SCORES_PER_COPY * before:
                units[-1] = Unit((*units[-1].sizes, size), *units[-1][1:])
            else:
                on = unit_of_run[self.run_of(parent)] if before else -1
                units.append(Unit((size,), before, on, run in grown))
            last = parent if leaf else None
            unit_of_run.append(len(units) - 1)
        return units

    def mask(self, sizes: tuple[int, ...], before: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
        """(Q, K), 0 where a query sees a key and −inf elsewhere. Queries are the tokens of runs of `sizes`, keys their
        `before` common ancestors and themselves: a query sees itself and of the tokens before it the nearest
        `window` − 1 (all, where that is None), but none of another run."""
        key = (sizes, before, window, like.dtype, like.device)
        if key not in self._on:
            on = like.device
            run = torch.cat([torch.full((size,), i, device=on) for i, size in enumerate(sizes)])
            depth = torch.cat([torch.arange(before, before + size, device=on) for size in sizes])
            distance = depth[:, None] - torch.cat([torch.arange(before, device=on), depth])
            seen = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
            if len(sizes) > 1:
                seen[:, before:] &= run[:, None] == run
            self._on[key] = like.new_zeros(seen.shape).masked_fill_(~seen, float("-inf"))
        return self._on[key]

    def on(self, device) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """On a device: the keys of all runs, None where they are the row itself, and where the runs' queries and keys
        begin (one more than runs, int32)."""
        if device not in self._on:
            begins = [torch.tensor([0, *sizes]).cumsum(0).int() for sizes in (self.sizes, self.key_sizes)]
            index = torch.from_numpy(np.concatenate(self.keys)) if any(self.before) else None
            parts = (index, *begins)
            self._on[device] = tuple(x if x is None else x.to(device, non_blocking=True) for x in parts)
        return self._on[device]


def part(forest: Forest, sequences: Sequence[int], tokens: int) -> tuple[np.ndarray, list[list[int]], list[int]]:
    """What is left of a forest of which only some sequences stay, the first `tokens` of each: the indices of its
    tokens, their runs, and where the sequences end among them."""
    paths = [forest.paths[i][:tokens] for i in sequences]
    index = np.unique(np.concatenate(paths))
    parents = np.arange(-1, sum(forest.sizes) - 1)
    parents[forest.starts] = forest.parents
    left = np.where(parents[index] < 0, -1, np.searchsorted(index, parents[index]))
    starts = np.union1d([0], np.flatnonzero(left != np.arange(-1, len(index) - 1)))  # not behind their parents
    sizes = np.diff([*starts, len(index)])
    runs = [[int(size), int(left[start])] for size, start in zip(sizes, starts, strict=True)]
    return index, runs, np.searchsorted(index, [path[-1] for path in paths]).tolist()
