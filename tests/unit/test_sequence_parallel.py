"""How a row's tokens, scored positions and heads are dealt out to the ranks that share it."""

import numpy as np
import pytest
from errors import refused

from mdpo.forward.sequence_parallel import deal, head_shares


def test_the_example_of_five_tokens():
    assert deal(np.array([2, 3]), 5, 2).tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("positions", "n", "size", "order"),
    [
        ([], 4, 2, [[0, 1], [2, 3]]),
        ([0], 1, 4, [[0], [1], [1], [1]]),  # shorter than the ranks: the others have no token
        ([3, 4, 5], 6, 3, [[0, 3], [1, 4], [2, 5]]),  # all scored ones at the end, one for each rank
        ([0, 0, 0, 1], 4, 2, [[0, 2], [1, 3]]),  # 0 counts three times
        ([0, 1, 2, 3], 4, 2, [[0, 1], [2, 3]]),
    ],
)
def test_scored_positions_are_dealt_out_first(positions, n, size, order):
    assert deal(np.array(positions, int), n, size).tolist() == order


def test_every_token_once_and_as_many_scored_ones_for_each():
    rng = np.random.default_rng(0)
    for _ in range(300):
        n, size = int(rng.integers(1, 60)), int(rng.integers(1, 9))
        positions = rng.integers(0, n, int(rng.integers(0, 2 * n)))
        order = deal(positions, n, size)
        assert order.shape == (size, -(-n // size))
        assert sorted(order[order < n].tolist()) == list(range(n)) and (order <= n).all()
        most = np.bincount(positions, minlength=1).max(initial=1)
        counts = [np.isin(positions, own).sum() for own in order]
        if len(positions) and len(np.unique(positions)) <= n // 2:  # where no rank runs out of places
            assert max(counts) <= len(positions) / size + most


@pytest.mark.parametrize(
    ("heads", "key_heads", "size", "shares"),
    [
        (8, 8, 2, [((0, 4), (0, 4), None), ((4, 8), (4, 8), None)]),
        (8, 4, 2, [((0, 4), (0, 2), None), ((4, 8), (2, 4), None)]),
        (8, 2, 4, [((0, 2), (0, 1), None), ((2, 4), (0, 1), None), ((4, 6), (1, 2), None), ((6, 8), (1, 2), None)]),
        (9, 3, 2, [((0, 4), (0, 2), [0, 0, 0, 1]), ((4, 9), (1, 3), [0, 0, 1, 1, 1])]),
        (6, 2, 4, [((0, 1), (0, 1), None), ((1, 3), (0, 1), None), ((3, 4), (1, 2), None), ((4, 6), (1, 2), None)]),
    ],
)
def test_shares_of_heads(heads, key_heads, size, shares):
    found = head_shares(heads, key_heads, size)
    assert [((s.queries.start, s.queries.stop), (s.keys.start, s.keys.stop), s.key_of_query) for s in found] == shares


def test_each_query_head_has_its_own_key_head():
    for heads, key_heads in ((32, 8), (9, 3), (14, 2), (28, 4), (40, 8), (12, 1), (16, 16)):
        for size in range(1, heads + 1):
            seen = []
            for share in head_shares(heads, key_heads, size):
                queries, keys = (list(range(s.start, s.stop)) for s in (share.queries, share.keys))
                taken = share.key_of_query or [i // (len(queries) // len(keys)) for i in range(len(queries))]
                seen += [(query, keys[key]) for query, key in zip(queries, taken, strict=True)]
            assert seen == [(head, head // (heads // key_heads)) for head in range(heads)]


def test_more_ranks_than_heads_are_refused():
    with refused("parallelism_config", "4", "3"):
        head_shares(3, 3, 4)
