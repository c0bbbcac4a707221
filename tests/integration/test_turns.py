"""Margins and accuracy by turn: derived by hand, in both layouts, over ranks; their sums give the pair back."""

import pytest
import torch
from tiny import CHATML, agent_rows, tokenizer_for
from trainers import mdpo_trainer, trainer_of
from trl import DPOConfig

from dpo_trainer import DPOTrainer
from mdpo.forward.collators import PackedCollator, PairCollator, unpacked
from mdpo.forward.pair_logps import sum_by_pair
from mdpo.loss.metrics import COLUMNS, deduplicate, mean_over_steps, summarize
from mdpo.loss.turn_metrics import pad_and_cat, turn_figures, turn_rewards
from mdpo.reporting.turn_tables import turn_tables

# Chosen of pair 0 has turns of 2 and 1 tokens, its rejected side shares the first; pair 1 has three turns and one.
ROWS = [
    {"chosen_ids": [1, 5, 6, 2, 7, 8], "chosen_mask": [0, 1, 1, 0, 0, 1],
     "rejected_ids": [1, 5, 6, 2, 9], "rejected_mask": [0, 1, 1, 0, 1], "row": 0},
    {"chosen_ids": [1, 4, 2, 4, 2, 4], "chosen_mask": [1, 1, 0, 1, 0, 1],
     "rejected_ids": [1, 3, 3], "rejected_mask": [1, 0, 1], "row": 1},
]  # fmt: skip
# Log ratios of the scored tokens, chosen sides first. A token at the very start is not scored.
RATIOS = torch.tensor([1.0, 2.0, 3.0, 10.0, 20.0, 30.0, 1.0, 2.0, 5.0, 40.0])
#                      pair 0: a a | b   pair 1: a | b | c    a a | b        a
LAYOUTS = {"packed": PackedCollator(), "padded": PairCollator(0)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_turns_of_tokens(layout):
    batch = LAYOUTS[layout](ROWS)
    assert batch["turn"].tolist() == [0, 0, 1, 0, 1, 2, 0, 0, 1, 0]
    assert batch["turn_tokens"].tolist() == [[2, 1, 0], [1, 1, 1], [2, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rewards_by_turn(layout):
    batch = LAYOUTS[layout](ROWS)
    got = turn_rewards(batch, RATIOS - 7, torch.full_like(RATIOS, -7), beta=0.1)
    wanted = [  # chosen, rejected, tokens of each
        [0.3, 0.3, 2, 2, 0.3, 0.5, 1, 1, 0, 0, 0, 0],
        [1.0, 4.0, 1, 1, 2.0, 0, 1, 0, 3.0, 0, 1, 0],
    ]
    assert got.dtype == torch.float64 and torch.allclose(got, torch.tensor(wanted, dtype=torch.float64), atol=1e-6)


def test_figures_by_hand():
    """Turn 1: pair 0 has 0.3 − 0.3 = 0, pair 1 has 1 − 4 = −3. Turn 2: pair 0 alone, 0.3 − 0.5; turn 3: nobody has it
    on both sides. Whole margins: 0.6 − 0.8 = −0.2 with two turns, 6 − 4 = 2 with three."""
    batch = LAYOUTS["packed"](ROWS)
    figures = turn_figures(turn_rewards(batch, RATIOS, 0 * RATIOS, 0.1), torch.tensor([-0.2, 2.0]).double())
    assert figures == pytest.approx({
        "margins/turn_1": -1.5, "pairs/turn_1": 2, "margins/turn_2": -0.2, "pairs/turn_2": 1,
        "accuracies/2_turns": 0.0, "margins/2_turns": -0.2, "pairs/2_turns": 1,
        "accuracies/3_turns": 1.0, "margins/3_turns": 2.0, "pairs/3_turns": 1,
    })  # fmt: skip
    named = {f"eval_{name}": value for name, value in figures.items()} | {"eval_loss": 1.0, "margins/turn_9": 1.0}
    assert turn_tables(named, "eval_") == {
        "by_turn": [
            {"turn": 1, "margins": pytest.approx(-1.5), "pairs": 2},
            {"turn": 2, "margins": pytest.approx(-0.2), "pairs": 1},
        ],
        "by_number_of_turns": [
            {"turns": 2, "accuracies": 0.0, "margins": pytest.approx(-0.2), "pairs": 1},
            {"turns": 3, "accuracies": 1.0, "margins": pytest.approx(2.0), "pairs": 1},
        ],
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_turn_of_weight_0_is_none(layout):
    """Weights 2 | 0 | 0.5 on pair 1's chosen turns: 2 · 1 and 0.5 · 3, and its third turn is the second."""
    row = {**ROWS[1], "chosen_weights": [1, 2, 1, 0, 1, 0.5], "rejected_weights": []}
    batch = LAYOUTS[layout]([row])
    ratios = torch.tensor([10.0, 20.0, 30.0, 40.0])
    assert batch["turn_tokens"].tolist() == [[1, 1], [1, 0]]
    assert turn_rewards(batch, ratios, 0 * ratios, 0.1).tolist() == [pytest.approx([2.0, 4.0, 1, 1, 1.5, 0, 1, 0])]


@pytest.mark.parametrize("weights", [None, 1 - torch.arange(10) / 16])
def test_turns_add_up_to_the_pair_exactly(weights):
    """With numbers that float32 holds exactly. Tokens counted to the next turn still add up, to other turns."""
    batch = LAYOUTS["packed"](ROWS)
    turns = turn_rewards(batch, RATIOS, 0 * RATIOS, 0.25, weights)
    sums = sum_by_pair(RATIOS, batch, weights)
    assert torch.equal(turns.view(2, -1, 4).sum(1)[:, :2], 0.25 * torch.stack([sums.chosen, sums.rejected], 1))
    wrong = turn_rewards(batch | {"turn": (batch["turn"] + 1) % 3}, RATIOS, 0 * RATIOS, 0.25, weights)
    assert torch.equal(wrong.view(2, -1, 4).sum(1), turns.view(2, -1, 4).sum(1)) and not torch.equal(wrong, turns)


def test_unpacked_keeps_turns():
    packed = LAYOUTS["packed"](ROWS)
    for name in ("turn", "turn_tokens"):
        assert torch.equal(unpacked(packed, 0)[name], LAYOUTS["padded"](ROWS)[name])


def tables(*rows, turns):
    """Tables as of one rank: pairs (number, chosen reward, rejected reward), with turn columns."""
    table = torch.ones(len(rows), len(COLUMNS), dtype=torch.float64)
    for i, row in enumerate(rows):
        for name, value in zip(("row", "chosen_reward", "rejected_reward"), row, strict=True):
            table[i, COLUMNS.index(name)] = value
    return torch.cat([table, torch.tensor(turns, dtype=torch.float64)], 1)


def test_ranks_with_other_numbers_of_turns_and_a_pair_twice():
    """Rank 1's last batch was filled up with pair 0, which counts once."""
    first = tables((0, 3, 1), (1, 0, 4), turns=[[3, 1, 5, 5], [0, 4, 5, 5]])
    second = tables((2, 2, 1), (0, 3, 1), turns=[[1, 1, 2, 2, 1, 0, 2, 2], [3, 1, 5, 5, 0, 0, 0, 0]])
    figures = summarize(deduplicate([first, second]))
    assert figures["rewards/margins"] == pytest.approx((2 - 4 + 1) / 3)
    assert figures["margins/turn_1"] == pytest.approx((2 - 4 + 0) / 3) and figures["pairs/turn_1"] == 3
    assert figures["margins/turn_2"] == 1 and figures["pairs/turn_2"] == 1
    assert figures["accuracies/1_turns"] == 0.5 and figures["pairs/1_turns"] == 2
    # In training figures by turn are over all pairs of all steps, the others means of the steps' means.
    steps = mean_over_steps([[first, second[:1]]])
    assert steps["margins/turn_1"] == pytest.approx((2 - 4 + 0) / 3)
    assert steps["rewards/margins"] == pytest.approx(((2 - 4) / 2 + 1) / 2)
    assert pad_and_cat([first, second]).shape == (4, len(COLUMNS) + 8)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same short training in both layouts; half of the pairs have one turn on the rejected side."""
    tokenizer, rows = tokenizer_for(CHATML, "byte", eos="<|im_end|>"), agent_rows(8)
    for row in rows[::2]:
        row["rejected"] = [*row["rejected"][:1], row["rejected"][3]]
    trainers = [
        mdpo_trainer(tmp_path_factory.mktemp("run"), tokenizer, rows, shared_prefix=on, learning_rate=1e-3)
        for on in (True, False)
    ]
    for trainer in trainers:
        trainer.train()
    return trainers


def test_both_layouts_train_and_evaluate_to_the_same_figures(runs):
    packed, padded = ([*run.state.log_history[:-1], run.evaluate()] for run in runs)
    for got, wanted in zip(packed, padded, strict=True):
        assert set(got) - {"num_distinct_tokens"} == set(wanted)
        by_turn = {k: v for k, v in wanted.items() if "turn" in k}
        assert len(by_turn) == 2 * 2 + 3  # two turns on the chosen side always
        assert {k: got[k] for k in by_turn} == pytest.approx(by_turn, abs=2e-4)
        health = {k: v for k, v in wanted.items() if "per_token" in k or "stop_log" in k or "entropy/" in k}
        assert len(health) == 7 and {k: got[k] for k in health} == pytest.approx(health, abs=2e-4)


def test_the_trainers_turns_add_up_to_its_rewards(runs):
    trainer = runs[0]
    for batch in trainer.get_eval_dataloader():
        trainer.tables.eval.clear()
        trainer.model.eval()
        with torch.no_grad():
            trainer.compute_loss(trainer.model, batch)
        [table] = trainer.tables.eval
        turns = table[:, len(COLUMNS) :].view(len(table), -1, 4).sum(1)
        rewards = table[:, [COLUMNS.index("chosen_reward"), COLUMNS.index("rejected_reward")]]
        logps = table[:, [COLUMNS.index("chosen_logps"), COLUMNS.index("rejected_logps")]]
        # float32 sums of the pair against float64 sums of its turns
        assert ((turns[:, :2] - rewards).abs() <= 1e-5 * 0.1 * logps.abs()).all()
        assert rewards.abs().min() > 1e-3
        tokens = table[:, [COLUMNS.index("chosen_tokens"), COLUMNS.index("rejected_tokens")]]
        assert torch.equal(turns[:, 2:], tokens)
    trainer.tables.eval.clear()


def test_off_with_a_plain_config(tmp_path):
    tokenizer = tokenizer_for(CHATML, "byte", eos="<|im_end|>")
    trainer = trainer_of(DPOTrainer, agent_rows(4), tmp_path, tokenizer, config=DPOConfig)
    assert not any("turn" in name for name in trainer.evaluate())
