"""B tokenized pairs → one batch for the model: packed into one row, each shared prefix once, or padded, the
reference implementation.

Both list the positions to be scored, and the lists name the same tokens in the same order.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from mdpo.types import SIDES, PairBatch, turn_begins

CHOSEN, REJECTED = 0, 1
REFERENCE = {side: f"reference_{side}_logps" for side in SIDES}  # columns of log-probs, one for each scored token


@dataclass
class PairCollator:
    """Rows of a tokenized dataset → a padded PairBatch.

    Example: chosen [7, 8, 9] with mask [0, 0, 1], rejected [7, 8] with mask [0, 1], T = 3:
    logp_position [1, 3], label [9, 8], pair [0, 0], side [0, 1].
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> PairBatch:
        sides = [(row[f"{side}_ids"], row[f"{side}_mask"]) for side in SIDES for row in rows]
        batch = PairBatch(
            input_ids=self._pad([ids for ids, _ in sides], self.pad_token_id),
            attention_mask=self._pad([[1] * len(ids) for ids, _ in sides], 0),
            completion_mask=self._pad([mask for _, mask in sides], 0),
            lengths=[len(ids) for ids, _ in sides],
        )
        return batch.with_labels() | of_rows(rows)

    def _pad(self, lists: list[list[int]], value: int) -> torch.Tensor:
        padded = pad_sequence([torch.tensor(x, dtype=torch.long) for x in lists], True, value)
        extra = -padded.size(1) % (self.pad_to_multiple_of or 1)
        return torch.nn.functional.pad(padded, (0, extra), value=value)


@dataclass
class PackedCollator:
    """Rows of a tokenized dataset → a packed PairBatch: one row of N tokens without padding, for each pair its shared
    prefix, the rest of chosen, the rest of rejected. Positions of both rests continue where the prefix ends, which is
    before the last token of each side. Supervised tokens of the prefix are scored once.

    Example: chosen [5, 6, 7, 8], rejected [5, 6, 9] with masks [0, 1, 1, 1] and [0, 1, 1], so the prefix is [5, 6]:
    input_ids [5, 6, 7, 8, 9], position_ids [0, 1, 2, 3, 2], segments [2, 2, 1]; 6 and 7 of chosen are read at
    indices 0 and 1, 8 at 2, and 9 at 1 again: logp_position [0, 1, 2, 1], label [6, 7, 8, 9], unique_index
    [0, 1, 2, 0, 3], side_position [0, 1, 2, 0, 1].
    """

    def __call__(self, rows: list[dict[str, Any]]) -> PairBatch:
        ids: list[int] = []
        positions: list[int] = []
        segments: list[list[int]] = []
        sides: tuple[list[dict[str, np.ndarray]], list[dict[str, np.ndarray]]] = ([], [])
        for row in rows:
            chosen, rejected = row["chosen_ids"], row["rejected_ids"]
            start, shared = len(ids), min(row["shared_len"], len(chosen) - 1, len(rejected) - 1)
            offset = len(chosen) - shared  # how much later rejected's own tokens come in the row
            ids += chosen + rejected[shared:]
            positions += [*range(len(chosen)), *range(shared, len(rejected))]
            segments.append([shared, offset, len(rejected) - shared])
            for entries, mask, jump in zip(sides, (row["chosen_mask"], row["rejected_mask"]), (0, offset), strict=True):
                t = np.flatnonzero(np.asarray(mask[1:])) + 1
                entries.append({"t": t, "read": start + t - 1 + jump * (t > shared), "shared": t < shared})
                entries[-1]["target"] = start + t + jump * (t >= shared)
        input_ids = torch.tensor([ids])
        lists = {name: torch.from_numpy(x) for name, x in _supervised(*sides).items()}
        lists["label"] = input_ids[0, lists["label"]]
        batch = PairBatch(input_ids=input_ids, position_ids=torch.tensor([positions]), segments=segments, **lists)
        return batch | of_rows(rows)


def _supervised(chosen: list[dict], rejected: list[dict]) -> dict[str, np.ndarray]:
    """A packed batch's fields of U and of S supervised tokens, with `label` as indices into the row. Of the rejected
    sides only tokens after the prefix are scored; the others are the first entries of the pair's chosen side."""
    first = np.cumsum([0, *(len(side["t"]) for side in chosen)])  # of each pair, among the chosen sides' entries
    own = [~side["shared"] for side in rejected]
    n_own = np.cumsum([first[-1], *(mask.sum() for mask in own)])
    source = [np.arange(first[-1])]
    for begin, own_begin, mask in zip(first, n_own, own, strict=False):
        source.append(np.where(mask, own_begin + np.cumsum(mask) - 1, begin + np.arange(len(mask))))
    sides = [*chosen, *rejected]
    entries = {
        name: [side[name] for side in chosen] + [side[name][mask] for side, mask in zip(rejected, own, strict=True)]
        for name in ("read", "target")
    }
    counts, pairs = [len(side["t"]) for side in sides], np.tile(np.arange(len(chosen)), 2)
    return {
        "logp_position": np.concatenate(entries["read"]),
        "label": np.concatenate(entries["target"]),
        "unique_index": np.concatenate(source),
        "pair": np.repeat(pairs, counts),
        "side": np.repeat(np.repeat([CHOSEN, REJECTED], len(chosen)), counts),
        "side_position": np.concatenate([side["t"] - 1 for side in sides]),
    }


def of_rows(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The fields that both layouts share, besides the tokens: row, turns, and where there are any, margins, weights and
    log-probs of the reference."""
    fields = {"row": torch.tensor([row.get("row", -1) for row in rows]), **_turns(rows)}
    if any(row.get(f"{side}_weights") for side in SIDES for row in rows):
        sides = [(row[f"{side}_mask"], row[f"{side}_weights"]) for side in SIDES for row in rows]
        weights = [weights[t] if weights else 1.0 for mask, weights in sides for t in range(1, len(mask)) if mask[t]]
        fields["turn_weight"] = torch.tensor(weights, dtype=torch.float32)
    if REFERENCE["chosen"] in rows[0]:
        logps = [torch.tensor(row[REFERENCE[side]], dtype=torch.float32) for side in SIDES for row in rows]
        fields["reference_logp"] = torch.cat(logps)
    if all(row.get("margin") is not None for row in rows):
        fields["margin"] = torch.tensor([row["margin"] for row in rows], dtype=torch.float32)
    if any(row.get("weight") not in (None, 1) for row in rows):
        pair_weights = [1.0 if row.get("weight") is None else row["weight"] for row in rows]
        fields["pair_weight"] = torch.tensor(pair_weights, dtype=torch.float32)
    return fields


def _turns(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """turn and turn_tokens: turns are runs of ones in a mask, without the tokens of weight 0."""
    numbers, tokens = [], []
    for row, side in ((row, side) for side in SIDES for row in rows):
        scored = np.asarray(row[f"{side}_mask"][1:], bool)
        weights = row.get(f"{side}_weights")
        counts = scored & (np.asarray(weights[1:]) != 0) if weights else scored
        number = np.maximum(np.cumsum(turn_begins(counts)) - 1, 0)
        numbers.append(number[scored])
        tokens.append(np.bincount(number[counts]))
    table = np.zeros((len(tokens), max(1, *map(len, tokens))), np.int64)
    for line, side_tokens in zip(table, tokens, strict=True):
        line[: len(side_tokens)] = side_tokens
    return {"turn": torch.from_numpy(np.concatenate(numbers)), "turn_tokens": torch.from_numpy(table)}


def unpacked(batch: PairBatch, pad_token_id: int) -> PairBatch:
    """A packed batch in the padded layout, as the reference implementation has the same pairs."""
    chosen, rejected, start = [], [], 0
    for prefix, c, r in batch.segments:
        row = batch.input_ids[0, start : start + prefix + c + r]
        chosen.append(row[: prefix + c])
        rejected.append(torch.cat([row[:prefix], row[prefix + c :]]))
        start += prefix + c + r
    ids = pad_sequence(chosen + rejected, True, pad_token_id)
    lengths = [len(side) for side in chosen + rejected]
    ends = torch.tensor(lengths).to(ids.device, non_blocking=True)
    attention = (torch.arange(ids.size(1), device=ids.device)[None] < ends[:, None]).long()
    unchanged = ("pair", "side", "turn_weight", "reference_logp", "turn", "turn_tokens", "margin", "pair_weight", "row")
    return PairBatch({name: batch[name] for name in unchanged if name in batch}) | {
        "input_ids": ids,
        "attention_mask": attention,
        "lengths": lengths,
        "logp_position": batch.sequence_of_token * ids.size(1) + batch.side_position,
        "label": batch.label[batch.unique_index],
    }


def first_pairs(batch: PairBatch, n: int) -> PairBatch:
    """The first `n` pairs of a packed batch, packed; without the rows' other fields."""
    segments = batch.segments[:n]
    selected = batch.pair < n
    used, index = batch.unique_index[selected].unique(return_inverse=True)
    lists = {name: batch[name][selected] for name in ("pair", "side", "side_position")}
    lists |= {name: batch[name][used] for name in ("logp_position", "label")}
    row = {name: batch[name][:, : sum(map(sum, segments))] for name in ("input_ids", "position_ids")}
    return PairBatch({**row, **lists, "unique_index": index, "segments": segments})
