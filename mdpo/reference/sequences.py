"""The sequences of a tokenized dataset: what each is cached under, and the batches in which those are scored that are
not cached."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import xxhash
from datasets import Dataset

from mdpo.types import SIDES, sequence_lengths, split

ITEM = 4  # bytes of a token id, and of a mask's value


@dataclass
class Sequences:
    """The m sequences of n rows: in the order of the rows, those of chosen before those of rejected. `keys` (m, 16)
    uint8 digest the reference's identity, a sequence's token ids, and which of them are supervised. `tokens` and `row`
    (m,) are its length and its row, `per_side` (n, 2) how many a side has; int64."""

    keys: np.ndarray
    tokens: np.ndarray
    row: np.ndarray
    per_side: np.ndarray

    @classmethod
    def of(cls, dataset: Dataset, identity: str) -> "Sequences":
        keys, tokens, per_side, prefix = bytearray(), list[int](), list[int](), identity.encode()
        for ids_and_masks in _by_side(dataset):
            per_side.append(len(ids_and_masks))
            for ids, mask in ids_and_masks:
                count = len(ids) // ITEM
                keys += xxhash.xxh3_128_digest(prefix + count.to_bytes(8, sys.byteorder) + ids + mask)
                tokens.append(count)
        counts = np.array(per_side, np.int64).reshape(-1, 2)
        rows = np.repeat(np.arange(len(counts)), counts.sum(1))
        return cls(np.frombuffer(keys, np.uint8).reshape(-1, 16), np.array(tokens, np.int64), rows, counts)

    @cached_property
    def first_of_row(self) -> np.ndarray:
        """(n,) the number of each row's first one."""
        counts = self.per_side.sum(1)
        return counts.cumsum() - counts

    def pairs(self, dataset: Dataset, numbers: np.ndarray) -> list[dict[str, Any]]:
        """Rows for a collator, with two of the sequences as their sides; an odd last one is on both sides."""
        places, place = np.unique(self.row[numbers], return_inverse=True)
        columns = dataset[places.tolist()]
        own = [_sequences_of(dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]
        found = [own[i][n] for i, n in zip(place, numbers - self.first_of_row[self.row[numbers]], strict=True)]
        found += found[-1:] * (len(found) % 2)
        rows = []
        for i in range(0, len(found), 2):
            chosen, rejected = found[i : i + 2]
            row = {"row": int(self.row[numbers[i]]), "chosen_ids": chosen[0], "chosen_mask": chosen[1]}
            rows.append(row | {"rejected_ids": rejected[0], "rejected_mask": rejected[1]})
        return rows


def _by_side(dataset: Dataset) -> Iterator[list[tuple[bytes, bytes]]]:
    """(ids, mask) of each sequence of a side, int32 as bytes, side after side and row after row."""
    columns = [f"{side}_{field}" for side in SIDES for field in ("ids", "mask", "lengths")]
    columns = [name for name in columns if name in dataset.column_names]
    for table in dataset.select_columns(columns).with_format("arrow").iter(batch_size=1000):
        sides = [_arrays(table, side) for side in SIDES]
        for i in range(len(table)):
            for (ids, id_ends), (mask, mask_ends), lengths in sides:
                ids_of_row, mask_of_row = ids[id_ends[i] : id_ends[i + 1]], mask[mask_ends[i] : mask_ends[i + 1]]
                if not lengths[i]:
                    yield [(ids_of_row, mask_of_row)]
                    continue
                ends = [0, *accumulate(ITEM * length for length in lengths[i])]
                yield [(ids_of_row[begin:end], mask_of_row[begin:end]) for begin, end in pairwise(ends)]


def _arrays(table, side: str) -> tuple:
    """Of an Arrow table: (int32 values as bytes, where each row begins in them and the last one ends) of ids and of
    masks, and each row's lengths."""
    lists = [table.column(f"{side}_{field}").combine_chunks() for field in ("ids", "mask")]
    name = f"{side}_lengths"
    lengths = table.column(name).to_pylist() if name in table.column_names else [None] * len(table)
    ids, masks = [_as_bytes(x) for x in lists]
    return ids, masks, lengths


def _as_bytes(lists) -> tuple[bytes, list[int]]:
    ends = np.asarray(lists.offsets, np.int64)  # the values of a slice are those of its whole chunk
    values = np.asarray(lists.values.slice(ends[0], ends[-1] - ends[0]), np.int32)
    return values.tobytes(), ((ends - ends[0]) * ITEM).tolist()


def _sequences_of(row: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """(ids, mask) of each sequence of a row, chosen before rejected."""
    found = []
    for side in SIDES:
        lengths = sequence_lengths(row, side)
        parts = (split(row[f"{side}_{field}"], lengths) for field in ("ids", "mask"))
        found += list(zip(*parts, strict=True))
    return found


def pair_keys(dataset: Dataset, identity: str) -> np.ndarray:
    """(n, 16) uint8: what shards that were written pair by pair have for each row, a digest of the identity and both
    sides' ids and masks."""
    keys, sides = bytearray(), _by_side(dataset)
    for pair in zip(sides, sides, strict=True):
        digest = xxhash.xxh3_128(identity.encode())
        for side in pair:
            for parts in zip(*side, strict=True):
                digest.update((sum(map(len, parts)) // ITEM).to_bytes(8, sys.byteorder))
                for part in parts:
                    digest.update(part)
        keys += digest.digest()
    return np.frombuffer(keys, np.uint8).reshape(-1, 16)


def batches(sequences: Sequences, todo: np.ndarray, prompts: np.ndarray | None, size: int) -> list[np.ndarray]:
    """The sequences `todo` in batches of about `size`, those first that take most. With `prompts` (n,) by row, as where
    rows are packed, those of one prompt are in one batch as far as it holds them, and those of a row always; without,
    each batch has about one length."""
    tokens = sequences.tokens
    if prompts is None:
        order = todo[np.argsort(-tokens[todo], kind="stable")]
        return [order[i : i + size] for i in range(0, len(order), size)]
    groups: dict[int, dict[int, list[int]]] = {}
    for number, row in zip(todo.tolist(), sequences.row[todo].tolist(), strict=True):
        groups.setdefault(int(prompts[row]), {}).setdefault(row, []).append(number)
    by_row = [list(rows.values()) for rows in groups.values()]
    by_row.sort(key=lambda rows: -max(tokens[number] for row in rows for number in row))
    parts = [part for rows in by_row for part in _joined(rows, size)]
    found = [np.array(batch) for batch in _joined(parts, size)]
    return sorted(found, key=lambda batch: -len(batch) * tokens[batch].max())  # its padded size bounds its packed one


def _joined(parts: list[list[int]], size: int) -> list[list[int]]:
    """Neighbors together, as long as they are not more than `size`."""
    out: list[list[int]] = []
    for part in parts:
        if out and len(out[-1]) + len(part) <= size:
            out[-1] = out[-1] + part
        else:
            out.append(part)
    return out
