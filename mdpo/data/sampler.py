"""The order of training pairs: shuffled again each epoch, those of one prompt together, the longest ones first."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice, pairwise

import numpy as np
from datasets import Dataset
from torch.utils.data import Sampler

from mdpo.data.tokenize import side_lengths
from mdpo.data.whole_columns import column, numbered, whole_numbers
from mdpo.ranks import data_rank, data_ranks, row_ranks

FIRST_STEPS = 2  # the optimizer's states come with the first step, so that the second one takes the most memory
AHEAD = 32  # groups among which one is looked for that fills up a step


class LongestFirst(Sampler[int]):
    """A permutation for each epoch, from `seed` and epoch. The first steps of all, of `step_pairs` pairs, take the
    longest: what memory cannot hold ends the run in its first minute and not in hour nine. `distinct` and `side` are
    (n,) tokens of a pair: each shared one once, which is what it costs in packed rows, and its longest sequence, which
    padding brings all to.

    `groups` (n,) numbers the prompts from 0 in the order of their first rows: then prompts are permuted, and the pairs
    of one stay in one micro-batch of `batch_pairs` as far as it holds them. Which pairs a step has depends on
    `step_pairs` and not on `batch_pairs`. Where no prompt has two pairs, the order is that without groups."""

    def __init__(
        self,
        distinct: np.ndarray,
        side: np.ndarray,
        step_pairs: int,
        seed: int,
        groups: np.ndarray | None = None,
        batch_pairs: int = 1,
    ):
        self.distinct, self.side, self.step_pairs, self.seed, self.epoch = distinct, side, step_pairs, seed, 0
        self.groups, self.batch_pairs = np.arange(len(distinct)) if groups is None else groups, batch_pairs

    @classmethod
    def of(cls, rows: Dataset, args) -> "LongestFirst":
        """For tokenized pairs and a trainer's arguments."""
        step_pairs = args.train_batch_size * args.gradient_accumulation_steps * (args.world_size // row_ranks())
        seed = args.seed if args.data_seed is None else args.data_seed
        groups = prompt_groups(rows) if args.group_pairs else None
        return cls(*pair_tokens(rows), step_pairs, seed, groups, args.train_batch_size)

    def __len__(self) -> int:
        return len(self.distinct)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        rng, n_groups = np.random.default_rng([self.seed, self.epoch]), int(self.groups.max(initial=-1)) + 1
        place = np.argsort(rng.permutation(n_groups))  # of each group
        order = np.lexsort((rng.permutation(len(self)), place[self.groups]))
        first = order[:0]
        if self.epoch == 0:
            first = longest_first(order, self.distinct, self.side, self.step_pairs, self.groups)
            order = order[~np.isin(order, first)]
        if n_groups == len(self):
            return iter([*first.tolist(), *order.tolist()])
        return self._grouped(first.tolist(), order)

    def _grouped(self, first: list[int], order: np.ndarray) -> Iterator[int]:
        """`first` and, of `order`, groups that fill up steps; then each step by micro-batches, when it is asked for. Of
        the first steps the first micro-batch stays as it is: the longest pairs, of different prompts."""
        pairs = chain(first, chain.from_iterable(filled(self._runs(order), self.step_pairs)))
        begin = 0
        while step := list(islice(pairs, self.step_pairs)):
            kept = self.batch_pairs if begin < len(first) else 0
            parts = sorted(self._parts(step[kept:]), key=len, reverse=True)
            yield from chain(step[:kept], *filled(parts, self.batch_pairs, len(parts)))
            begin += len(step)

    def _runs(self, order: np.ndarray) -> Iterator[list[int]]:
        """`_parts` of an order in which the pairs of a group follow each other."""
        ends = np.flatnonzero(np.diff(self.groups[order])) + 1
        for begin, end in pairwise(chain([0], ends.tolist(), [len(order)])):
            if end > begin:
                yield order[begin:end].tolist()

    def _parts(self, pairs: list[int]) -> list[list[int]]:
        """Pairs by their groups, in the order of each group's first one."""
        parts: dict[int, list[int]] = {}
        for pair, group in zip(pairs, self.groups[pairs].tolist(), strict=True):
            parts.setdefault(group, []).append(pair)
        return list(parts.values())


def filled(parts: Iterable[list[int]], size: int, ahead: int = AHEAD) -> Iterator[list[int]]:
    """Parts in bins of `size`, all full but for the last. What a part has over whole bins stays in one: a bin takes the
    first of the next `ahead` that it has room for, and cuts the next one where it has room for none.
    Example: [1, 2, 3], [4, 5], [6], size 4 -> [1, 2, 3, 6], [4, 5]; without [6] -> [1, 2, 3, 4], [5].
    """
    rest, waiting, last = iter(parts), list[list[int]](), list[int]()
    while True:
        while len(waiting) < max(ahead, 1) and (part := next(rest, None)) is not None:
            whole = len(part) - len(part) % size
            yield from (part[i : i + size] for i in range(0, whole, size))
            waiting += [part[whole:]] * (whole < len(part))
        if not waiting:
            yield from [last] * bool(last)
            return
        room = size - len(last)
        i = next((i for i, part in enumerate(waiting) if len(part) <= room), None)
        if i is None:
            last, waiting[0] = last + waiting[0][:room], waiting[0][room:]
        else:
            last = last + waiting.pop(i)
        if len(last) == size:
            yield last
            last = []


def longest_first(
    order: np.ndarray, distinct: np.ndarray, side: np.ndarray, step_pairs: int, groups: np.ndarray | None = None
) -> np.ndarray:
    """The longest pairs of `order`, for the first steps: dealt to them in turns, longest first in each. The pair with
    the longest sequence is the last one of them, if it is not among them already: a padded batch needs just one. Of
    each of `groups` (n,) the longest pair comes before all others: a micro-batch of different prompts shares the least,
    so that it takes the most.
    Example: distinct [5, 9, 7, 8, 1, 6], 2 pairs a step -> pairs 1 and 2 (9, 7), then 3 and 5 (8, 6).
    """
    longest = order[np.argsort(-distinct[order], kind="stable")]
    if groups is not None:
        leads = np.zeros(len(longest), bool)
        leads[np.unique(groups[longest], return_index=True)[1]] = True
        longest = np.concatenate([longest[leads], longest[~leads]])
    longest = longest[: FIRST_STEPS * step_pairs]
    dealt = np.concatenate([longest[i::FIRST_STEPS] for i in range(FIRST_STEPS)])
    widest = order[np.argmax(side[order])]
    if widest not in dealt:
        dealt[-1] = widest
    return dealt


def pair_tokens(rows: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """(distinct, side) of tokenized pairs, (n,) each, int64."""
    return whole_numbers(rows, "distinct"), side_lengths(rows).max(1, initial=0)


def prompt_groups(rows: Dataset) -> np.ndarray:
    """(n,) int64: the number of each row's prompt; rows of a dataset without `prompt_key` have one each."""
    if "prompt_key" not in rows.column_names:
        return np.arange(len(rows))
    return numbered(column(rows, "prompt_key"))


@contextmanager
def by_rows(accelerator) -> Iterator[None]:
    """Within it the ranks that share each row count as one for an accelerator: a DataLoader that it prepares gives them
    the same batches."""
    state = accelerator.state
    before = state.num_processes, state.process_index
    state.num_processes, state.process_index = data_ranks(), data_rank()
    try:
        yield
    finally:
        state.num_processes, state.process_index = before
