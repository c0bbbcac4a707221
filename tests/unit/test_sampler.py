"""The order of training pairs: a permutation, prompts together, the longest first, the same after a resume."""

from itertools import chain

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard, skip_first_batches
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CHATML, agent_rows, tokenizer_for
from torch.utils.data import BatchSampler, DataLoader
from trainers import mdpo_trainer

from mdpo.config.schema import MDPOConfig
from mdpo.data.sampler import AHEAD, FIRST_STEPS, LongestFirst, filled, longest_first, pair_tokens, prompt_groups
from mdpo.data.sequence_counts import token_totals
from mdpo.data.tokenize import side_lengths
from mdpo.types import distinct_tokens

SAME = {"derandomize": True, "deadline": None, "database": None}  # the same examples each time


@pytest.mark.parametrize(
    "parts, size, bins",
    [
        ([[1, 2, 3], [4, 5], [6]], 4, [[1, 2, 3, 6], [4, 5]]),
        ([[1, 2, 3], [4, 5]], 4, [[1, 2, 3, 4], [5]]),  # none fits: one is cut
        ([[1], [2], [3]], 2, [[1, 2], [3]]),
        ([[1, 2, 3, 4, 5], [6], [7, 8, 9]], 2, [[1, 2], [3, 4], [7, 8], [5, 6], [9]]),  # whole bins at once
        ([[1, 2], [3, 4], [5]], 3, [[1, 2, 5], [3, 4]]),
        ([[1, 2], [3, 4], [5, 6]], 3, [[1, 2, 3], [4, 5, 6]]),
        ([[1, 2, 3]], 1, [[1], [2], [3]]),
        ([], 4, []),
    ],
)
def test_bins_by_hand(parts, size, bins):
    assert list(filled(parts, size)) == bins
    assert list(filled(iter(parts), size, ahead=0))[:1] == (
        [chain_of(parts)[:size]] if parts else []
    )  # nothing is sought


def chain_of(parts):
    return list(chain(*parts))


group_sizes = st.lists(st.integers(1, 9), min_size=1, max_size=30)


@given(group_sizes, st.integers(1, 8))
@settings(**SAME)
def test_a_part_is_cut_where_no_other_fits(sizes, size):
    """What a part has over whole bins is in two bins only where none of the parts left had room beside the first."""
    parts = [[(i, k) for k in range(n)] for i, n in enumerate(sizes)]
    bins = list(filled(parts, size, len(parts)))
    assert sorted(chain_of(bins)) == chain_of(parts)
    assert all(len(b) == size for b in bins[:-1]) and 0 < len(bins[-1]) <= size
    over = {i: n % size for i, n in enumerate(sizes) if n % size}
    places = {
        i: [j for j, b in enumerate(bins) for part, k in b if part == i and k >= sizes[i] - over[i]] for i in over
    }
    cut = {i for i in over if len(set(places[i])) > 1}
    for i in cut:
        for j in sorted(set(places[i]))[:-1]:
            room = places[i].count(j)
            later = [k for k in over if k != i and min(places[k]) > j and k not in cut]
            assert all(over[k] > room for k in later)
    assert len(cut) <= len(bins) - 1


def order_without_groups(n, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(n)


def test_the_longest_pairs_come_first_once_and_nothing_is_lost():
    distinct, side = np.array([5, 9, 7, 8, 1, 6]), np.array([1, 2, 3, 4, 9, 5])
    order = longest_first(np.arange(6), distinct, np.array([1, 9, 3, 4, 2, 5]), 2)
    assert order.tolist() == [1, 2, 3, 5]  # 9 and 7, then 8 and 6
    order = longest_first(np.arange(6), distinct, side, 2)
    assert order.tolist() == [1, 2, 3, 4]  # pair 4 has the longest side and would not have been among them
    sampler = LongestFirst(distinct, side, 2, seed=3)
    first = list(sampler)
    rest = [i for i in order_without_groups(6, 3, 0).tolist() if i not in (1, 2, 3, 4)]
    assert first == [1, 2, 3, 4, *rest] and list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) == order_without_groups(6, 3, 1).tolist()
    assert list(LongestFirst(distinct, side, 50, seed=3))[0] == 1  # fewer pairs than two steps take


def test_of_each_prompt_one_pair_comes_first():
    """Prompts of 100, 90 and 20 tokens, with answers of 1 to 3: beside another of its own prompt a pair adds its
    answers alone. Of each prompt the longest are pairs 0, 3 and 5, then come 1, 2 and 4; dealt in turns."""
    distinct, groups = np.array([103, 102, 101, 92, 91, 21]), np.array([0, 0, 0, 1, 1, 2])
    assert longest_first(np.arange(6), distinct, distinct, 2, groups).tolist() == [0, 5, 3, 1]
    assert longest_first(np.arange(6), distinct, distinct, 2).tolist() == [0, 2, 1, 3]
    assert list(LongestFirst(distinct, distinct, 4, 0, groups, 2)) == [0, 5, 2, 3, 1, 4]


def rows_of(groups, prompt=30, answer=3):
    """Tokenized pairs, one for each number of a prompt; no two answers begin alike."""
    rows = []
    for i, group in enumerate(groups):
        sides = [[group] * prompt + [10_000 + 2 * i + k] * answer for k in (0, 1)]
        mask = [0] * prompt + [1] * answer
        rows.append({"chosen_ids": sides[0], "rejected_ids": sides[1], "chosen_mask": mask, "rejected_mask": mask,
                     "distinct": distinct_tokens(sides), "prompt_key": f"p{group}"})  # fmt: skip
    return Dataset.from_list(rows)


@given(group_sizes, st.integers(1, 4), st.integers(1, 3), st.integers(0, 2), st.integers(0, 9))
@settings(**SAME)
def test_every_epoch_is_a_permutation_by_groups(sizes, batch, batches, epoch, seed):
    groups = np.repeat(np.arange(len(sizes)), sizes)
    n, step = len(groups), batch * batches
    distinct = np.arange(n) % 7 + 5

    def order(batch_pairs):
        sampler = LongestFirst(distinct, distinct, step, seed, groups, batch_pairs)
        sampler.set_epoch(epoch)
        return list(sampler)

    got = order(batch)
    assert sorted(got) == list(range(n)) and order(batch) == got
    steps = [got[i : i + step] for i in range(0, n, step)]
    for pairs_of_one in range(1, step + 1):  # the pairs of a step are the same whatever a device holds
        if step % pairs_of_one == 0:
            other = order(pairs_of_one)
            assert [sorted(s) for s in steps] == [sorted(other[i : i + step]) for i in range(0, n, step)]
    for number, pairs in enumerate(steps):
        kept = batch if epoch == 0 and number < FIRST_STEPS else 0
        in_batches = [pairs[i : i + batch] for i in range(kept, len(pairs), batch)]
        inside = [set(groups[b].tolist()) for b in in_batches]
        counts = np.bincount(groups[pairs[kept:]], minlength=len(sizes))
        least = sum(-(-count // batch) for count in counts)
        assert sum(map(len, inside)) - least <= max(len(in_batches) - 1, 0)  # at most one cut for each boundary


@given(group_sizes, st.integers(1, 4), st.integers(1, 3), st.integers(0, 2), st.integers(0, 9))
@settings(**SAME)
def test_steps_made_one_by_one_are_those_made_at_once(sizes, batch, batches, epoch, seed):
    """The reference implementation groups the whole epoch before its first step."""
    groups = np.repeat(np.arange(len(sizes)), sizes)
    n, step_pairs = len(groups), batch * batches
    rng = np.random.default_rng([seed, epoch])
    place = np.argsort(rng.permutation(len(sizes)))
    order = np.lexsort((rng.permutation(n), place[groups]))
    sampler = LongestFirst(np.arange(n) % 7, np.arange(n) % 5, step_pairs, seed, groups, batch)
    sampler.set_epoch(epoch)
    first = order[:0]
    if epoch == 0:
        first = longest_first(order, sampler.distinct, sampler.side, step_pairs, groups)
        order = order[~np.isin(order, first)]
    if len(sizes) == n:
        assert list(sampler) == [*first, *order]
        return
    pairs, out = [*first, *chain_of(filled(sampler._parts(order.tolist()), step_pairs))], []
    for begin in range(0, n, step_pairs):
        step = pairs[begin : begin + step_pairs]
        kept = batch if begin < len(first) else 0
        parts = sorted(sampler._parts(step[kept:]), key=len, reverse=True)
        out += [*step[:kept], *chain_of(filled(parts, batch, len(parts)))]
    assert list(sampler) == out


def test_the_first_step_waits_for_no_other():
    """Of 1000 prompts of two pairs no more than those of the first step and AHEAD beyond it are looked at."""
    groups, looked_at = np.repeat(np.arange(1000), 2), []
    sampler = LongestFirst(np.full(2000, 5), np.full(2000, 5), 4, 0, groups, 2)
    sampler.set_epoch(1)
    runs = sampler._runs
    sampler._runs = lambda order: (looked_at.append(run) or run for run in runs(order))
    next(iter(sampler))
    assert 0 < len(looked_at) <= 4 + AHEAD


@given(st.integers(1, 40), st.integers(1, 4), st.integers(0, 2), st.integers(0, 9))
@settings(**SAME)
def test_without_shared_prompts_the_order_is_that_without_groups(n, batch, epoch, seed):
    rng = np.random.default_rng(seed)
    distinct, side = rng.integers(1, 9, n), rng.integers(1, 9, n)
    orders = []
    for groups in (None, np.arange(n)):
        sampler = LongestFirst(distinct, side, 2 * batch, seed, groups, batch)
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[1]
    wanted = order_without_groups(n, seed, epoch)
    if epoch == 0:
        first = longest_first(wanted, distinct, side, 2 * batch)
        wanted = np.concatenate([first, wanted[~np.isin(wanted, first)]])
    assert orders[0] == wanted.tolist()


def test_groups_of_the_size_of_a_micro_batch_are_whole_on_every_rank():
    """24 prompts of 4 pairs, 2 ranks of 4 pairs, 2 micro-batches a step: as accelerate deals them."""
    groups = np.random.default_rng(0).permutation(np.repeat(np.arange(24), 4))
    _, groups = np.unique(groups, return_inverse=True)
    sampler = LongestFirst(np.full(96, 5), np.full(96, 5), 16, 1, groups, 4)
    sampler.set_epoch(1)
    seen = []
    for rank in (0, 1):
        for batch in BatchSamplerShard(BatchSampler(sampler, 4, False), 2, rank):
            assert len(batch) == 4 and len(set(groups[batch].tolist())) == 1
            seen += batch
    assert sorted(seen) == list(range(96))
    plain = LongestFirst(np.full(96, 5), np.full(96, 5), 16, 1)
    plain.set_epoch(1)
    assert any(len(set(groups[batch].tolist())) > 1 for batch in BatchSampler(plain, 4, False))


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("done", [1, 3, 7])
def test_a_resume_in_mid_epoch_has_the_same_tail(epoch, done):
    groups = np.repeat(np.arange(9), [1, 2, 3, 4, 5, 1, 1, 2, 4])

    def batches(skip):
        sampler = LongestFirst(np.arange(23), np.arange(23), 4, 5, groups, 2)  # as a new process makes it
        sampler.set_epoch(epoch)
        loader = DataLoader(list(range(23)), batch_size=2, sampler=sampler)
        return [batch.tolist() for batch in (skip_first_batches(loader, skip) if skip else loader)]

    assert batches(done) == batches(0)[done:]


def test_what_the_key_changes():
    """`group_pairs`: with it micro-batches of two have one prompt, so that 33 + 3 · 3 of 72 tokens are computed."""
    rows = rows_of([0, 1, 2, 3] * 4)

    def tokens(group_pairs):
        args = MDPOConfig("out", use_cpu=True, bf16=False, per_device_train_batch_size=2,
                          gradient_accumulation_steps=1, group_pairs=group_pairs)  # fmt: skip
        sampler = LongestFirst.of(rows, args)
        sampler.set_epoch(1)
        order = list(sampler)
        return [
            distinct_tokens([rows[i][f"{side}_ids"] for i in order[k : k + 2] for side in ("chosen", "rejected")])
            for k in range(0, 16, 2)
        ], order

    grouped, order = tokens(True)
    apart, plain = tokens(False)
    assert grouped == [30 + 4 * 3] * 8 and max(apart) == 2 * 36 and sum(apart) > sum(grouped)
    assert plain == order_without_groups(16, 42, 1).tolist() != order


@pytest.mark.parametrize("on", [True, False])
def test_the_trainer_s_batches(on, tmp_path, monkeypatch):
    """Four prompts of two pairs each, far apart in the dataset, in micro-batches of two."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    rows = [{**row, "rejected": [*row["rejected"][:3], {"role": "assistant", "content": end}]}
            for end in ("No.", "So it is.") for row in agent_rows(4)]  # fmt: skip
    tokenizer = tokenizer_for(CHATML, "byte", eos="<|im_end|>")
    trainer = mdpo_trainer(tmp_path, tokenizer, rows, per_device_train_batch_size=2, group_pairs=on)
    loader, prompts = trainer.get_train_dataloader(), trainer.train_dataset["prompt_key"]
    whole = []
    for epoch in (1, 2):
        loader.set_epoch(epoch)  # as Trainer does
        trainer.begin_epoch(epoch)
        batches = [batch.row.tolist() for batch in loader]
        assert sorted(chain_of(batches)) == list(range(8))
        whole += [len({prompts[row] for row in batch}) == 1 for batch in batches]
    assert all(whole) == on


def test_prompts_are_numbered_by_their_first_rows():
    assert prompt_groups(rows_of([7, 3, 7, 5])).tolist() == [0, 1, 0, 2]
    assert prompt_groups(rows_of([7, 3, 7, 5]).remove_columns("prompt_key")).tolist() == [0, 1, 2, 3]


def test_lengths_are_those_of_the_longest_sequence():
    """A row of one sequence a side, one whose chosen side has three, null and missing lengths; and selected."""
    rows = Dataset.from_list([
        {"chosen_ids": [1, 2, 3], "chosen_lengths": [], "rejected_ids": [1], "rejected_lengths": None, "distinct": 3},
        {"chosen_ids": [1, 2, 1, 2, 3, 4, 1], "chosen_lengths": [2, 4, 1], "rejected_ids": [5, 6],
         "rejected_lengths": [1, 1], "distinct": 6},
        {"chosen_ids": [9], "chosen_lengths": [1], "rejected_ids": [8, 8], "rejected_lengths": [], "distinct": 3},
    ])  # fmt: skip
    wanted = [[3, 1], [4, 1], [1, 2]]
    assert side_lengths(rows).tolist() == wanted
    assert side_lengths(rows.select([2, 0, 1])).tolist() == [wanted[i] for i in (2, 0, 1)]
    assert side_lengths(rows.select(range(1, 3))).tolist() == wanted[1:]
    assert side_lengths(rows.remove_columns(["chosen_lengths", "rejected_lengths"])).tolist() == [
        [3, 1],
        [7, 2],
        [1, 2],
    ]
    assert side_lengths(rows.select([])).shape == (0, 2)
    assert token_totals(rows) == (3 + 1 + 7 + 2 + 1 + 2, 12)
    assert token_totals(rows.select([2, 0])) == (3 + 4, 6) and token_totals(rows.select([])) == (0, 0)
    distinct, side = pair_tokens(rows)
    assert distinct.tolist() == [3, 6, 3] and side.tolist() == [3, 4, 2]
