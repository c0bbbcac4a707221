"""Which losses a run minimises, and what they are made of: the table of names over `mdpo.loss.functions`."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields

import torch

import mdpo.loss.functions as losses
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


@dataclass
class PairTerms:
    """What losses are made of, for B pairs, each (B,) unless said otherwise.

    `policy`, `reference`: log-probs as the preference losses see them; `own`: the policy's without LD-DPO's weights,
    for losses of the chosen side's likelihood. `margin`: the data's, or 0. `kl`: two scalars, for kto_pair alone.
    """

    policy: PairLogps
    reference: PairLogps
    own: PairLogps
    settings: LossSettings
    margin: torch.Tensor | float = 0.0
    kl: tuple[torch.Tensor, torch.Tensor] | None = None

    def __post_init__(self):
        s, p, r = self.settings, self.policy, self.reference
        self.chosen_ratio = losses.log_ratio(p.chosen, r.chosen)
        self.rejected_ratio = losses.log_ratio(p.rejected, r.rejected)
        self.w, self.l = s.beta * self.chosen_ratio, s.beta * self.rejected_ratio  # the implicit rewards
        scores = [
            losses.divergence_score(ratio, s.f_divergence_type, s.f_alpha_divergence_coef)
            for ratio in (self.chosen_ratio, self.rejected_ratio)
        ]
        self.x = s.beta * (scores[0] - scores[1])
        counts = p.chosen_tokens, p.rejected_tokens
        self.mean_delta = scores[0] / counts[0].clamp(min=1) - scores[1] / counts[1].clamp(min=1)
        # Beyond TRL: margins from the data, and the length penalty of R-DPO (arXiv 2403.19159).
        self.length = s.length_penalty * (counts[0] - counts[1])

    @property
    def m(self) -> torch.Tensor:
        scaled = self.settings.margin_scale * self.margin
        return scaled.to(self.x) if isinstance(scaled, torch.Tensor) else self.x.new_full((), scaled)


def _aot(t: PairTerms, s: LossSettings) -> torch.Tensor:
    policy, reference = (logps.chosen - logps.rejected for logps in (t.policy, t.reference))
    return losses.smoothed_loss(s.beta * losses.sorted_difference(policy, reference), s.label_smoothing)


# name -> (B,) losses of a pair; the first fifteen are TRL 1.16's
LOSSES: dict[str, Callable[[PairTerms, LossSettings], torch.Tensor]] = {
    "sigmoid": lambda t, s: losses.sigmoid_loss(t.x + t.length - t.m),
    "hinge": lambda t, s: losses.hinge_loss(t.x - t.m),
    "ipo": lambda t, s: losses.ipo_loss(t.mean_delta, s.beta),
    "exo_pair": lambda t, s: losses.exo_loss(t.x, s.label_smoothing),
    "nca_pair": lambda t, s: losses.nca_loss(t.w, t.l),
    "robust": lambda t, s: losses.robust_loss(t.x, s.label_smoothing),
    "bco_pair": lambda t, s: losses.bco_loss(t.w, t.l),
    "sppo_hard": lambda t, s: losses.sppo_hard_loss(t.chosen_ratio, t.rejected_ratio, s.beta),
    "aot": _aot,
    "aot_unpaired": lambda t, s: losses.smoothed_loss(losses.sorted_difference(t.w, t.l), s.label_smoothing),
    "apo_zero": lambda t, s: losses.apo_zero_loss(t.w, t.l),
    "apo_down": lambda t, s: losses.apo_down_loss(t.w, t.l),
    "discopop": lambda t, s: losses.discopop_loss(t.x, s.discopop_tau),
    "sft": lambda t, s: losses.token_nll(t.own.chosen, t.own.chosen_tokens),
    "sigmoid_norm": lambda t, s: losses.sigmoid_loss(s.beta * t.mean_delta),
    # Beyond TRL: further losses of the published M-DPO code.
    "cross_entropy": lambda t, s: losses.sigmoid_loss(t.w),
    "raft": lambda t, s: -t.own.chosen,
    "kl": lambda t, s: losses.kl_loss(t.x, t.m),
    "rev_kl": lambda t, s: losses.rev_kl_loss(t.x, t.m),
    "tv": lambda t, s: losses.tv_loss(t.x, t.m),
    "hellinger": lambda t, s: losses.hellinger_loss(t.x, t.m),
    "kto_pair": lambda t, s: losses.kto_pair_loss(t.w, t.l, *t.kl),
}
OF_TRL = tuple(LOSSES)[:15]


def pair_losses(terms: PairTerms) -> torch.Tensor:
    """The weighted sum of the settings' losses, (B,)."""
    s = terms.settings
    weights = s.loss_weights or [1.0] * len(s.loss_type)
    return sum(weight * LOSSES[name](terms, s) for name, weight in zip(s.loss_type, weights, strict=True))
