"""Sequence parallel: one packed row on the ranks of a group, its tokens dealt out evenly (Ulysses, arXiv 2309.14509).

What treats tokens one by one computes a rank's own; attention computes whole rows, of a share of the heads: before it
each rank sends its tokens' queries, keys and values of a head to that head's rank, and after it gets its tokens'
outputs of all heads. Scored positions are dealt out first, so that each rank's LM head has as much to do.

All ranks of a group have the same batch, and after `collect` the same numbers. Each rank's gradients are those of its
own tokens: their sum is the gradient of the batch, and as whoever averages over ranks divides that sum, `collect`
multiplies it by their number.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import xxhash

from mdpo.errors import UserError
from mdpo.ranks import gathered, rank, ranks, row_ranks
from mdpo.types import PairBatch


@dataclass(frozen=True)
class Group:
    """The `size` ranks that share each row, of which this is number `rank`."""

    size: int
    rank: int
    of_torch: Any = None

    @classmethod
    def of_this_rank(cls, timeout_s: float) -> "Group | None":
        """None where each rank has rows of its own. All ranks call it together; they wait for each other `timeout_s`
        at most."""
        size, timeout = row_ranks(), timedelta(seconds=timeout_s)
        if size == 1:
            return None
        groups = [dist.new_group([*range(first, first + size)], timeout) for first in range(0, ranks(), size)]
        return cls(size, rank() % size, groups[rank() // size])

    def refuse_other_rows(self, batch: PairBatch) -> None:
        """Raises UserError where ranks of a row have other batches. All ranks call it together."""
        digests = gathered(xxhash.xxh3_64_hexdigest(batch.input_ids.cpu().numpy().tobytes()))
        if any(len({*digests[first : first + self.size]}) > 1 for first in range(0, len(digests), self.size)):
            raise UserError(
                "parallelism_config: ranks that share rows were given other pairs. Of a dataset with a loader or a "
                "sampler of its own, give all ranks of a group the same part: its number is rank // sp_size.",
                "parallelism_config",
            )


class Spread:
    """Which rank of a group has which tokens and scored positions of a packed batch (N tokens, U scored positions).

    `inputs` are what this rank gives its model: input_ids and position_ids (1, N_r), logp_position and label (U_r,).
    """

    def __init__(self, batch: PairBatch, group: Group):
        self.group = group
        n, device, positions = batch.input_ids.size(1), batch.input_ids.device, batch.logp_position.cpu().numpy()
        # Each rank has the row's largest position too, for no token: some RoPE (dynamic, longrope) goes by it.
        order = np.pad(deal(positions, n, group.size), ((0, 0), (0, 1)), constant_values=n)
        place = np.empty(n + 1, np.int64)  # of each token among all that the ranks have; the last one is no token
        place[order] = np.arange(order.size).reshape(order.shape)
        owner = place[positions] // order.shape[1]
        self.scored = np.bincount(owner, minlength=group.size).tolist()
        first = np.cumsum([0, *self.scored])[:-1]
        by_owner = np.argsort(owner, kind="stable")
        scored_place = np.empty(len(positions), np.int64)
        scored_place[by_owner] = np.arange(len(positions)) + np.repeat(
            max(self.scored) * np.arange(group.size) - first, self.scored
        )
        arrays = (order[group.rank], order.reshape(-1), place[:n], scored_place, np.flatnonzero(owner == group.rank))
        self._own, self._order, self._place, self._scored_place, mine = (torch.from_numpy(x).to(device) for x in arrays)
        last = {"input_ids": batch.input_ids[:, :1], "position_ids": batch.position_ids.amax(1, keepdim=True)}
        self.inputs = {name: torch.cat([batch[name], x], 1)[:, self._own] for name, x in last.items()}
        self.inputs["logp_position"] = self._place[batch.logp_position[mine]] - group.rank * order.shape[1]
        self.inputs["label"] = batch.label[mine]
        self.own = self._own[self._own < n]  # this rank's tokens, as indices in the row; those for none come behind

    def collect(self, x: torch.Tensor) -> torch.Tensor:
        """(…, U) of all scored positions, from each rank's own (…, U_r)."""
        padded = torch.nn.functional.pad(x, (0, max(self.scored) - x.size(-1)))
        parts = _Gather.apply(padded, self.group)
        return parts.movedim(0, -2).flatten(-2)[..., self._scored_place]

    def part(self, x: torch.Tensor) -> torch.Tensor:
        """(N_r,) of this rank's tokens from the row's (N,); 0 for no token."""
        return _with_none(x, 0)[self._own]

    def total(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of each rank's `x`."""
        return _Gather.apply(x, self.group).sum(0)

    def heads_of_row(self, *states: torch.Tensor) -> list[torch.Tensor]:
        """Query, key and value (1, heads of this rank, N, D), from those of this rank's tokens (1, heads, N_r, D)."""
        query, key, _ = states
        shares, tokens = head_shares(query.size(1), key.size(1), self.group.size), query.size(2)
        sent = [torch.cat([x[0, part].reshape(-1) for x, part in zip(states, s.parts, strict=True)]) for s in shares]
        own = shares[self.group.rank]
        shapes = [(part.stop - part.start, tokens, x.size(-1)) for x, part in zip(states, own.parts, strict=True)]
        sizes = [prod(shape) for shape in shapes]
        pieces = [x.split(sizes) for x in exchange(sent, [(sum(sizes),)] * self.group.size, self.group)]
        rows = [
            torch.cat([piece[i].view(shape) for piece in pieces], 1)[None, :, self._place]
            for i, shape in enumerate(shapes)
        ]
        if own.key_of_query is None:
            return rows
        index = torch.tensor(own.key_of_query, device=query.device)
        return [rows[0], *(x.index_select(1, index) for x in rows[1:])]

    def all_heads(self, out: torch.Tensor, heads: int) -> torch.Tensor:
        """(1, N_r, heads, D) of this rank's tokens, from (1, N, heads of this rank, D)."""
        shares = pairwise(_cuts(heads, self.group.size))
        sent = list(_with_none(out, 1)[0, self._order].chunk(self.group.size))
        shapes = [(len(sent[0]), stop - start, out.size(-1)) for start, stop in shares]
        return torch.cat(exchange(sent, shapes, self.group), 1)[None]


def deal(positions: np.ndarray, n: int, size: int) -> np.ndarray:
    """(size, ⌈n / size⌉) indices of a row's tokens for each rank, in the row's order, then n for no token. Each rank
    has as many of the scored `positions`, in the row's order, as can be; a position that is scored several times
    counts as often.

    Example, 5 tokens for 2 ranks, 2 and 3 scored: [[0, 1, 2], [3, 4, 5]].
    """
    each = -(-n // size)
    scored, times = np.unique(positions, return_counts=True)
    before, cuts = np.cumsum(times) - times, [0]
    for i in range(1, size + 1):
        wanted = int(np.searchsorted(before, times.sum() * i / size))
        cuts.append(min(max(wanted, len(scored) - each * (size - i)), cuts[-1] + each))
    rest, order, begin = np.setdiff1d(np.arange(n), scored), np.full((size, each), n), 0
    for i in range(size):
        own = scored[cuts[i] : cuts[i + 1]]
        end = begin + each - len(own)
        own = np.sort(np.concatenate([own, rest[begin:end]]))
        order[i, : len(own)], begin = own, end
    return order


class HeadShare(NamedTuple):
    """A rank's heads: slices of query and of key heads, and for each query head which of these key heads it takes, None
    where as many follow each other on each."""

    queries: slice
    keys: slice
    key_of_query: list[int] | None

    @property
    def parts(self) -> tuple[slice, slice, slice]:
        """Of query, key and value."""
        return self.queries, self.keys, self.keys


def head_shares(heads: int, key_heads: int, size: int) -> list[HeadShare]:
    """Query heads as evenly as can be. Ranks between which a key head's queries are divided both get it.

    Example, 9 heads of 3 key heads for 2 ranks: heads 0–3 with keys 0–1, each query's own [0, 0, 0, 1], and 4–8 with
    keys 1–2, [0, 0, 1, 1, 1]. Raises UserError where there are fewer heads than ranks.
    """
    if heads < size:
        raise UserError(
            f"parallelism_config: sp_size {size} is more than the {heads} heads of attention, of which each rank takes "
            "some.",
            "parallelism_config",
        )
    shared, shares = heads // key_heads, []
    for start, stop in pairwise(_cuts(heads, size)):
        queries = range(start, stop)
        keys = [head // shared for head in queries]
        low, count = keys[0], len(set(keys))
        own = [key - low for key in keys]
        even = own == [i // (len(own) // count) for i in range(len(own))]
        shares.append(HeadShare(slice(queries.start, queries.stop), slice(low, low + count), None if even else own))
    return shares


def _cuts(heads: int, size: int) -> list[int]:
    """Where each rank's query heads begin, and where the last one's end."""
    return [heads * i // size for i in range(size + 1)]


def _with_none(x: torch.Tensor, dim: int) -> torch.Tensor:
    """With a zero behind the last token."""
    return torch.cat([x, torch.zeros_like(x.narrow(dim, 0, 1))], dim)


# ------------------------------------------------------------------------------------------------ between the ranks


def exchange(sent: Sequence[torch.Tensor], shapes: Sequence[tuple[int, ...]], group: Group) -> list[torch.Tensor]:
    """What each rank of the group has sent to this one, of these shapes; `sent` goes to each."""
    sizes, expected = [x.numel() for x in sent], [prod(shape) for shape in shapes]
    got = _AllToAll.apply(torch.cat([x.reshape(-1) for x in sent]), sizes, expected, group)
    return [x.view(shape) for x, shape in zip(got.split(expected), shapes, strict=True)]


class _AllToAll(torch.autograd.Function):
    """Numbers in pieces of `sizes` to each rank of a group, for those of `expected` sizes from each."""

    @staticmethod
    def forward(ctx, numbers, sizes, expected, group):
        ctx.call = expected, sizes, group
        got = numbers.new_empty(sum(expected))
        dist.all_to_all_single(got, numbers, expected, sizes, group=group.of_torch)
        return got

    @staticmethod
    def backward(ctx, grad):
        return _AllToAll.apply(grad.contiguous(), *ctx.call), None, None, None


class _Gather(torch.autograd.Function):
    """(ranks of the group, …) from each rank's (…). Backward is for a result that all ranks treat alike, and for
    gradients that are averaged over ranks."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size)]
        dist.all_gather(parts, x.contiguous(), group=group.of_torch)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx, grad):
        return grad[ctx.group.rank] * ctx.group.size, None
