"""What shows that a policy breaks: log-probs by token, entropy, and how likely it still is to end its turns.

DPO's loss sees margins alone. They also grow where both sides grow less likely, or where the policy no longer stops.
"""

import torch

from mdpo.forward.pair_logps import counted
from mdpo.forward.token_logps import TokenScores
from mdpo.types import PairBatch

# Columns of a per-pair table: sums over supervised tokens whose turn's weight is not 0, none of them weighted.
HEALTH = (
    "chosen_nats",  # log π
    "rejected_nats",
    "chosen_log_ratio",  # log π − log π_ref
    "rejected_log_ratio",
    "chosen_entropy",
    "stops",  # how many turns the chosen side has; the next two are sums over their last tokens
    "stop_nats",
    "stop_log_ratio",
)


def health_columns(batch: PairBatch, scores: TokenScores, reference: torch.Tensor) -> list[torch.Tensor]:
    """HEALTH for B pairs, each float64 (B,), without gradient. `reference` has the reference's log-probs of the batch's
    S supervised tokens (S,), nats. Batches without turns, of a foreign collator, have no stops."""
    n, sequence, used = batch.n_pairs, batch.sequence_of_token, counted(batch)
    logps = scores.logps.detach().double()
    ratios = logps - reference.double()

    def sums(values: torch.Tensor) -> torch.Tensor:  # (S,) -> chosen, rejected (2, B)
        return values.new_zeros(2 * n).index_add(0, sequence, values * used).view(2, n)

    entropy = torch.zeros_like(logps) if scores.entropy is None else scores.entropy.double()
    last = last_of_turns(batch).double()
    stops = [sums(values)[0] for values in (last, logps * last, ratios * last)]
    return [*sums(logps), *sums(ratios), sums(entropy)[0], *stops]


def last_of_turns(batch: PairBatch) -> torch.Tensor:
    """True for the last token of each turn, (S,): its stop, unless the turn was cut. All False without turns.

    Example: a side's tokens a, b | c in two turns: [False, True, True]."""
    if batch.turn is None or batch.turn_tokens is None:
        return torch.zeros_like(batch.pair, dtype=torch.bool)
    turns = batch.turn_tokens.size(1)
    turn, used = batch.sequence_of_token * turns + batch.turn, counted(batch)
    place = torch.arange(len(turn), device=turn.device)
    last = place.new_full((2 * batch.n_pairs * turns,), -1).scatter_reduce(
        0, turn, torch.where(used, place, -1), "amax"
    )
    return used & (last[turn] == place)


def health_figures(column: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """From the columns of a table of P pairs, each (P,), scalars: means over tokens of both sides' log-probs and log
    ratios (nats a token) and of chosen's entropy (nats), and over chosen's turns of what their last tokens have (nats).
    Names without a token or a turn are left out."""
    tokens = {side: column[f"{side}_tokens"].sum() for side in ("chosen", "rejected")}
    figures = {f"logps_per_token/{side}": (column[f"{side}_nats"].sum(), tokens[side]) for side in tokens}
    figures |= {f"log_ratios_per_token/{side}": (column[f"{side}_log_ratio"].sum(), tokens[side]) for side in tokens}
    figures["entropy/chosen"] = (column["chosen_entropy"].sum(), tokens["chosen"])
    stops = column["stops"].sum()
    figures["stop_logps/chosen"] = (column["stop_nats"].sum(), stops)
    figures["stop_log_ratios/chosen"] = (column["stop_log_ratio"].sum(), stops)
    return {name: total / count for name, (total, count) in figures.items() if count}


def health_names() -> set[str]:
    """What `health_figures` has of a table with tokens and turns."""
    columns = (*HEALTH, "chosen_tokens", "rejected_tokens")
    return set(health_figures(dict.fromkeys(columns, torch.ones(1))))
