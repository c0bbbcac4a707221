"""The order of training pairs: shuffled again each epoch, the longest ones first of all."""

import numpy as np
from datasets import Dataset
from torch.utils.data import Sampler

from mdpo.data.tokenize import side_lengths

FIRST_STEPS = 2  # the optimizer's states come with the first step, so that the second one takes the most memory


class LongestFirst(Sampler[int]):
    """A permutation for each epoch, from `seed` and epoch. The first steps of all, of `step_pairs` pairs, take the
    longest: what memory cannot hold ends the run in its first minute and not in hour nine. `distinct` and `side` are
    (n,) tokens of a pair: each shared one once, which is what it costs in packed rows, and its longer side, which
    padding brings all to. One order serves both layouts, whatever the pairs per device."""

    def __init__(self, distinct: np.ndarray, side: np.ndarray, step_pairs: int, seed: int):
        self.distinct, self.side, self.step_pairs, self.seed, self.epoch = distinct, side, step_pairs, seed, 0

    def __len__(self) -> int:
        return len(self.distinct)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.distinct))
        if self.epoch == 0:
            order = longest_first(order, self.distinct, self.side, self.step_pairs)
        return iter(order.tolist())


def longest_first(order: np.ndarray, distinct: np.ndarray, side: np.ndarray, step_pairs: int) -> np.ndarray:
    """`order` with the longest pairs at its beginning, dealt to the first steps in turns, longest first in each. The
    pair with the longest side is the last one of them, if it is not among them already: a padded batch needs just one.
    Example: distinct [5, 9, 7, 8, 1, 6], 2 pairs a step -> pairs 1 and 2 (9, 7), then 3 and 5 (8, 6), then the others.
    """
    longest = order[np.argsort(-distinct[order], kind="stable")][: FIRST_STEPS * step_pairs]
    dealt = np.concatenate([longest[i::FIRST_STEPS] for i in range(FIRST_STEPS)])
    widest = order[np.argmax(side[order])]
    if widest not in dealt:
        dealt[-1] = widest
    return np.concatenate([dealt, order[~np.isin(order, dealt)]])


def pair_tokens(rows: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """(distinct, side) of tokenized pairs, (n,) each, int64."""
    sides = side_lengths(rows)
    return sides.sum(1) - np.asarray(rows["shared_len"], np.int64), sides.max(1)
