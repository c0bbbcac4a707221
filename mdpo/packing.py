"""B tokenised pairs → one batch for the model. The padded layout; every position to be scored stands in a list."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

CHOSEN, REJECTED = 0, 1
SIDES = ("chosen", "rejected")
REFERENCE = {side: f"reference_{side}_logps" for side in SIDES}  # columns of log-probs, one for each scored token


@dataclass
class PairCollator:
    """Rows of a tokenised set → a padded batch of B pairs, as a dict of tensors (int64):

    input_ids, attention_mask, completion_mask (2B, T): rows 0 … B-1 are the chosen sides, B … 2B-1 the rejected ones;
        completion_mask is 1 where a token is supervised, in holes if need be
    score_index (S,): for each supervised token its predecessor's place in the flattened (2B · T) hidden states
    score_target, score_pair, score_side (S,): the token's id, its pair 0 … B-1, its side (0 chosen, 1 rejected)
    score_weight (S,): float32, only where a turn's weight is not 1
    score_reference (S,): float32, the reference's log-probs, only where the set holds them
    margin (B,): float32, only where the rows have margins
    row (B,): the pair's number in its set

    Example: chosen [7, 8, 9] with mask [0, 0, 1], rejected [7, 8] with mask [0, 1], T = 3:
    score_index [1, 3], score_target [9, 8], score_pair [0, 0], score_side [0, 1].
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        sides = [(row[f"{side}_ids"], row[f"{side}_mask"]) for side in SIDES for row in rows]
        ids = self._pad([ids for ids, _ in sides], self.pad_token_id)
        completion = self._pad([mask for _, mask in sides], 0)
        attention = self._pad([[1] * len(ids) for ids, _ in sides], 0)
        batch = {"input_ids": ids, "attention_mask": attention, "completion_mask": completion}
        batch |= score_list(ids, completion)
        batch["row"] = torch.tensor([row.get("row", -1) for row in rows])
        if any(row.get(f"{side}_weights") for side in SIDES for row in rows):
            weights = [row[f"{side}_weights"] or [1.0] * len(row[f"{side}_ids"]) for side in SIDES for row in rows]
            batch["score_weight"] = self._pad(weights, 1.0, torch.float32).flatten()[batch["score_index"] + 1]
        if REFERENCE["chosen"] in rows[0]:
            logps = [torch.tensor(row[REFERENCE[side]], dtype=torch.float32) for side in SIDES for row in rows]
            batch["score_reference"] = torch.cat(logps)
        if all(row.get("margin") is not None for row in rows):
            batch["margin"] = torch.tensor([row["margin"] for row in rows], dtype=torch.float32)
        return batch

    def _pad(self, lists: list[list], value: float, dtype: torch.dtype = torch.long) -> torch.Tensor:
        padded = pad_sequence([torch.tensor(x, dtype=dtype) for x in lists], True, value)
        extra = -padded.size(1) % (self.pad_to_multiple_of or 1)
        return torch.nn.functional.pad(padded, (0, extra), value=value)


def score_list(input_ids: torch.Tensor, completion_mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """The score_* tensors of PairCollator from padded ids and mask (2B, T), in row order. A supervised token at the
    very start has no predecessor and is left out, as in every causal language model."""
    rows, columns = completion_mask[:, 1:].nonzero(as_tuple=True)  # column t scores token t + 1
    pairs = input_ids.size(0) // 2
    return {
        "score_index": rows * input_ids.size(1) + columns,
        "score_target": input_ids[rows, columns + 1],
        "score_pair": rows % pairs,
        "score_side": rows // pairs,
    }
