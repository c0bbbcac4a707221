"""Log-probs and entropy by token, and of the tokens that end turns: derived by hand, in both layouts, over ranks."""

import pytest
import torch

from mdpo.forward.collators import PackedCollator, PairCollator
from mdpo.forward.token_logps import TokenScores
from mdpo.loss.health import HEALTH, health_columns, health_figures, last_of_turns
from mdpo.loss.metrics import COLUMNS, summarize
from mdpo.loss.pair_tables import OF_OLDER, PairTables

# Chosen of pair 0 has turns of 2 and 1 tokens, its rejected side shares the first; pair 1 has three turns and one.
ROWS = [
    {"chosen_ids": [1, 5, 6, 2, 7, 8], "chosen_mask": [0, 1, 1, 0, 0, 1],
     "rejected_ids": [1, 5, 6, 2, 9], "rejected_mask": [0, 1, 1, 0, 1], "row": 0},
    {"chosen_ids": [1, 4, 2, 4, 2, 4], "chosen_mask": [1, 1, 0, 1, 0, 1],
     "rejected_ids": [1, 3, 3], "rejected_mask": [1, 0, 1], "row": 1},
]  # fmt: skip
LOGPS = -torch.tensor([1.0, 2.0, 3.0, 10.0, 20.0, 30.0, 1.0, 2.0, 5.0, 40.0])
#                      pair 0: a a | b   pair 1: a | b | c    a a | b        a
RATIOS = torch.tensor([0.5, 0.25, -1.0, 0.0, -2.0, -4.0, 0.5, 0.25, -3.0, -1.0])
ENTROPY = torch.arange(10.0)
LAYOUTS = {"packed": PackedCollator(), "padded": PairCollator(0)}


def columns(batch, logps=LOGPS, ratios=RATIOS):
    scores = TokenScores(logps, ENTROPY[: len(logps)])
    return dict(zip(HEALTH, health_columns(batch, scores, logps - ratios), strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_columns_by_hand(layout):
    batch = LAYOUTS[layout](ROWS)
    assert last_of_turns(batch).tolist() == [False, True, True, True, True, True, False, True, True, True]
    found = columns(batch)
    assert {name: values.tolist() for name, values in found.items()} == {
        "chosen_nats": [-6, -60],
        "rejected_nats": [-8, -40],
        "chosen_log_ratio": [-0.25, -6],
        "rejected_log_ratio": [-2.25, -1],
        "chosen_entropy": [0 + 1 + 2, 3 + 4 + 5],
        "stops": [2, 3],
        "stop_nats": [-5, -60],
        "stop_log_ratio": [-0.75, -6],
    }
    assert all(values.dtype == torch.float64 for values in found.values())


def test_figures_by_hand():
    """Six chosen tokens and four rejected ones, five chosen turns."""
    batch = LAYOUTS["packed"](ROWS)
    tokens = {"chosen_tokens": torch.tensor([3.0, 3.0]), "rejected_tokens": torch.tensor([3.0, 1.0])}
    figures = health_figures(columns(batch) | tokens)
    assert {name: value.item() for name, value in figures.items()} == {
        "logps_per_token/chosen": -11,
        "logps_per_token/rejected": -12,
        "log_ratios_per_token/chosen": -6.25 / 6,
        "log_ratios_per_token/rejected": -3.25 / 4,
        "entropy/chosen": 2.5,
        "stop_logps/chosen": -13,
        "stop_log_ratios/chosen": -6.75 / 5,
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_turn_of_weight_0_counts_nowhere_and_other_weights_multiply_nothing(layout):
    """Weights 2 | 0 | 0.5 on pair 1's chosen turns; a turn whose last token weighs 0 ends before it."""
    row = {**ROWS[1], "chosen_weights": [1, 2, 1, 0, 1, 0.5], "rejected_weights": []}
    logps, ratios = -torch.tensor([10.0, 20.0, 30.0, 40.0]), -torch.tensor([1.0, 2.0, 4.0, 8.0])
    found = columns(LAYOUTS[layout]([row]), logps, ratios)
    expected = {"chosen_nats": -40, "chosen_log_ratio": -5, "stops": 2, "stop_nats": -40, "stop_log_ratio": -5}
    assert {name: found[name].item() for name in expected} == expected
    row = {**ROWS[0], "chosen_weights": [1, 1, 0, 1, 1, 1], "rejected_weights": []}
    assert last_of_turns(LAYOUTS[layout]([row])).tolist() == [True, False, True, False, True, True]


def test_ratios_of_one_model_are_exactly_0():
    torch.manual_seed(0)
    logps = -torch.rand(10) * 30
    found = columns(LAYOUTS["packed"](ROWS), logps, torch.zeros(10))
    assert all(found[name].tolist() == [0, 0] for name in HEALTH if name.endswith("log_ratio"))


def test_batches_without_turns_have_no_stops():
    batch = LAYOUTS["padded"](ROWS)
    for name in ("turn", "turn_tokens"):
        del batch[name]
    found = columns(batch)
    assert found["stops"].tolist() == [0, 0] and found["chosen_nats"].tolist() == [-6, -60]
    ones = {f"{side}_tokens": torch.ones(2) for side in ("chosen", "rejected")}
    assert not any("stop" in name for name in health_figures(found | ones))


def test_tables_without_turns_have_no_such_figures():
    table = torch.ones(2, len(COLUMNS), dtype=torch.float64)
    assert not any("per_token" in name or "stop" in name for name in summarize(table))
    assert summarize(torch.cat([table, torch.ones(2, 4).double()], 1))["stop_logps/chosen"] == 1


def test_tables_of_an_older_checkpoint_say_what_they_lack():
    """What lies between the last log and the checkpoint has no such figures: NaN, which the report counts."""
    old = torch.arange(2.0 * (OF_OLDER + 4), dtype=torch.float64).view(2, -1)
    tables = PairTables()
    tables.load_state_dict({"train": [old], "tokens": 7})
    [table] = tables.train
    assert torch.equal(table[:, :OF_OLDER], old[:, :OF_OLDER]) and torch.equal(table[:, len(COLUMNS) :], old[:, -4:])
    assert table[:, OF_OLDER : len(COLUMNS)].isnan().all()
    again = PairTables()
    again.load_state_dict(tables.state_dict())
    assert torch.equal(again.train[0].nan_to_num(-1), table.nan_to_num(-1))
