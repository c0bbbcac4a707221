"""Margins, the length penalty, the further losses and turn weights: by hand, in their limits, and in the trainer."""

import math

import pytest
import torch
from datasets import Dataset
from errors import refused
from tiny import agent_rows
from trainers import close, loss_and_gradients, mdpo_trainer, rows_with_margins, trainer_of

import mdpo.loss.functions as losses
from dpo_trainer import DPOTrainer
from mdpo.config.validation import TOWARDS_MARGIN
from mdpo.loss.registry import LossSettings, PairTerms, pair_losses
from mdpo.types import PairLogps, common_prefix

LN2, LN3 = math.log(2), math.log(3)


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


def terms(w, l, margin=0.0, tokens=(1, 1), **settings) -> PairTerms:  # noqa: E741
    """One pair whose implicit rewards are w and l: β is 1, the reference's log-probs are 0."""
    counts = [torch.tensor([n]) for n in tokens]
    zero = PairLogps(t(0.0), t(0.0), *counts)
    policy = PairLogps(t(w).requires_grad_(), t(l).requires_grad_(), *counts)
    return PairTerms.of(policy, zero, policy, LossSettings(beta=1.0, **settings), margin=t(margin))


def test_margin_by_hand():
    # x = ln 3 and m = ln 3 cancel: ln 2. Without the scale the margin does nothing.
    assert pair_losses(terms(LN3, 0.0, LN3, margin_scale=1.0)).item() == pytest.approx(LN2)
    assert pair_losses(terms(LN3, 0.0, LN3)).item() == pytest.approx(-math.log(0.75))
    # 2 · ln 3 is asked for, and the flipped pair is twice as far away: −ln σ(−ln 3), −ln σ(−3 ln 3)
    assert pair_losses(terms(LN3, 0.0, LN3, margin_scale=2.0)).item() == pytest.approx(-math.log(1 / 4))
    assert pair_losses(terms(0.0, LN3, LN3, margin_scale=2.0)).item() == pytest.approx(-math.log(1 / 28))
    hinge = {"loss_type": ["hinge"], "margin_scale": 1.0}
    assert pair_losses(terms(0.5, 0.0, 0.25, **hinge)).item() == pytest.approx(0.75)  # 1 + 0.25 − 0.5
    assert pair_losses(terms(2.0, 0.0, 0.25, **hinge)).item() == 0.0


def test_length_penalty_by_hand_and_its_sign():
    """R-DPO subtracts α|y| from the reward that the policy should have, so the implicit one gets it back: where the
    chosen side is longer, the loss asks for less of it. α (|y_w| − |y_l|) = 0.2 · (7 − 2) = 1."""
    longer = terms(0.0, 0.0, tokens=(7, 2), length_penalty=0.2)
    shorter = terms(0.0, 0.0, tokens=(2, 7), length_penalty=0.2)
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    assert pair_losses(longer).item() == pytest.approx(-math.log(sigmoid(1)))
    assert pair_losses(shorter).item() == pytest.approx(-math.log(sigmoid(-1)))
    pushes = []
    for pair in (longer, shorter):
        pair_losses(pair).backward()
        pushes.append(-pair.policy.chosen.grad.item())
    assert pushes == pytest.approx([sigmoid(-1), sigmoid(1)])  # a shorter winner is pushed harder


# p = σ(x), p* = σ(m). Values on paper at (x, m) = (ln 3, 0): p = 3/4, p* = 1/2; and at (ln 3, ln 3), where p = p*.
TARGETS = {
    "kl": (0.75 * math.log(1.5) + 0.25 * math.log(0.5), 0.0),
    "rev_kl": (-0.5 * math.log(0.75) - 0.5 * math.log(0.25), -0.75 * math.log(0.75) - 0.25 * math.log(0.25)),
    "tv": (0.25, 0.0),
    "hellinger": (((0.75**0.5 - 0.5**0.5) ** 2 + (0.5 - 0.5**0.5) ** 2) / 2, 0.0),
}


@pytest.mark.parametrize("name", TARGETS)
def test_losses_towards_a_margin_by_hand(name):
    f = getattr(losses, f"{name}_loss")
    assert f(t(LN3, LN3), t(0.0, LN3)).tolist() == pytest.approx(TARGETS[name], abs=1e-12)
    assert f(t(-LN3), t(-0.7)).item() == pytest.approx(f(t(LN3), t(0.7)).item())  # a flipped pair, a flipped target
    for x, m in ((2.0, 0.5), (-1.0, 0.5), (0.0, 3.0)):  # the gradient leads towards p*
        at = t(x).requires_grad_()
        f(at, t(m)).backward()
        assert math.copysign(1, at.grad.item()) == math.copysign(1, x - m)
    step = 1e-6  # and is the difference quotient
    at = t(0.3).requires_grad_()
    f(at, t(-0.4)).backward()
    quotient = (f(t(0.3 + step), t(-0.4)) - f(t(0.3 - step), t(-0.4))).item() / (2 * step)
    assert at.grad.item() == pytest.approx(quotient, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", TARGETS)
def test_losses_towards_a_margin_in_their_limits(name, dtype):
    """Finite in value and gradient for x in ±1000 and any margin; bounded ones reach their bound."""
    far = (-1000.0, -100.0, -20.0, 0.0, 20.0, 100.0, 1000.0)
    x = torch.tensor([a for a in far for _ in far], dtype=dtype).requires_grad_()
    m = torch.tensor([b for _ in far for b in far], dtype=dtype)
    loss = getattr(losses, f"{name}_loss")(x, m)
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(x.grad).all()
    opposite = loss[(x == 1000) & (m == -1000)].item()
    assert opposite == pytest.approx({"kl": 1000.0, "rev_kl": 1000.0, "tv": 1.0, "hellinger": 1.0}[name])
    assert (loss >= -1e-6).all()


def test_tv_keeps_its_digits_where_both_are_certain():
    # σ(20) and σ(21) are 1 in float32 but for their last digits: p − p* = σ(−21) − σ(−20).
    wanted = 1 / (1 + math.exp(20)) - 1 / (1 + math.exp(21))
    assert losses.tv_loss(torch.tensor([20.0]), torch.tensor([21.0])).item() == pytest.approx(wanted, rel=1e-5)


def test_likelihood_losses_by_hand():
    one = terms(LN3, -5.0, loss_type=["cross_entropy"])
    assert pair_losses(one).item() == pytest.approx(-math.log(0.75))  # the rejected side plays no part
    assert pair_losses(terms(-7.0, 3.0, loss_type=["raft"])).item() == pytest.approx(7.0)
    pair_losses(one).backward()
    assert one.policy.chosen.grad.item() == pytest.approx(-0.25) and one.policy.rejected.grad is None


def test_kto_pair_by_hand():
    # No baseline: ½ (σ(−ln 3) + σ(−ln 3)). With baselines kl_w = 0 and kl_l = ln 3: ½ (σ(0) + σ(−ln 3)).
    f = losses.kto_pair_loss
    assert f(t(LN3), t(-LN3), t(0.0), t(0.0)).item() == pytest.approx(0.25)
    assert f(t(LN3), t(-LN3), t(0.0), t(LN3)).item() == pytest.approx((0.5 + 0.25) / 2)
    assert f(t(-1000.0), t(1000.0), t(0.0), t(0.0)).item() == pytest.approx(1.0)


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


# Each loss again, in plain Python, from the log ratios w and l (times β), the margin m and what else it looks at.
FORMULAS = {
    "sigmoid": lambda w, l, m, **k: -log_sigmoid(w - l - m),  # noqa: E741
    "hinge": lambda w, l, m, **k: max(0.0, 1 + m - (w - l)),  # noqa: E741
    "cross_entropy": lambda w, l, m, **k: -log_sigmoid(w),  # noqa: E741
    "raft": lambda w, l, m, logps, **k: -logps,  # noqa: E741
    "rev_kl": lambda w, l, m, **k: -expit(m) * log_sigmoid(w - l) - expit(-m) * log_sigmoid(l - w),  # noqa: E741
    "tv": lambda w, l, m, **k: abs(expit(w - l) - expit(m)),  # noqa: E741
    "kl": lambda w, l, m, **k: sum(  # noqa: E741
        expit(s * (w - l)) * (log_sigmoid(s * (w - l)) - log_sigmoid(s * m)) for s in (1, -1)
    ),
    "hellinger": lambda w, l, m, **k: sum(  # noqa: E741
        (expit(s * (w - l)) ** 0.5 - expit(s * m) ** 0.5) ** 2 / 2 for s in (1, -1)
    ),
    "kto_pair": lambda w, l, m, kl, **k: (expit(kl[1] - w) + expit(l - kl[0])) / 2,  # noqa: E741
}


def expit(x):
    return math.exp(log_sigmoid(x))


@pytest.mark.parametrize("name", FORMULAS)
def test_in_the_trainer(name, tmp_path, tokenizer):
    """The trainer's loss of a batch is the mean of the formula over the batch's own log-probs and margins."""
    scale = {"margin_scale": 2.0} if name in TOWARDS_MARGIN | {"sigmoid", "hinge"} else {}
    rows = rows_with_margins()
    trainer = mdpo_trainer(tmp_path, tokenizer, rows, loss_type=[name], beta=0.05, **scale)
    batch = next(iter(trainer.get_train_dataloader()))
    loss, policy = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    table = trainer.tables.eval[-1] if trainer.tables.eval else trainer.tables.train[-1]
    w, l = table[:, 2].tolist(), table[:, 3].tolist()  # noqa: E741
    m = [0.1 * row * scale.get("margin_scale", 0.0) for row in batch["row"].tolist()]
    kl = [max(0.0, sum(rewards) / len(rewards)) for rewards in (w, l)]
    more = [{"logps": logps, "kl": kl} for logps in policy.chosen.tolist()]
    wanted = [FORMULAS[name](*each, **k) for *each, k in zip(w, l, m, more, strict=True)]
    assert loss.item() == pytest.approx(sum(wanted) / len(wanted), rel=1e-5)
    trainer.train()
    assert all(math.isfinite(log["loss"]) for log in trainer.state.log_history if "loss" in log)


def test_length_penalty_in_the_trainer(tmp_path, tokenizer):
    plain, penalized = (mdpo_trainer(tmp_path, tokenizer, beta=0.01, length_penalty=a) for a in (0.0, 0.05))
    batch = next(iter(plain.get_train_dataloader()))
    _, policy = plain.compute_loss(plain.model, batch, return_outputs=True)
    table = plain.tables.eval[-1] if plain.tables.eval else plain.tables.train[-1]
    lengths = (policy.chosen_tokens - policy.rejected_tokens).tolist()
    assert any(lengths)
    wanted = [-log_sigmoid(x + 0.05 * n) for x, n in zip((table[:, 2] - table[:, 3]).tolist(), lengths, strict=True)]
    got = penalized.compute_loss(penalized.model, batch).item()
    assert got == pytest.approx(sum(wanted) / len(wanted), rel=1e-5)


def test_missing_margin_is_an_error_that_names_the_row(tmp_path, tokenizer):
    rows = rows_with_margins(4)
    rows[2]["margin"] = None
    with refused("margin_scale", "1 rows of train ", "`margin`", " row:3."):
        mdpo_trainer(tmp_path, tokenizer, rows, margin_scale=1.0)
    with refused("margin_scale", "4 rows of train ", " row:1."):
        mdpo_trainer(tmp_path, tokenizer, agent_rows(4), margin_scale=1.0)
    mdpo_trainer(tmp_path, tokenizer, rows)  # without the scale nobody looks at it


# ------------------------------------------------------------------------------------------------------ turn weights


def weighted(rows, weights):
    """Rows whose assistant turns carry the weights, in their order, on both sides."""

    def side(messages):
        given = iter(weights)
        return [{**m, "weight": next(given) if m["role"] == "assistant" else None} for m in messages]

    return [{"chosen": side(r["chosen"]), "rejected": side(r["rejected"])} for r in rows]


def test_weights_of_one_change_nothing(tmp_path, tokenizer):
    plain, ones = (mdpo_trainer(tmp_path, tokenizer, rows) for rows in (agent_rows(4), weighted(agent_rows(4), (1, 1))))
    assert plain.train_dataset.to_list() == ones.train_dataset.to_list()
    assert "turn_weight" not in next(iter(ones.get_train_dataloader()))


@pytest.mark.parametrize("options", [{}, {"nll_coefficient": 0.5}, {"loss_type": ["ipo", "sft"]}, {"ld_alpha": 0.3},
                                     {"length_penalty": 0.1}, {"use_weighting": True}], ids=str)  # fmt: skip
def test_weight_zero_is_a_mask(options, tmp_path, tokenizer):
    """Loss, gradients and metrics are those of the same rows with the first turn's mask set to 0 by hand."""
    zero = mdpo_trainer(tmp_path, tokenizer, weighted(agent_rows(8), (0, 1)), **options)
    masked = mdpo_trainer(tmp_path, tokenizer, agent_rows(8), **options)

    def without_first_turn(row):
        for side in ("chosen", "rejected"):
            mask = list(row[f"{side}_mask"])
            start = mask.index(1)
            end = mask.index(0, start)
            mask[start:end] = [0] * (end - start)
            row[f"{side}_mask"] = mask
        return row

    masked.train_dataset = masked.train_dataset.map(without_first_turn)
    batches = [next(iter(trainer.get_train_dataloader())) for trainer in (zero, masked)]
    assert len(batches[0]["pair"]) == len(batches[1]["pair"])
    (loss, gradients), (wanted, wanted_gradients) = (
        loss_and_gradients(trainer, batch) for trainer, batch in zip((zero, masked), batches, strict=True)
    )
    close(loss, wanted)
    for name, gradient in wanted_gradients.items():
        close(gradients[name], gradient, name)
    zero.train()
    masked.train()
    for got, log in zip(zero.state.log_history[:-1], masked.state.log_history[:-1], strict=True):
        assert {k: v for k, v in got.items() if k != "num_tokens"} == pytest.approx(
            {k: v for k, v in log.items() if k != "num_tokens"}, rel=1e-4, abs=1e-3
        )


def test_weights_multiply_a_turns_log_ratios_by_hand(tmp_path, tokenizer):
    """Log-probs of (½, 3) are half of those of (1, 0) and three times those of (0, 1)."""
    sums = []
    for weights in ((0.5, 3), (1, 0), (0, 1)):
        trainer = mdpo_trainer(tmp_path, tokenizer, weighted(agent_rows(4), weights))
        batch = next(iter(trainer.get_train_dataloader()))
        sums.append(trainer.compute_loss(trainer.model, batch, return_outputs=True)[1].chosen)
    torch.testing.assert_close(sums[0], 0.5 * sums[1] + 3 * sums[2], rtol=1e-5, atol=1e-4)


def test_weights_change_no_reference_value(tmp_path, tokenizer):
    plain, other = (
        mdpo_trainer(tmp_path, tokenizer, rows, precompute_ref_log_probs=True).train_dataset
        for rows in (agent_rows(4), weighted(agent_rows(4), (0.25, 2)))
    )
    for column in ("reference_chosen_logps", "reference_rejected_logps"):
        assert plain[column] == other[column]


def test_tokens_whose_weights_differ_are_shared(tmp_path, tokenizer):
    same = agent_rows(1)[0]
    rows = [{"chosen": same["chosen"], "rejected": [*same["chosen"][:3], same["rejected"][3]]}]
    plain = mdpo_trainer(tmp_path, tokenizer, rows).train_dataset[0]
    rows[0]["chosen"] = [{**m, "weight": 0.5 if m["role"] == "assistant" else None} for m in rows[0]["chosen"]]
    trainer = mdpo_trainer(tmp_path, tokenizer, rows)
    weighted_row = trainer.train_dataset[0]
    assert weighted_row["chosen_weights"] and not weighted_row["rejected_weights"]
    prefix = common_prefix(plain["chosen_ids"], plain["rejected_ids"])
    assert prefix > plain["chosen_mask"].index(1)  # into the first turn, whose weight is another on each side
    both = len(plain["chosen_ids"]) + len(plain["rejected_ids"])
    assert weighted_row["distinct"] == plain["distinct"] == both - prefix
    assert next(iter(trainer.get_train_dataloader())).n_distinct == both - prefix


BAD_WEIGHTS = {
    "every turn of a side has weight 0": lambda m: {**m, "weight": 0} if m["role"] == "assistant" else m,
    "chosen, message 2: a message's weight is -1, not a number >= 0": lambda m: {**m, "weight": -1}
    if m["role"] == "assistant"
    else m,
    "chosen, message 1: a weight on a message that is not the assistant's": lambda m: (
        {**m, "weight": 1} if m["role"] == "user" else m
    ),
}


@pytest.mark.parametrize("reason", BAD_WEIGHTS)
def test_bad_weights_drop_the_pair_by_name(reason, tmp_path, tokenizer):
    rows = agent_rows(4)
    rows[1] = {side: [BAD_WEIGHTS[reason](m) for m in messages] for side, messages in rows[1].items()}
    trainer = mdpo_trainer(tmp_path, tokenizer, rows)
    assert trainer.drop_counts["train"].reasons == {reason: ["row:2"]}


def test_weights_in_the_prompt_drop_the_pair_by_name(tmp_path, tokenizer):
    """Context is not supervised: a weight there would do nothing."""
    first = agent_rows(1)[0]
    prompt = [{"role": "assistant", "content": "Hello.", "weight": 0.5}, first["chosen"][0]]
    rows = [{"prompt": prompt, "chosen": first["chosen"][1:], "rejected": first["rejected"][1:]}] * 2
    with refused("dataset", "a weight in the prompt", "row:1"):
        mdpo_trainer(tmp_path, tokenizer, rows)
    rows[1] = {**rows[1], "prompt": [{**prompt[0], "weight": None}, prompt[1]]}
    assert len(mdpo_trainer(tmp_path, tokenizer, rows).train_dataset) == 1


def test_a_stream_without_margins_is_an_error(tmp_path, tokenizer):
    stream = Dataset.from_list(agent_rows(4)).to_iterable_dataset()
    trainer = mdpo_trainer(tmp_path, tokenizer, stream, margin_scale=1.0, max_steps=1)
    with refused("margin_scale", "`margin`"):
        trainer.train()


def test_weights_need_turn_masks(tmp_path, tokenizer):
    with refused("weight", "mask_user_turns: true"):
        trainer_of(DPOTrainer, weighted(agent_rows(4), (1, 0.5)), tmp_path, tokenizer)
