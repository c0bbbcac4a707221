"""A pair's rewards split by turn. A turn is a run of supervised tokens: an assistant message and its end-of-turn token.

Turns are numbered from 0 in tensors and from 1 in names of metrics. After COLUMNS of `mdpo.loss.metrics` a per-pair
table has four numbers for each turn: chosen reward, rejected reward, chosen tokens, rejected tokens, so that tables of
different numbers of turns can be joined by padding them with zeros on the right.
"""

import torch

from mdpo.types import PairBatch

OF_A_TURN = 4


def turn_rewards(
    batch: PairBatch,
    policy: torch.Tensor,
    reference: torch.Tensor,
    beta: float,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """β · Σ over a turn's tokens of (log π − log π_ref), each token's times its turn's weight and `weights`, for both
    sides of B pairs: float64 (B, 4K), K the most turns of a side. `policy`, `reference`, `weights` are (S,), in nats.
    Over the turns of a side they add up to the side's reward.

    Example: chosen's tokens a, b | c with log ratios 1, 2 | 3 (two turns), rejected's d with 5, β = 0.1:
    [[0.3, 0.5, 2, 1, 0.3, 0, 1, 0]].
    """
    ratios = (policy.detach().double() - reference.detach().double()) * beta
    for weight in (batch.turn_weight, weights):
        ratios = ratios if weight is None else ratios * weight
    tokens, turn = batch.turn_tokens, batch.turn  # (2B, K), (S,)
    if tokens is None or turn is None:
        raise ValueError("turn_rewards: the batch has no turns")
    turns, pairs = tokens.size(1), batch.n_pairs
    index = batch.sequence_of_token * turns + turn
    rewards = ratios.new_zeros(tokens.numel()).index_add(0, index, ratios)
    both = torch.cat([rewards.view(2, pairs, turns), tokens.view(2, pairs, turns).double()])  # (4, B, K)
    return both.permute(1, 2, 0).reshape(pairs, OF_A_TURN * turns)


def pad_and_cat(tables: list[torch.Tensor]) -> torch.Tensor:
    """Per-pair tables one below the other; those of fewer turns are padded with zeros on the right."""
    width = max(table.size(1) for table in tables)
    return torch.cat([torch.nn.functional.pad(table, (0, width - table.size(1))) for table in tables])


def turn_figures(turns: torch.Tensor, margins: torch.Tensor) -> dict[str, float]:
    """From `turn_rewards` of P pairs (P, 4K) and their whole margins (P,):

    margins/turn_k, pairs/turn_k: chosen's reward of turn k minus rejected's, mean over the pairs both sides of which
        have that turn, and how many these are
    accuracies/n_turns, margins/n_turns, pairs/n_turns: of the pairs whose chosen side has n turns, for whole pairs
    """
    chosen, rejected, chosen_tokens, rejected_tokens = turns.view(len(turns), -1, OF_A_TURN).unbind(2)  # (P, K) each
    metrics: dict[str, float] = {}
    for k in range(chosen.size(1)):
        both = (chosen_tokens[:, k] > 0) & (rejected_tokens[:, k] > 0)
        if both.any():
            metrics[f"margins/turn_{k + 1}"] = (chosen - rejected)[both, k].mean().item()
            metrics[f"pairs/turn_{k + 1}"] = int(both.sum())
    n_turns = (chosen_tokens > 0).sum(1)
    for n in n_turns.unique().tolist():
        selected = margins[n_turns == n]
        metrics[f"accuracies/{n}_turns"] = (selected > 0).double().mean().item()
        metrics[f"margins/{n}_turns"] = selected.mean().item()
        metrics[f"pairs/{n}_turns"] = len(selected)
    return metrics
