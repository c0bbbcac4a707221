"""Losses by hand: small numbers whose results are derived in the comments."""

import math

import pytest
import torch

import mdpo.loss.functions as losses
from mdpo.loss.functions import log_ratio, nll_loss, sigmoid_loss
from mdpo.loss.metrics import COLUMNS, deduplicate, mean_over_steps, summarize


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_sigmoid_is_ln2_where_policy_is_reference():
    ratio = log_ratio(t(-5.0, -7.0), t(-5.0, -7.0))
    assert sigmoid_loss(0.1 * ratio).tolist() == pytest.approx([math.log(2)] * 2)


def test_sigmoid_by_hand():
    # β Δ = 0.5 · (ln 3 − (−ln 3)) = ln 3; σ(ln 3) = 3/4; −ln(3/4), and −ln(1/4) with the pair flipped.
    assert sigmoid_loss(t(math.log(3), -math.log(3))).tolist() == pytest.approx([-math.log(3 / 4), -math.log(1 / 4)])


def test_sigmoid_gradient_and_limits():
    # d/dx −ln σ(x) = −σ(−x): at 0 it is −½; far out it is 0 and −1, never nan.
    x = t(0.0, 1e3, -1e3).requires_grad_()
    sigmoid_loss(x).sum().backward()
    assert x.grad.tolist() == pytest.approx([-0.5, 0.0, -1.0])


LN3 = math.log(3)
LN2 = math.log(2)
# σ(ln 3) = 3/4, σ(−ln 3) = 1/4. Each value was derived on paper from the formula of the loss's paper.
BY_HAND = {
    "hinge": (losses.hinge_loss(t(0.25, 2.0, -1.0)), [0.75, 0.0, 2.0]),
    # 0.9 · −ln(3/4) + 0.1 · −ln(1/4)
    "smoothed": (losses.smoothed_loss(t(LN3), 0.1), [-0.9 * math.log(0.75) - 0.1 * math.log(0.25)]),
    # (−0.9 ln(3/4) + 0.1 ln(1/4)) / 0.8
    "robust": (losses.robust_loss(t(LN3), 0.1), [(-0.9 * math.log(0.75) + 0.1 * math.log(0.25)) / 0.8]),
    # ¾ ln(¾ / ½) + ¼ ln(¼ / ½), with ε = ½ the target is a coin
    "exo": (losses.exo_loss(t(LN3), 0.5), [0.75 * math.log(1.5) + 0.25 * math.log(0.5)]),
    # x = 0: both halves weigh ½: ½ ln 2 + ½ · 1
    "discopop": (losses.discopop_loss(t(0.0), 0.05), [LN2 / 2 + 0.5]),
    # (Δ̄ − 1/(2 · 0.25))² = (3 − 2)²
    "ipo": (losses.ipo_loss(t(3.0), 0.25), [1.0]),
    "nca": (losses.nca_loss(t(LN3), t(-LN3)), [-math.log(0.75) - (math.log(0.25) + math.log(0.75)) / 2]),
    "bco": (losses.bco_loss(t(LN3), t(LN3)), [-math.log(0.75) - math.log(0.25)]),
    "apo_zero": (losses.apo_zero_loss(t(LN3), t(LN3)), [0.25 + 0.75]),
    # σ(0) + σ(−(0 − (−ln 3)))
    "apo_down": (losses.apo_down_loss(t(0.0), t(-LN3)), [0.5 + 0.25]),
    # (1 − 2)² + (−1 + 2)² with 1/(2β) = 2
    "sppo_hard": (losses.sppo_hard_loss(t(1.0), t(-1.0), 0.25), [2.0]),
    # sorted (1, 2) − (0, 5)
    "aot": (losses.sorted_difference(t(2.0, 1.0), t(0.0, 5.0)), [1.0, -3.0]),
    # 9 nats over 3 tokens, the same for each pair
    "sft": (losses.token_nll(t(-6.0, -3.0), torch.tensor([1, 2])), [3.0, 3.0]),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name):
    got, wanted = BY_HAND[name]
    assert got.tolist() == pytest.approx(wanted)


def test_divergences_by_hand():
    # u = 2: log u; 1 − 1/u; log(2u/(u+1)); (u^(α−1) − 1)/(α − 1) with α = 3 and its limit at 1.
    ratio = t(LN2)
    score = losses.divergence_score
    assert score(ratio).item() == pytest.approx(LN2)
    assert score(ratio, "forward_kl").item() == pytest.approx(0.5)
    assert score(ratio, "js_divergence").item() == pytest.approx(math.log(4 / 3))
    assert score(ratio, "alpha_divergence", 3.0).item() == pytest.approx(1.5)
    assert score(ratio, "alpha_divergence", 1.0).item() == score(ratio).item()
    assert math.isfinite(score(torch.tensor([1e4]), "alpha_divergence", 3.0).item())


def test_nll_is_per_pair_and_per_token():
    assert nll_loss(t(-6.0, -1.0), torch.tensor([3, 0])).tolist() == pytest.approx([2.0, 1.0])


def table(**columns):
    n = max(len(v) for v in columns.values())
    return torch.stack([t(*columns.get(name, [0.0] * n)) for name in COLUMNS], dim=1)


def test_metrics_are_weighted_by_pairs_and_by_tokens():
    metrics = summarize(
        table(
            chosen_reward=[1.0, -1.0, 2.0],
            rejected_reward=[0.0, 0.0, 2.0],  # won, lost, drawn: a draw is no win
            chosen_tokens=[1, 3, 0],
            rejected_tokens=[2, 2, 0],
            entropy=[4.0, 4.0, 0.0],
            chosen_top1=[1, 1, 0],
        )
    )
    assert metrics["rewards/accuracies"] == pytest.approx(1 / 3)
    assert metrics["rewards/margins"] == pytest.approx(0.0)
    assert metrics["entropy"] == pytest.approx(1.0)  # 8 nats / 8 tokens
    assert metrics["mean_token_accuracy"] == pytest.approx(0.5)  # 2 of 4 chosen tokens


def test_each_pair_is_evaluated_once():
    # Two ranks; rank 1's last batch was filled up with pair 0 again.
    ranks = [table(row=[0, 2], loss=[1.0, 3.0]), table(row=[1, 0], loss=[2.0, 1.0])]
    once = deduplicate(ranks)
    assert once[:, 0].tolist() == [0, 2, 1]
    assert once[:, 1].mean().item() == pytest.approx(2.0)  # counted twice it would be 1.75
    unknown = table(row=[-1, -1], loss=[1.0, 2.0])
    assert len(deduplicate([unknown])) == 2


def test_training_metrics_average_steps_of_all_ranks():
    def one(reward):
        return table(chosen_reward=reward, rejected_reward=[0.0] * len(reward))

    logged = mean_over_steps([[one([1.0]), one([5.0, 5.0])], [one([3.0]), one([5.0, 5.0])]])
    assert logged["rewards/chosen"] == pytest.approx((2.0 + 5.0) / 2)
