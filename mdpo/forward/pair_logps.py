"""Per-token log-probs (S,) → sums of each pair and side: last, so that weights can change without recomputing."""

import torch

from mdpo.forward.collators import CHOSEN, REJECTED
from mdpo.forward.token_logps import TokenScores
from mdpo.types import PairBatch, PairLogps


def verbosity_weights(batch: PairBatch, alpha: float) -> torch.Tensor:
    """LD-DPO's weights (arXiv 2409.06411), (S,): 1 for the first min(|y_w|, |y_l|) supervised tokens of a side, alpha
    for the rest of the longer side. Tokens of a sequence are in order; those of weight 0 are not counted."""
    n_pairs, sequence = batch.n_pairs, batch.sequence_of_token
    used = counted(batch)
    in_sequence = sequence[None] == torch.arange(2 * n_pairs, device=sequence.device)[:, None]  # (2B, S)
    position = (in_sequence & used[None]).cumsum(1).gather(0, sequence[None])[0]  # from 1
    tokens = _per_sequence(used, sequence, n_pairs)
    shorter = tokens.min(0).values[batch.pair]
    return torch.where(position <= shorter, 1.0, alpha)


def counted(batch: PairBatch) -> torch.Tensor:
    """True for tokens whose turn's weight is not 0, (S,)."""
    return torch.ones_like(batch.pair, dtype=torch.bool) if batch.turn_weight is None else batch.turn_weight != 0


def sum_by_pair(logps: torch.Tensor, batch: PairBatch, weights: torch.Tensor | None = None) -> PairLogps:
    """Per-token log-probs (S,), times turn weights and `weights` (S,) → sums and token counts of each pair, side.

    Sums are float64 whatever comes in. A reward is the small difference of two sums of thousands of terms, and on a GPU
    the order of summation changes from call to call: in float64 neither affects the loss."""
    n_pairs, sequence = batch.n_pairs, batch.sequence_of_token
    logps = logps.double()
    for weight in (batch.turn_weight, weights):
        logps = logps if weight is None else logps * weight
    sums = logps.new_zeros(2 * n_pairs).index_add(0, sequence, logps).view(2, n_pairs)
    tokens = _per_sequence(counted(batch), sequence, n_pairs)
    return PairLogps(sums[CHOSEN], sums[REJECTED], tokens[CHOSEN], tokens[REJECTED])


def policy_weights(scores: TokenScores, batch: PairBatch) -> torch.Tensor:
    """WPO's weight of each pair, (B,), without gradient (arXiv 2406.11827, eq. 2): how likely the policy would have
    written both sides itself, exp of the mean over tokens of log p(token) − log Σ_v p_v², chosen's times rejected's."""
    n_pairs, sequence = batch.n_pairs, batch.sequence_of_token
    if scores.log_sum_p_squared is None:
        raise ValueError("policy_weights: scores without log_sum_p_squared")
    aligned = (scores.logps.double() - scores.log_sum_p_squared.double()).detach() * counted(batch)
    sums = aligned.new_zeros(2 * n_pairs).index_add(0, sequence, aligned)
    tokens = _per_sequence(counted(batch), sequence, n_pairs)
    return (sums.view(2, n_pairs) / tokens.clamp(min=1)).sum(0).exp()


def _per_sequence(used: torch.Tensor, sequence: torch.Tensor, n_pairs: int) -> torch.Tensor:
    """How many tokens of each sequence are used, (2, B). Not by bincount or a mask as index: both wait for the GPU."""
    return sequence.new_zeros(2 * n_pairs).index_add(0, sequence, used.long()).view(2, n_pairs)
