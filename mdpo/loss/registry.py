"""Which losses a run minimizes, and what they take: the table of names over `mdpo.loss.functions`."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields

from torch import Tensor

import mdpo.loss.functions as losses
from mdpo.errors import UserError
from mdpo.types import PairLogps


@dataclass
class LossSettings:
    """The numbers that losses take, by the names of trl.DPOConfig and MDPOConfig."""

    loss_type: list[str] = field(default_factory=lambda: ["sigmoid"])
    loss_weights: list[float] | None = None  # None: 1 each
    beta: float = 0.1
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    margin_scale: float = 0.0
    length_penalty: float = 0.0
    nll_coefficient: float = 0.0

    @classmethod
    def of(cls, args) -> "LossSettings":
        """From an MDPOConfig."""
        return cls(**{f.name: getattr(args, f.name) for f in fields(cls)})


@dataclass(frozen=True)
class PairTerms:
    """What losses are made of, for B pairs, each (B,) unless said otherwise. `PairTerms.of` computes them."""

    policy: PairLogps  # log-probs as the preference losses see them
    reference: PairLogps
    own: PairLogps  # the policy's without LD-DPO's weights, for losses of the chosen side's likelihood
    settings: LossSettings
    chosen_ratio: Tensor  # r(y_w) = log π(y_w|x) − log π_ref(y_w|x), nats
    rejected_ratio: Tensor  # r(y_l)
    chosen_reward: Tensor  # w = β r(y_w)
    rejected_reward: Tensor  # l = β r(y_l)
    reward_difference: Tensor  # x = w − l, or what an f-divergence makes of it
    mean_difference: Tensor  # of the two sides' ratios per token, Δ̄
    length_penalty: Tensor  # beyond TRL: α (|y_w| − |y_l|), R-DPO (arXiv 2403.19159)
    target_margin: Tensor  # beyond TRL: m = margin_scale · margin; a scalar 0 without margins
    baselines: tuple[Tensor, Tensor] | None  # kto_pair's kl_w and kl_l, scalars without gradient

    @classmethod
    def of(
        cls,
        policy: PairLogps,
        reference: PairLogps,
        own: PairLogps,
        settings: LossSettings,
        margin: Tensor | None = None,
        mean_over_ranks: Callable[[Tensor], Tensor] | None = None,
    ) -> "PairTerms":
        """`margin` (B,) is the data's. `mean_over_ranks` takes (B,) to its mean over the pairs of all ranks, without
        gradient, for kto_pair alone."""
        s = settings
        ratios = (
            losses.log_ratio(policy.chosen, reference.chosen),
            losses.log_ratio(policy.rejected, reference.rejected),
        )
        rewards = s.beta * ratios[0], s.beta * ratios[1]
        counts = policy.chosen_tokens, policy.rejected_tokens
        scores = [losses.divergence_score(r, s.f_divergence_type, s.f_alpha_divergence_coef) for r in ratios]
        difference = s.beta * (scores[0] - scores[1])
        baselines = None
        if mean_over_ranks is not None:
            baselines = mean_over_ranks(rewards[0]).clamp(min=0), mean_over_ranks(rewards[1]).clamp(min=0)
        return cls(
            policy,
            reference,
            own,
            settings,
            *ratios,
            *rewards,
            reward_difference=difference,
            mean_difference=scores[0] / counts[0].clamp(min=1) - scores[1] / counts[1].clamp(min=1),
            length_penalty=s.length_penalty * (counts[0] - counts[1]),
            target_margin=difference.new_zeros(()) if margin is None else (s.margin_scale * margin).to(difference),
            baselines=baselines,
        )


def _aot(t: PairTerms, s: LossSettings) -> Tensor:
    policy, reference = (logps.chosen - logps.rejected for logps in (t.policy, t.reference))
    return losses.smoothed_loss(s.beta * losses.sorted_difference(policy, reference), s.label_smoothing)


def _kto_pair(t: PairTerms, s: LossSettings) -> Tensor:
    if t.baselines is None:
        raise ValueError("kto_pair: its terms need mean_over_ranks")
    return losses.kto_pair_loss(t.chosen_reward, t.rejected_reward, *t.baselines)


# name -> (B,) losses of a pair; the first fifteen are TRL 1.16's
LOSSES: dict[str, Callable[[PairTerms, LossSettings], Tensor]] = {
    "sigmoid": lambda t, s: losses.sigmoid_loss(t.reward_difference + t.length_penalty - t.target_margin),
    "hinge": lambda t, s: losses.hinge_loss(t.reward_difference - t.target_margin),
    "ipo": lambda t, s: losses.ipo_loss(t.mean_difference, s.beta),
    "exo_pair": lambda t, s: losses.exo_loss(t.reward_difference, s.label_smoothing),
    "nca_pair": lambda t, s: losses.nca_loss(t.chosen_reward, t.rejected_reward),
    "robust": lambda t, s: losses.robust_loss(t.reward_difference, s.label_smoothing),
    "bco_pair": lambda t, s: losses.bco_loss(t.chosen_reward, t.rejected_reward),
    "sppo_hard": lambda t, s: losses.sppo_hard_loss(t.chosen_ratio, t.rejected_ratio, s.beta),
    "aot": _aot,
    "aot_unpaired": lambda t, s: losses.smoothed_loss(
        losses.sorted_difference(t.chosen_reward, t.rejected_reward), s.label_smoothing
    ),
    "apo_zero": lambda t, s: losses.apo_zero_loss(t.chosen_reward, t.rejected_reward),
    "apo_down": lambda t, s: losses.apo_down_loss(t.chosen_reward, t.rejected_reward),
    "discopop": lambda t, s: losses.discopop_loss(t.reward_difference, s.discopop_tau),
    "sft": lambda t, s: losses.token_nll(t.own.chosen, t.own.chosen_tokens),
    "sigmoid_norm": lambda t, s: losses.sigmoid_loss(s.beta * t.mean_difference),
    # Beyond TRL: further losses of the published M-DPO code.
    "cross_entropy": lambda t, s: losses.sigmoid_loss(t.chosen_reward),
    "raft": lambda t, s: -t.own.chosen,
    "kl": lambda t, s: losses.kl_loss(t.reward_difference, t.target_margin),
    "rev_kl": lambda t, s: losses.rev_kl_loss(t.reward_difference, t.target_margin),
    "tv": lambda t, s: losses.tv_loss(t.reward_difference, t.target_margin),
    "hellinger": lambda t, s: losses.hellinger_loss(t.reward_difference, t.target_margin),
    "kto_pair": _kto_pair,
}
OF_TRL = tuple(LOSSES)[:15]
OF_BATCH = {"aot", "aot_unpaired", "sft"}  # their values are the whole batch's, no pair's own


def pair_losses(terms: PairTerms) -> Tensor:
    """The weighted sum of the settings' losses, (B,)."""
    s = terms.settings
    weights = s.loss_weights or [1.0] * len(s.loss_type)
    first, *others = [weight * LOSSES[name](terms, s) for name, weight in zip(s.loss_type, weights, strict=True)]
    return sum(others, start=first)


def weighted(losses: Tensor, weight: Tensor | None, settings: LossSettings) -> Tensor:
    """Each pair's loss times its weight in the data, (B,); `weight` is None where all are 1. What is minimized is the
    mean over pairs of weight · loss, not divided by the sum of weights. Raises UserError for losses of OF_BATCH."""
    if weight is None:
        return losses
    refuse_weights(settings.loss_type)
    return losses * weight


def refuse_weights(loss_type: list[str]) -> None:
    """Raises UserError where a loss has no value of each pair's own that a weight could multiply."""
    if of_batch := sorted(OF_BATCH & set(loss_type)):
        raise UserError(
            f"loss_type: {of_batch[0]} is a loss of the whole batch, and rows of the data have a `weight`, which "
            "multiplies each pair's own. Take the weights out, or use another loss."
        )
