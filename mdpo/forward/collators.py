"""B tokenized pairs → one batch for the model: packed into one row, each distinct token once, or padded, the reference
implementation.

Both list the positions to be scored, and the lists name the same tokens in the same order.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from mdpo.forward.forest import Forest, apart, part, plant
from mdpo.types import SIDES, PairBatch, sequence_lengths, split, turn_begins

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
        ids, masks = (_by_sequence(rows, name) for name in ("ids", "mask"))
        batch = PairBatch(
            input_ids=self._pad(ids, self.pad_token_id),
            attention_mask=self._pad([[1] * len(sequence) for sequence in ids], 0),
            completion_mask=self._pad(masks, 0),
            lengths=[len(sequence) for sequence in ids],
            sequences=_sequences(rows),
        )
        return batch.with_labels() | of_rows(rows)

    def _pad(self, lists: list[Any], value: int) -> torch.Tensor:
        padded = pad_sequence([torch.tensor(x, dtype=torch.long) for x in lists], True, value)
        extra = -padded.size(1) % (self.pad_to_multiple_of or 1)
        return torch.nn.functional.pad(padded, (0, extra), value=value)


@dataclass
class PackedCollator:
    """Rows of a tokenized dataset → a packed PairBatch: one row of N tokens without padding, the forest of all its
    sequences, planted pair by pair, chosen first. A token is scored once, in however many sequences it is supervised.

    Example: chosen [5, 6, 7, 8], rejected [5, 6, 9] with masks [0, 1, 1, 1] and [0, 1, 1]: input_ids [5, 6, 7, 8, 9],
    position_ids [0, 1, 2, 3, 2], runs [[4, -1], [1, 1]], ends [3, 4]; 6 and 7 of chosen are read at indices 0 and 1, 8
    at 2, and 9 at 1 again: logp_position [0, 1, 2, 1], label [6, 7, 8, 9], unique_index [0, 1, 2, 0, 3],
    sequence_position [0, 1, 2, 0, 1]. Not `shared`, each sequence has its own tokens.
    """

    shared: bool = True

    def __call__(self, rows: list[dict[str, Any]]) -> PairBatch:
        sequences = [np.asarray(ids, np.int64) for ids in _by_sequence(rows, "ids")]
        counts, lengths = _sequences(rows), [len(ids) for ids in sequences]
        first = [0, *accumulate(counts)]
        sides = [side for pair in range(len(rows)) for side in (pair, len(rows) + pair)]
        order = [i for side in sides for i in range(first[side], first[side + 1])]
        planted = (plant if self.shared else apart)([sequences[i] for i in order])
        ends = [planted.ends[i] for i in np.argsort(order)]
        path = np.concatenate(Forest(planted.runs, ends).paths)
        scored = np.flatnonzero(np.concatenate([_scored(row, side) for side in SIDES for row in rows]))
        sequence = np.repeat(np.arange(len(lengths)), lengths)[scored]
        side = np.repeat(np.arange(len(counts)), counts)[sequence]
        tensors = {
            "input_ids": planted.ids[None],  # first: accelerate takes the batch's size from it
            "position_ids": planted.positions[None],
            **_unique(read=path[scored - 1], target=path[scored], ids=planted.ids),
            "pair": side % len(rows),
            "side": side // len(rows),
            "sequence": sequence,
            "sequence_position": scored - 1 - np.asarray([0, *accumulate(lengths)])[sequence],
        }
        batch = PairBatch({name: torch.from_numpy(x) for name, x in tensors.items()})
        batch |= {"runs": planted.runs, "ends": ends, "lengths": lengths, "sequences": counts}
        return batch | of_rows(rows)


def _by_sequence(rows: list[dict[str, Any]], name: str) -> list[Any]:
    """Ids or masks of all sequences, in the order of a batch."""
    return [x for side in SIDES for row in rows for x in split(row[f"{side}_{name}"], sequence_lengths(row, side))]


def _sequences(rows: list[dict[str, Any]]) -> list[int]:
    return [len(sequence_lengths(row, side)) for side in SIDES for row in rows]


def _scored(row: dict[str, Any], side: str) -> np.ndarray:
    """Which tokens of a side are scored, bool: the supervised ones but the first of a sequence, which nothing
    predicts."""
    mask = np.array(row[f"{side}_mask"], bool)
    mask[[0, *accumulate(sequence_lengths(row, side)[:-1])]] = False
    return mask


def _unique(read: np.ndarray, target: np.ndarray, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Of S supervised tokens, as indices in the row, and their predecessors, those U that are computed, in the order in
    which they first occur."""
    _, first, index = np.unique(target, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.argsort(order)
    first = first[order]
    return {"logp_position": read[first], "label": ids[target[first]], "unique_index": rank[index]}


def of_rows(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The fields that both layouts share, besides the tokens: row, turns, and where there are any, margins, weights and
    log-probs of the reference."""
    fields = {"row": torch.tensor([row.get("row", -1) for row in rows]), **_turns(rows)}
    if any(row.get(f"{side}_weights") for side in SIDES for row in rows):
        weights = [_weights(row, side)[_scored(row, side)] for side in SIDES for row in rows]
        fields["turn_weight"] = torch.from_numpy(np.concatenate(weights))
    if REFERENCE["chosen"] in rows[0]:
        logps = [torch.tensor(row[REFERENCE[side]], dtype=torch.float32) for side in SIDES for row in rows]
        fields["reference_logp"] = torch.cat(logps)
    if all(row.get("margin") is not None for row in rows):
        fields["margin"] = torch.tensor([row["margin"] for row in rows], dtype=torch.float32)
    if any(row.get("weight") not in (None, 1) for row in rows):
        pair_weights = [1.0 if row.get("weight") is None else row["weight"] for row in rows]
        fields["pair_weight"] = torch.tensor(pair_weights, dtype=torch.float32)
    return fields


def _weights(row: dict[str, Any], side: str) -> np.ndarray:
    """The weight of each token of a side, float32."""
    return np.asarray(row.get(f"{side}_weights") or np.ones(len(row[f"{side}_mask"])), np.float32)


def _turns(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """turn and turn_tokens: turns are runs of ones in a sequence's mask, without the tokens of weight 0; they are
    counted through all sequences of a side. None goes on in the next sequence: its first token is not scored."""
    numbers, tokens = [], []
    for row, side in ((row, side) for side in SIDES for row in rows):
        scored = _scored(row, side)
        counts = scored & (_weights(row, side) != 0)
        number = np.maximum(np.cumsum(turn_begins(counts)) - 1, 0)
        numbers.append(number[scored])
        tokens.append(np.bincount(number[counts]))
    table = np.zeros((len(tokens), max(1, *map(len, tokens))), np.int64)
    for line, side_tokens in zip(table, tokens, strict=True):
        line[: len(side_tokens)] = side_tokens
    return {"turn": torch.from_numpy(np.concatenate(numbers)), "turn_tokens": torch.from_numpy(table)}


def unpacked(batch: PairBatch, pad_token_id: int) -> PairBatch:
    """A packed batch in the padded layout, as the reference implementation has the same pairs."""
    paths, device = Forest(batch.runs, batch.ends).paths, batch.input_ids.device
    index = np.full((len(paths), max(map(len, paths))), -1)
    for line, path in zip(index, paths, strict=True):
        line[: len(path)] = path
    places = torch.from_numpy(index).to(device, non_blocking=True)
    kept = ("pair", "side", "turn_weight", "reference_logp", "turn", "turn_tokens", "margin", "pair_weight", "row")
    return PairBatch({name: batch[name] for name in (*kept, "lengths", "sequences") if name in batch}) | {
        "input_ids": torch.where(places >= 0, batch.input_ids[0, places], pad_token_id),
        "attention_mask": (places >= 0).long(),
        "logp_position": batch.sequence * places.size(1) + batch.sequence_position,
        "label": batch.label[batch.unique_index],
    }


def first_pairs(batch: PairBatch, n: int, tokens: int) -> PairBatch:
    """The first `n` pairs of a packed batch, and of each sequence the first `tokens`, packed; without the rows' other
    fields."""
    kept = [i for i, side in enumerate(batch.sides) if side % batch.n_pairs < n]
    index, runs, ends = part(Forest(batch.runs, batch.ends), kept, tokens)
    selected = (batch.pair < n) & (batch.sequence_position < tokens - 1)
    used, unique_index = batch.unique_index[selected].unique(return_inverse=True)
    device = batch.input_ids.device
    places, sequences = (torch.as_tensor(x, device=device) for x in (index, kept))
    fields = {name: batch[name][selected] for name in ("pair", "side", "sequence_position")}
    fields |= {name: batch[name][:, places] for name in ("input_ids", "position_ids")}
    fields |= {"label": batch.label[used], "unique_index": unique_index}
    fields |= {
        "logp_position": torch.searchsorted(places, batch.logp_position[used]),
        "sequence": torch.searchsorted(sequences, batch.sequence[selected]),
    }
    counts = [count for side, count in enumerate(batch["sequences"]) if side % batch.n_pairs < n]
    lengths = [min(batch["lengths"][i], tokens) for i in kept]
    return PairBatch(fields, runs=runs, ends=ends, lengths=lengths, sequences=counts)
