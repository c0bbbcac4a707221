"""B tokenised pairs → one batch for the model: packed in one row, each shared prefix once, or padded, its slow twin.

In both, every position to be scored stands in a list, and the lists of both layouts name the same tokens in one order.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from mdpo.types import SIDES, turn_begins

CHOSEN, REJECTED = 0, 1
REFERENCE = {side: f"reference_{side}_logps" for side in SIDES}  # columns of log-probs, one for each scored token


@dataclass
class PairCollator:
    """Rows of a tokenised set → a padded batch of B pairs, as a dict of tensors (int64) and Python numbers, which a GPU
    need not be asked for:

    input_ids, attention_mask, completion_mask (2B, T): rows 0 … B-1 are the chosen sides, B … 2B-1 the rejected ones;
        completion_mask is 1 where a token is supervised, in holes if need be
    lengths: the tokens of each row, 2B numbers
    score_index (S,): for each supervised token its predecessor's place in the flattened (2B · T) hidden states
    score_target, score_pair, score_side (S,): the token's id, its pair 0 … B-1, its side (0 chosen, 1 rejected)
    score_weight (S,): float32, only where a turn's weight is not 1
    score_reference (S,): float32, the reference's log-probs, only where the set holds them
    score_turn (S,): the number of each token's turn in its side, from 0
    turn_tokens (2B, T): how many tokens each turn has; T is the most turns of a side. A turn of weight 0 is none
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
        batch["lengths"] = [len(ids) for ids, _ in sides]
        batch |= score_list(ids, completion)
        return batch | of_rows(rows)

    def _pad(self, lists: list[list[int]], value: int) -> torch.Tensor:
        padded = pad_sequence([torch.tensor(x, dtype=torch.long) for x in lists], True, value)
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


@dataclass
class PackedCollator:
    """Rows of a tokenised set → one row of N tokens without padding, as a dict of tensors (int64) and Python numbers:

    input_ids, position_ids (1, N): for each pair its shared prefix, the rest of chosen, the rest of rejected; positions
        of both rests go on where the prefix ends
    segments: the lengths of those three, a list for each pair. A prefix ends at the latest before a side's last token
    score_index, score_target (U,): predecessor's place in the row, and id, of each token that is scored; supervised
        tokens of the prefix stand there once
    score_source (S,): for each supervised token of a side, in PairCollator's order, its place among those U
    score_column (S,): its predecessor's place in its own side
    and PairCollator's score_pair, score_side, score_weight, score_reference, score_turn (S,), turn_tokens, margin, row

    Example: chosen [5, 6, 7, 8], rejected [5, 6, 9] with masks [0, 1, 1, 1] and [0, 1, 1], so the prefix is [5, 6]:
    input_ids [5, 6, 7, 8, 9], position_ids [0, 1, 2, 3, 2], segments [2, 2, 1]; 6 and 7 of chosen are read from places
    0 and 1, 8 from 2, and 9 from 1 again: score_index [0, 1, 2, 1], score_target [6, 7, 8, 9],
    score_source [0, 1, 2, 0, 3].
    """

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids, positions, segments, sides = [], [], [], ([], [])
        for row in rows:
            chosen, rejected = row["chosen_ids"], row["rejected_ids"]
            start, shared = len(ids), min(row["shared_len"], len(chosen) - 1, len(rejected) - 1)
            apart = len(chosen) - shared  # by how much rejected's own tokens stand further back in the row
            ids += chosen + rejected[shared:]
            positions += [*range(len(chosen)), *range(shared, len(rejected))]
            segments.append([shared, apart, len(rejected) - shared])
            for found, mask, jump in zip(sides, (row["chosen_mask"], row["rejected_mask"]), (0, apart), strict=True):
                t = np.flatnonzero(np.asarray(mask[1:])) + 1
                found.append({"t": t, "read": start + t - 1 + jump * (t > shared), "shared": t < shared})
                found[-1]["target"] = start + t + jump * (t >= shared)
        lists = _score_lists(*sides)
        batch = {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([positions])}
        batch |= {"segments": segments, **{name: torch.from_numpy(x) for name, x in lists.items()}}
        batch["score_target"] = batch["input_ids"][0, batch["score_target"]]
        return batch | of_rows(rows)


def _score_lists(chosen: list[dict], rejected: list[dict]) -> dict[str, np.ndarray]:
    """The score_* lists of PackedCollator, with score_target as places in the row. Of the rejected sides those tokens
    are scored that stand behind the prefix; the others are the first entries of the pair's chosen side."""
    first = np.cumsum([0, *(len(side["t"]) for side in chosen)])  # of each pair, among the chosen sides' entries
    own = [~side["shared"] for side in rejected]
    n_own = np.cumsum([first[-1], *(mask.sum() for mask in own)])
    source = [np.arange(first[-1])]
    for begin, own_begin, mask in zip(first, n_own, own, strict=False):
        source.append(np.where(mask, own_begin + np.cumsum(mask) - 1, begin + np.arange(len(mask))))
    every = [*chosen, *rejected]
    entries = {
        name: [side[name] for side in chosen] + [side[name][mask] for side, mask in zip(rejected, own, strict=True)]
        for name in ("read", "target")
    }
    counts, pairs = [len(side["t"]) for side in every], np.tile(np.arange(len(chosen)), 2)
    return {
        "score_index": np.concatenate(entries["read"]),
        "score_target": np.concatenate(entries["target"]),
        "score_source": np.concatenate(source),
        "score_pair": np.repeat(pairs, counts),
        "score_side": np.repeat(np.repeat([CHOSEN, REJECTED], len(chosen)), counts),
        "score_column": np.concatenate([side["t"] - 1 for side in every]),
    }


def of_rows(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """What both layouts take from the rows beside the tokens: row, turns, and where there are any, margin, score_*."""
    found = {"row": torch.tensor([row.get("row", -1) for row in rows]), **_turns(rows)}
    if any(row.get(f"{side}_weights") for side in SIDES for row in rows):
        sides = [(row[f"{side}_mask"], row[f"{side}_weights"]) for side in SIDES for row in rows]
        weights = [weights[t] if weights else 1.0 for mask, weights in sides for t in range(1, len(mask)) if mask[t]]
        found["score_weight"] = torch.tensor(weights, dtype=torch.float32)
    if REFERENCE["chosen"] in rows[0]:
        logps = [torch.tensor(row[REFERENCE[side]], dtype=torch.float32) for side in SIDES for row in rows]
        found["score_reference"] = torch.cat(logps)
    if all(row.get("margin") is not None for row in rows):
        found["margin"] = torch.tensor([row["margin"] for row in rows], dtype=torch.float32)
    return found


def _turns(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """score_turn and turn_tokens: turns are runs of ones in a mask, without the tokens of weight 0."""
    numbers, tokens = [], []
    for row, side in ((row, side) for side in SIDES for row in rows):
        scored = np.asarray(row[f"{side}_mask"][1:], bool)
        weights = row.get(f"{side}_weights")
        counts = scored & (np.asarray(weights[1:]) != 0) if weights else scored
        number = np.maximum(np.cumsum(turn_begins(counts)) - 1, 0)
        numbers.append(number[scored])
        tokens.append(np.bincount(number[counts]))
    table = np.zeros((len(tokens), max(1, *map(len, tokens))), np.int64)
    for line, of_side in zip(table, tokens, strict=True):
        line[: len(of_side)] = of_side
    return {"score_turn": torch.from_numpy(np.concatenate(numbers)), "turn_tokens": torch.from_numpy(table)}


def unpacked(batch: dict[str, torch.Tensor], pad_token_id: int) -> dict[str, torch.Tensor]:
    """A packed batch in the padded layout: what the slow twin makes of the same pairs."""
    segments = batch["segments"]
    chosen, rejected, at = [], [], 0
    for prefix, c, r in segments:
        row = batch["input_ids"][0, at : at + prefix + c + r]
        chosen.append(row[: prefix + c])
        rejected.append(torch.cat([row[:prefix], row[prefix + c :]]))
        at += prefix + c + r
    ids = pad_sequence(chosen + rejected, True, pad_token_id)
    lengths = [len(side) for side in chosen + rejected]
    ends = torch.tensor(lengths).to(ids.device, non_blocking=True)
    attention = (torch.arange(ids.size(1), device=ids.device)[None] < ends[:, None]).long()
    places = batch["score_side"] * len(segments) + batch["score_pair"]
    kept = ("score_pair", "score_side", "score_weight", "score_reference", "score_turn", "turn_tokens", "margin", "row")
    return {name: batch[name] for name in kept if name in batch} | {
        "input_ids": ids,
        "attention_mask": attention,
        "lengths": lengths,
        "score_index": places * ids.size(1) + batch["score_column"],
        "score_target": batch["score_target"][batch["score_source"]],
    }


def first_pairs(batch: dict[str, torch.Tensor], n: int) -> dict[str, torch.Tensor]:
    """The first `n` pairs of a packed batch, packed; without what the rows hold beside their tokens."""
    segments = batch["segments"][:n]
    kept = batch["score_pair"] < n
    used, source = batch["score_source"][kept].unique(return_inverse=True)
    lists = {name: batch[name][kept] for name in ("score_pair", "score_side", "score_column")}
    lists |= {name: batch[name][used] for name in ("score_index", "score_target")}
    row = {name: batch[name][:, : sum(map(sum, segments))] for name in ("input_ids", "position_ids")}
    return {**row, **lists, "score_source": source, "segments": segments}


def n_pairs(batch: dict[str, torch.Tensor]) -> int:
    """B of a batch in either layout."""
    return len(batch["segments"]) if "segments" in batch else batch["input_ids"].size(0) // 2


def n_tokens(batch: dict[str, torch.Tensor]) -> int:
    """Tokens of both sides of all pairs, the shared ones counted for each side, padding not."""
    return sum(pair_lengths(batch))


def pair_lengths(batch: dict[str, torch.Tensor]) -> list[int]:
    """Tokens of both sides of each pair, the shared ones counted for each side."""
    if "segments" in batch:
        return [2 * prefix + chosen + rejected for prefix, chosen, rejected in batch["segments"]]
    rows = batch["lengths"] if "lengths" in batch else batch["attention_mask"].sum(1).tolist()  # a foreign collator's
    return [chosen + rejected for chosen, rejected in zip(rows[: len(rows) // 2], rows[len(rows) // 2 :], strict=True)]


def on_device(batch: Mapping[str, Any], device) -> dict[str, Any]:
    """The batch with its tensors on a device."""
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
