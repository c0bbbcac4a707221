"""The token forest by hand, and against a trie of dictionaries, token by token."""

import random

import numpy as np
import pytest
import torch
from packed_pairs import AWKWARD, row_of, sequences

from mdpo.forward.collators import PackedCollator
from mdpo.forward.forest import SCORES_PER_COPY, Forest, part, plant

INF = float("-inf")


def forest_of(*texts: list[int]):
    return plant([np.array(ids, np.int64) for ids in texts])


# ------------------------------------------------------------------------------------------------------------- by hand


def test_the_module_s_example():
    row = forest_of([5, 6, 7, 8], [5, 6, 9], [5, 6], [3])
    assert row.ids.tolist() == [5, 6, 7, 8, 9, 3]
    assert row.positions.tolist() == [0, 1, 2, 3, 2, 0]
    assert (row.runs, row.ends) == ([[4, -1], [1, 1], [1, -1]], [3, 4, 1, 5])


def test_three_pairs_over_one_prompt():
    """Prompt 1 2; answers a = 3 4 5, b = 3 6, c = 7. Pairs (a, b), (b, c), (c, a): one tree of 1 2 3 4 5, on whose 3
    hangs 6 and on whose 2 hangs 7, and each answer is in two sides."""
    a, b, c = [1, 2, 3, 4, 5], [1, 2, 3, 6], [1, 2, 7]
    batch = PackedCollator()([row_of([x], [y], i, 2) for i, (x, y) in enumerate([(a, b), (b, c), (c, a)])])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 2]]
    assert batch.runs == [[5, -1], [1, 2], [1, 1]]
    # sequences: a, b, c of the chosen sides, then b, c, a of the rejected ones
    assert (batch.ends, batch.lengths) == ([4, 5, 6, 5, 6, 4], [5, 4, 3, 4, 3, 5])
    # supervised from 2 on: of every four tokens the first two, and the last one. a: 5 (t 4); b: 6 (t 3); c: 7 (t 2)
    assert batch.logp_position.tolist() == [3, 2, 1] and batch.label.tolist() == [5, 6, 7]
    assert batch.unique_index.tolist() == [0, 1, 2, 1, 2, 0]
    assert batch.pair.tolist() == [0, 1, 2, 0, 1, 2] and batch.side.tolist() == [0, 0, 0, 1, 1, 1]
    assert batch.sequence.tolist() == [0, 1, 2, 3, 4, 5] and batch.sequence_position.tolist() == [3, 2, 1, 2, 1, 3]
    assert (batch.n_pairs, batch.pair_lengths, batch.n_tokens, batch.n_distinct) == (3, [9, 7, 8], 24, 7)
    forest = Forest(batch.runs, batch.ends)
    assert forest.before == [0, 3, 2] and forest.key_sizes == [5, 4, 3]
    assert [keys.tolist() for keys in forest.keys] == [[0, 1, 2, 3, 4], [0, 1, 2, 5], [0, 1, 6]]
    assert forest.counts.tolist() == [[6, 6, 4, 2, 2, 2, 2]]


def test_a_side_of_two_sequences():
    """Chosen 1 2 3 and 1 4, in each of which the first supervised token is the sequence's first: left out. A turn never
    goes on in the next sequence."""
    row = {
        **{"chosen_ids": [1, 2, 3, 1, 4], "chosen_mask": [0, 0, 1, 1, 1], "chosen_lengths": [3, 2]},
        **{"rejected_ids": [1, 2], "rejected_mask": [1, 1], "rejected_lengths": []},
    }
    batch = PackedCollator()([row])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4]] and batch.position_ids.tolist() == [[0, 1, 2, 1]]
    assert (batch.runs, batch.ends, batch.sequences) == ([[3, -1], [1, 0]], [2, 3, 1], [2, 1])
    assert batch.logp_position.tolist() == [1, 0, 0] and batch.label.tolist() == [3, 4, 2]
    assert batch.side.tolist() == [0, 0, 1] and batch.sequence.tolist() == [0, 1, 2]
    assert batch.sequence_position.tolist() == [1, 0, 0]
    assert batch.turn.tolist() == [0, 1, 0] and batch.turn_tokens.tolist() == [[1, 1], [1, 0]]
    assert (batch.pair_lengths, batch.n_distinct, batch.sides) == ([7], 4, [0, 0, 1])


def test_branches_come_from_the_last_token_backward_and_then_in_their_order():
    """On 1 2 3 4 hang 5 behind 2, 6 behind 3, 7 behind 2 again, and 8 on 6's own branch."""
    row = forest_of([1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 6, 9], [1, 2, 7], [1, 2, 3, 6, 8])
    assert row.ids.tolist() == [1, 2, 3, 4, 6, 9, 8, 5, 7]
    assert row.positions.tolist() == [0, 1, 2, 3, 3, 4, 4, 2, 2]
    assert row.runs == [[4, -1], [2, 2], [1, 4], [1, 1], [1, 1]]
    assert row.ends == [3, 7, 5, 8, 6]


def test_a_longer_sequence_goes_on_where_an_earlier_one_ended():
    row = forest_of([1, 2], [1, 3], [1, 2, 4])
    assert (row.ids.tolist(), row.runs, row.ends) == ([1, 2, 4, 3], [[3, -1], [1, 0]], [1, 3, 2])


def test_masks_by_hand():
    like, forest = torch.zeros(1), Forest([])
    assert forest.mask((2,), 2, None, like).tolist() == [[0, 0, 0, INF], [0, 0, 0, 0]]
    assert forest.mask((2,), 2, 2, like).tolist() == [[INF, 0, 0, INF], [INF, INF, 0, 0]]  # itself and one before
    # Two runs of two and one token behind one ancestor: keys are the ancestor, then the three.
    assert forest.mask((2, 1), 1, None, like).tolist() == [[0, 0, INF, INF], [0, 0, 0, INF], [0, INF, INF, 0]]
    assert forest.mask((2, 1), 1, 2, like).tolist() == [[0, 0, INF, INF], [INF, 0, 0, INF], [0, INF, INF, 0]]


def test_short_neighbors_share_a_call():
    """Of 10 ancestors a copy costs 60 scores: 5 and 5 tokens mask 50, a third run of 5 would mask 100. What others hang
    on stays alone; 3 and 2 tokens behind 9 ancestors join again."""
    assert SCORES_PER_COPY == 6
    runs = [[20, -1], [5, 9], [5, 9], [5, 9], [5, 9], [1, 39], [3, 8], [2, 8], [1, -1], [1, -1]]
    units = Forest(runs).units
    assert [unit.sizes for unit in units] == [(20,), (5, 5), (5,), (5,), (1,), (3, 2), (1,), (1,)]
    assert [unit.before for unit in units] == [0, 10, 10, 10, 15, 9, 0, 0]
    assert [unit.parent for unit in units] == [-1, 0, 0, 0, 3, 0, -1, -1]
    assert [unit.grows for unit in units] == [True, False, False, True, False, False, False, False]


# --------------------------------------------------------------------------------------- the reference implementation


def slow_row(texts) -> tuple[list[int], list[int], list[int], list[list[int]]]:
    """ids, positions, each token's parent, and the path of each sequence, from dictionaries of children."""
    root: dict = {}
    for ids in texts:
        node = root
        for token in ids:
            node = node.setdefault(token, {})
    ids, positions, parents, index = [], [], [], {}

    def visit(children, depth, parent):
        for token, grandchildren in children.items():  # in the order of their first use
            index[id(grandchildren)] = here = len(ids)
            ids.append(token)
            positions.append(depth)
            parents.append(parent)
            visit(grandchildren, depth + 1, here)

    visit(root, 0, -1)
    paths = []
    for text in texts:
        node, path = root, []
        for token in text:
            node = node[token]
            path.append(index[id(node)])
        paths.append(path)
    return ids, positions, parents, paths


def parents_of(forest: Forest) -> list[int]:
    parents = list(range(-1, sum(forest.sizes) - 1))
    for start, parent in zip(forest.starts, forest.parents, strict=True):
        parents[start] = parent
    return parents


def random_texts(seed: int) -> list[list[int]]:
    """Up to 12 sequences over few ids, so that they branch often; some are equal, some begin others."""
    pick = random.Random(seed)
    texts = [[pick.randrange(pick.choice([1, 2, 300])) for _ in range(pick.randint(1, 9))] for _ in range(12)]
    texts += [pick.choice(texts)[: pick.randint(1, 9)] + [pick.randrange(2)] * pick.randint(0, 3) for _ in range(6)]
    return pick.sample(texts, pick.randint(1, 12))


def check(texts) -> Forest:
    row, (ids, positions, parents, paths) = forest_of(*texts), slow_row(texts)
    assert (row.ids.tolist(), row.positions.tolist()) == (ids, positions)
    forest = Forest(row.runs, row.ends)
    assert parents_of(forest) == parents and [path.tolist() for path in forest.paths] == paths
    assert all(parent != start - 1 or parent < 0 for start, parent in zip(forest.starts, forest.parents, strict=True))
    assert forest.positions.tolist() == positions
    assert forest.counts[0].tolist() == [sum(i in path for path in paths) for i in range(len(ids))]
    return forest


def test_a_forest_is_the_trie_in_first_use_order():
    for seed in range(300):
        check(random_texts(seed))


@pytest.mark.parametrize("name", AWKWARD)
def test_forests_of_awkward_pairs(name):
    check([ids for ids, _ in sequences(AWKWARD[name])])


@pytest.mark.parametrize("tokens", [1, 3, 1000])
@pytest.mark.parametrize("seed", range(20))
def test_a_part_is_the_forest_of_its_sequences(seed, tokens):
    texts = random_texts(seed)
    row, kept = forest_of(*texts), sorted(random.Random(seed).sample(range(len(texts)), 1 + len(texts) // 2))
    index, runs, ends = part(Forest(row.runs, row.ends), kept, tokens)
    assert index.tolist() == sorted({i for k in kept for i in Forest(row.runs, row.ends).paths[k][:tokens].tolist()})
    left = Forest(runs, ends)
    assert [row.ids[index][path].tolist() for path in left.paths] == [texts[k][:tokens] for k in kept]
    assert left.positions.tolist() == row.positions[index].tolist()
    assert sum(left.sizes) == sum(forest_of(*(texts[k][:tokens] for k in kept)).ids.shape)


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("seed", range(10))
def test_units_see_ancestors_and_themselves(seed, window):
    """The masks of all units, put into one matrix by the indices of their keys, are the trie's own relation."""
    texts = random_texts(seed)
    row, (_, positions, parents, _) = forest_of(*texts), slow_row(texts)
    forest, n = Forest(row.runs, row.ends), len(positions)
    found, at, index = torch.zeros(n, n, dtype=torch.bool), 0, []
    for unit in forest.units:
        own = list(range(at, at := at + sum(unit.sizes)))
        index.append((index[unit.parent][: unit.before] if unit.before else []) + own)
        found[torch.tensor(own)[:, None], torch.tensor(index[-1])] = (
            forest.mask(unit.sizes, unit.before, window, torch.zeros(1)) == 0
        )
    wanted = torch.zeros(n, n, dtype=torch.bool)
    for token in range(n):
        seen = token
        while seen >= 0 and (window is None or positions[token] - positions[seen] < window):
            wanted[token, seen] = True
            seen = parents[seen]
    assert torch.equal(found, wanted)
