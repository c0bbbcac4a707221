"""Losses by hand: small numbers whose results are derived in the comments."""

import math

import pytest
import torch

from mdpo.losses import log_ratio, nll_loss, sigmoid_loss
from mdpo.metrics import COLUMNS, evaluated_once, mean_over_steps, summarise


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_sigmoid_is_ln2_where_policy_is_reference():
    ratio = log_ratio(t(-5.0, -7.0), t(-5.0, -7.0))
    assert sigmoid_loss(ratio, ratio, beta=0.1).tolist() == pytest.approx([math.log(2)] * 2)


def test_sigmoid_by_hand():
    # β Δ = 0.5 · (ln 3 − (−ln 3)) = ln 3; σ(ln 3) = 3/4; −ln(3/4).
    loss = sigmoid_loss(t(math.log(3)), t(-math.log(3)), beta=0.5)
    assert loss.tolist() == pytest.approx([-math.log(3 / 4)])
    flipped = sigmoid_loss(t(-math.log(3)), t(math.log(3)), beta=0.5)
    assert flipped.tolist() == pytest.approx([-math.log(1 / 4)])


def test_sigmoid_gradient_and_limits():
    # d/dΔ −ln σ(βΔ) = −β σ(−βΔ): at 0 it is −β/2; far out it is 0 and −β, never nan.
    delta = t(0.0, 1e4, -1e4).requires_grad_()
    sigmoid_loss(delta, torch.zeros_like(delta), beta=0.1).sum().backward()
    assert delta.grad.tolist() == pytest.approx([-0.05, 0.0, -0.1])


def test_nll_is_per_pair_and_per_token():
    assert nll_loss(t(-6.0, -1.0), torch.tensor([3, 0])).tolist() == pytest.approx([2.0, 1.0])


def table(**columns):
    n = max(len(v) for v in columns.values())
    return torch.stack([t(*columns.get(name, [0.0] * n)) for name in COLUMNS], dim=1)


def test_metrics_are_weighted_by_pairs_and_by_tokens():
    metrics = summarise(
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
    once = evaluated_once(ranks)
    assert once[:, 0].tolist() == [0, 2, 1]
    assert once[:, 1].mean().item() == pytest.approx(2.0)  # counted twice it would be 1.75
    unknown = table(row=[-1, -1], loss=[1.0, 2.0])
    assert len(evaluated_once([unknown])) == 2


def test_training_metrics_average_steps_of_all_ranks():
    def one(reward):
        return table(chosen_reward=reward, rejected_reward=[0.0] * len(reward))

    logged = mean_over_steps([[one([1.0]), one([5.0, 5.0])], [one([3.0]), one([5.0, 5.0])]])
    assert logged["rewards/chosen"] == pytest.approx((2.0 + 5.0) / 2)
