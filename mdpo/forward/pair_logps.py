"""Per-token log-probs (S,) → sums of each pair and side, late, so that weights change without computing anew."""

import torch

from mdpo.forward.collators import CHOSEN, REJECTED
from mdpo.forward.token_logps import TokenScores
from mdpo.types import PairLogps


def token_places(batch: dict[str, torch.Tensor], n_pairs: int) -> torch.Tensor:
    """For each scored token the sequence that it belongs to, (S,): 0 … B-1 chosen, B … 2B-1 rejected."""
    return batch["score_side"] * n_pairs + batch["score_pair"]


def verbosity_weights(batch: dict[str, torch.Tensor], n_pairs: int, alpha: float) -> torch.Tensor:
    """LD-DPO's weights (arXiv 2409.06411), (S,): 1 for the first min(|y_w|, |y_l|) supervised tokens of a side, alpha
    for the rest of the longer side. Tokens of a sequence come in their order; those of weight 0 are not counted."""
    place = token_places(batch, n_pairs)
    used = counted(batch)
    mine = place[None] == torch.arange(2 * n_pairs, device=place.device)[:, None]  # (2B, S)
    position = (mine & used[None]).cumsum(1).gather(0, place[None])[0]  # from 1
    tokens = _per_sequence(used, place, n_pairs)
    shorter = tokens.min(0).values[batch["score_pair"]]
    return torch.where(position <= shorter, 1.0, alpha)


def counted(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """True for tokens whose turn's weight is not 0, (S,)."""
    return batch["score_weight"] != 0 if "score_weight" in batch else torch.ones_like(batch["score_pair"], dtype=bool)


def sum_by_pair(
    logps: torch.Tensor, batch: dict[str, torch.Tensor], n_pairs: int, weights: torch.Tensor | None = None
) -> PairLogps:
    """Per-token log-probs (S,), times turn weights and `weights` (S,) → sums and token counts of each pair, side.

    Sums are float64 whatever comes in. A reward is the small difference of two sums of thousands of terms, and on a GPU
    the order of summation changes from call to call: in float64 neither reaches the loss."""
    place = token_places(batch, n_pairs)
    logps = logps.double()
    for weight in (batch.get("score_weight"), weights):
        logps = logps if weight is None else logps * weight
    sums = logps.new_zeros(2 * n_pairs).index_add(0, place, logps).view(2, n_pairs)
    tokens = _per_sequence(counted(batch), place, n_pairs)
    return PairLogps(sums[CHOSEN], sums[REJECTED], tokens[CHOSEN], tokens[REJECTED])


def policy_weights(scores: TokenScores, batch: dict[str, torch.Tensor], n_pairs: int) -> torch.Tensor:
    """WPO's weight of each pair, (B,), without gradient (arXiv 2406.11827, eq. 2): how likely the policy would have
    written both sides itself, exp of the mean over tokens of log p(token) − log Σ_v p_v², chosen's times rejected's."""
    aligned = (scores.logps.double() - scores.log_collision.double()).detach() * counted(batch)
    sums = aligned.new_zeros(2 * n_pairs).index_add(0, token_places(batch, n_pairs), aligned)
    tokens = _per_sequence(counted(batch), token_places(batch, n_pairs), n_pairs)
    return (sums.view(2, n_pairs) / tokens.clamp(min=1)).sum(0).exp()


def _per_sequence(used: torch.Tensor, place: torch.Tensor, n_pairs: int) -> torch.Tensor:
    """How many tokens of each sequence are used, (2, B). Neither bincount nor an index by a mask: both ask the GPU."""
    return place.new_zeros(2 * n_pairs).index_add(0, place, used.long()).view(2, n_pairs)
