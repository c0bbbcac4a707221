"""What is logged, under TRL's names, and how it is averaged: over pairs or over tokens, and over all ranks."""

import torch
from torch.nn.functional import pad

from mdpo.forward.pair_logps import counted
from mdpo.forward.token_logps import TokenScores
from mdpo.loss.health import HEALTH, health_columns, health_figures
from mdpo.loss.registry import PairTerms
from mdpo.loss.turn_metrics import pad_and_cat, turn_figures
from mdpo.ranks import gathered_tensor
from mdpo.types import SIDES, PairBatch

# One float64 row for each pair; those after the first six are sums over the side's supervised tokens.
COLUMNS = (
    "row",  # the pair's number in its dataset
    "loss",
    "chosen_reward",
    "rejected_reward",
    "chosen_logps",
    "rejected_logps",
    "chosen_tokens",
    "rejected_tokens",
    "entropy",
    "chosen_logits",
    "rejected_logits",
    "chosen_top1",
    "nll",
    "aux_loss",  # the batch's, of a mixture of experts; else 0
    *HEALTH,
)


def pair_table(
    batch: PairBatch,
    scores: TokenScores,
    losses: torch.Tensor,
    terms: PairTerms,
    nll: torch.Tensor,
    reference: torch.Tensor,
    turns: torch.Tensor | None = None,
) -> torch.Tensor:
    """COLUMNS for the B pairs of a batch, float64 (B, len(COLUMNS)), on the batch's device, without gradient.
    `losses` and `nll` are (B,), `reference` the reference's log-probs of all supervised tokens (S,). Tokens whose turn
    has weight 0 are left out, as if they were masked. `turns`, of `mdpo.loss.turn_metrics`, come after COLUMNS."""
    n = len(losses)
    sequence, logps = batch.sequence_of_token, terms.policy

    def by_side(values):  # (S,) -> chosen (B,), rejected (B,)
        values = values.double() * counted(batch)
        return values.new_zeros(2 * n).index_add(0, sequence, values).view(2, n)

    logits, top1, entropy = by_side(scores.mean_logit), by_side(scores.top1), by_side(scores.entropy)
    columns = (
        torch.full((n,), -1, device=losses.device) if batch.row is None else batch.row,
        losses,
        terms.chosen_reward,
        terms.rejected_reward,
        logps.chosen,
        logps.rejected,
        logps.chosen_tokens,
        logps.rejected_tokens,
        entropy.sum(0),
        *logits,
        top1[0],
        nll,
        torch.zeros_like(nll) if scores.aux_loss is None else scores.aux_loss.expand(n),
        *health_columns(batch, scores, reference),
    )
    table = torch.stack([c.detach().double() for c in columns], dim=1)
    return table if turns is None else torch.cat([table, turns], dim=1)


def summarize(table: torch.Tensor) -> dict[str, float]:
    """TRL's metrics of a per-pair table, then those by turn where the table has turns."""
    return {**averages(table), **_by_turn(table)}


def averages(table: torch.Tensor) -> dict[str, float]:
    """Means over pairs; entropy, logits and accuracy over tokens. Of a table with turns also `health_figures`."""
    column = dict(zip(COLUMNS, table.unbind(1), strict=False))
    tokens = {side: column[f"{side}_tokens"].sum().clamp(min=1) for side in SIDES}
    margins = column["chosen_reward"] - column["rejected_reward"]
    metrics = {
        "entropy": column["entropy"].sum() / (tokens["chosen"] + tokens["rejected"]),
        "logits/chosen": column["chosen_logits"].sum() / tokens["chosen"],
        "logits/rejected": column["rejected_logits"].sum() / tokens["rejected"],
        "mean_token_accuracy": column["chosen_top1"].sum() / tokens["chosen"],
        "rewards/chosen": column["chosen_reward"].mean(),
        "rewards/rejected": column["rejected_reward"].mean(),
        "rewards/accuracies": (margins > 0).double().mean(),
        "rewards/margins": margins.mean(),
        "logps/chosen": column["chosen_logps"].mean(),
        "logps/rejected": column["rejected_logps"].mean(),
        "nll_loss": column["nll"].mean(),
        "aux_loss": column["aux_loss"].mean(),
    }
    metrics |= health_figures(column) if table.size(1) > len(COLUMNS) else {}
    return {name: value.item() for name, value in metrics.items()}


def _by_turn(table: torch.Tensor) -> dict[str, float]:
    if table.size(1) == len(COLUMNS):
        return {}
    rewards = table[:, [COLUMNS.index("chosen_reward"), COLUMNS.index("rejected_reward")]]
    return turn_figures(table[:, len(COLUMNS) :], rewards[:, 0] - rewards[:, 1])


def of_all_ranks(tables: list[torch.Tensor], counts: list[int], device) -> tuple[list[list[torch.Tensor]], list[int]]:
    """(`tables[rank][i]`, each as its rank has it but for zeros at the right of narrower ones, float64 on the CPU; the
    sum of each of `counts` over ranks). All ranks call it together, with equally many tables; two collectives on
    `device`, of sizes and of numbers."""
    flat = [pad(table.to(device), (1, 0), value=i) for i, table in enumerate(tables)]  # its index in front of each row
    mine = pad_and_cat(flat) if flat else torch.zeros(0, 1, dtype=torch.float64, device=device)
    sizes = gathered_tensor(torch.tensor([*mine.shape, *counts], device=device)).tolist()
    rows, width = (max(size[i] for size in sizes) for i in (0, 1))
    padded = pad(mine, (0, width - mine.size(1), 0, rows - mine.size(0)))
    padded_parts = gathered_tensor(padded).cpu() if rows else padded.cpu()[None].expand(len(sizes), 0, width)
    parts = [part[: size[0]] for part, size in zip(padded_parts, sizes, strict=True)]
    split = [[part[part[:, 0] == i, 1:] for i in range(len(tables))] for part in parts]
    return split, [sum(size[2 + i] for size in sizes) for i in range(len(counts))]


def deduplicate(tables: list[torch.Tensor]) -> torch.Tensor:
    """The tables of all ranks as one, each pair once: the last batches are filled up with pairs from the start, so
    that every rank has the same number. Rows numbered −1 (a foreign collator's) cannot be told apart and all stay."""
    table = pad_and_cat(tables)
    seen: set[int] = set()
    keep = []
    for i, row in enumerate(table[:, 0].long().tolist()):
        if row < 0 or row not in seen:
            keep.append(i)
        seen.add(row)
    return table[keep]


def mean_over_steps(tables: list[list[torch.Tensor]]) -> dict[str, float]:
    """Training metrics as TRL logs them: each step's own averages over all ranks, averaged over the steps since the
    last log; metrics by turn over all pairs of these steps. `tables[rank][step]` has that step's pairs."""
    steps = [pad_and_cat(list(rank_tables)) for rank_tables in zip(*tables, strict=True)]
    if not steps:
        return {}
    means = [averages(step) for step in steps]
    return {name: sum(mean[name] for mean in means) / len(means) for name in means[0]} | _by_turn(pad_and_cat(steps))
