"""Log-probs of a whole dataset, from shards and ranks into two columns, without a copy in each rank's memory.

The first rank of each node puts them into a file as they come, and from there, in the dataset's order, into an Arrow
file that all ranks of the node map: its pages are there once, however many ranks and dataloader workers read them.
"""

import atexit
import os
import uuid
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from datasets import Dataset, concatenate_datasets

from mdpo.data.whole_columns import contiguous
from mdpo.errors import UserError
from mdpo.forward.collators import REFERENCE
from mdpo.ranks import agreed, first_of_node, first_rank_of_node, gathered, rank
from mdpo.types import SIDES

AT_ONCE = 4_000_000  # numbers of a rank that all others receive at a time
ROWS = 1000  # of a record batch
# Log-probs of m sequences: their numbers (m,), how many each has (m,), float32 one behind the other.
Piece = tuple[np.ndarray, np.ndarray, np.ndarray]


class Distinct:
    """`keys` (m, 16) uint8 → the u distinct ones, in their order: `of_key` (m,) which
    one each is, `first` (u,) the first that is it."""

    def __init__(self, keys: np.ndarray):
        self.of_key = np.asarray(pc.dictionary_encode(_binary(keys)).indices)
        self.first = np.unique(self.of_key, return_index=True)[1]
        self.keys = keys[self.first]

    @cached_property
    def _sorted(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Both halves of the distinct keys (u,), by the first half, and which key each is: made once for all shards."""
        first, second = _halves(self.keys)
        order = np.argsort(first, kind="stable")
        return first[order], second[order], order

    def places(self, keys: np.ndarray) -> np.ndarray:
        """Which of the distinct ones each of (m, 16) is, int32; -1 for none of them."""
        (first, second, order), wanted = self._sorted, _halves(keys)
        at, open_ = np.searchsorted(first, wanted[0]), np.arange(len(keys))
        places = np.full(len(keys), -1, np.int32)
        while len(open_):  # a second time only where two keys have the same first half
            open_ = open_[at[open_] < len(first)]
            open_ = open_[first[at[open_]] == wanted[0][open_]]
            found = second[at[open_]] == wanted[1][open_]
            places[open_[found]] = order[at[open_[found]]]
            open_ = open_[~found]
            at[open_] += 1
        return places


def _halves(keys: np.ndarray) -> np.ndarray:
    """(2, m) uint64 of keys (m, 16) uint8."""
    return np.ascontiguousarray(np.ascontiguousarray(keys).reshape(-1).view(np.uint64).reshape(-1, 2).T)


def _binary(keys: np.ndarray) -> pa.Array:
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(keys), [None, pa.py_buffer(keys.tobytes())])


class Columns:
    """Log-probs of `count` distinct sequences. `take` and `known` are for the first rank of a node (`mine`); it makes
    the file `name`-RANK.arrow, which stays for the next start unless it is `passing`. Raises UserError where the disk
    fails."""

    def __init__(self, count: int, name: str, passing: bool):
        folder, first_rank = Path(datasets.config.HF_DATASETS_CACHE, "mdpo-reference"), first_rank_of_node()
        self.path, self.mine, self._passing = folder / f"{name}-{first_rank}.arrow", rank() == first_rank, passing
        self._size, self._spool = 0, None
        if self.mine:
            folder.mkdir(parents=True, exist_ok=True)
            self._spool = open(folder / f"{uuid.uuid4().hex}.spool", "w+b")  # noqa: SIM115
            os.unlink(self._spool.name)  # gone when it is closed, however this process ends
            self.known = np.zeros(count, bool)
            self._start, self._counts = np.zeros(count, np.int64), np.zeros(count, np.int64)

    @classmethod
    def of(cls, keys: np.ndarray, per_side: np.ndarray, count: int, kept: bool) -> "Columns":
        """`kept` says that `keys` (m, 16) identify the log-probs; a side has `per_side` (n, 2) of them. All ranks call
        it together."""
        contents = keys.tobytes() + per_side.tobytes()
        name = xxhash.xxh3_128_hexdigest(contents) if kept else agreed(lambda: uuid.uuid4().hex)
        try:
            return cls(count, name, passing=not kept)
        except OSError as error:
            raise _not_written(error) from error

    def take(self, places: np.ndarray, counts: np.ndarray, logps: np.ndarray) -> None:
        """A Piece; its sequences are numbered among the distinct ones, -1 for those that are not wanted."""
        wanted, lengths = places >= 0, counts.astype(np.int64)
        places, sizes = places[wanted], lengths[wanted]
        self._start[places] = self._size + sizes.cumsum() - sizes
        self._counts[places], self.known[places] = sizes, True
        try:
            self._spool.write(np.ascontiguousarray(logps[np.repeat(wanted, lengths)], np.float32).tobytes())
        except OSError as error:
            raise _not_written(error) from error
        self._size += int(sizes.sum())

    def take_from_all(self, pieces: list[Piece]) -> None:
        """Every rank's sequences. All ranks call it together."""
        blocks = _blocks(pieces)
        mine = next(blocks, None)
        while any(parts := gathered(mine)):
            for part in parts:
                if self.mine and part:
                    self.take(*part)
            mine = next(blocks, None)

    def added_to(self, dataset: Dataset, of_key: np.ndarray, per_side: np.ndarray) -> Dataset:
        """The dataset with the columns REFERENCE: `of_key` (m,) says which distinct one each of its sequences is, of
        which a side has `per_side` (n, 2). All ranks call it together."""
        with first_of_node():
            if self.mine:
                self._write(of_key, per_side)
            # Else columns would be copied beside it; datasets keeps a flat dataset on disk.
            dataset = contiguous(dataset)
        return concatenate_datasets([dataset, Dataset.from_file(str(self.path))], axis=1)

    def _write(self, of_key: np.ndarray, per_side: np.ndarray) -> None:
        if not self.known.all():
            raise KeyError(f"{(~self.known).sum()} sequences without reference log-probs")
        self._spool.flush()
        values = np.memmap(self._spool, np.float32, "r") if self._size else np.zeros(0, np.float32)
        schema = pa.schema({REFERENCE[side]: pa.list_(pa.float32()) for side in SIDES})
        draft = self.path.with_suffix(f".{os.getpid()}.tmp")
        try:
            with pa.OSFile(str(draft), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
                begin = 0
                for counts in (per_side[i : i + ROWS] for i in range(0, len(per_side), ROWS)):
                    end = begin + counts.sum()
                    stream.write_batch(self._batch(of_key[begin:end], counts, values, schema))
                    begin = end
            os.replace(draft, self.path)
        except OSError as error:
            draft.unlink(missing_ok=True)
            raise _not_written(error) from error
        self._spool.close()
        if self._passing:
            atexit.register(self.path.unlink, missing_ok=True)

    def _batch(
        self, sequences: np.ndarray, per_side: np.ndarray, values: np.ndarray, schema: pa.Schema
    ) -> pa.RecordBatch:
        side_of, arrays = np.repeat(np.tile([0, 1], len(per_side)), per_side.reshape(-1)), []
        for side in range(len(SIDES)):
            own = sequences[side_of == side]
            counts = self._counts[own]
            ends = np.concatenate([[0], counts.cumsum()])
            index = np.arange(ends[-1]) + np.repeat(self._start[own] - ends[:-1], counts)
            row_ends = ends[np.concatenate([[0], per_side[:, side].cumsum()])].astype(np.int32)
            arrays.append(pa.ListArray.from_arrays(row_ends, pa.array(values[index], pa.float32())))
        return pa.record_batch(arrays, schema=schema)


def _blocks(pieces: list[Piece]) -> Iterator[Piece]:
    """The same in fewer and larger pieces, of about AT_ONCE numbers."""
    block, size = [], 0
    for piece in pieces:
        block.append(piece)
        size += len(piece[2])
        if size >= AT_ONCE:
            yield _joined(block)
            block, size = [], 0
    if block:
        yield _joined(block)


def _joined(pieces: list[Piece]) -> Piece:
    return tuple(np.concatenate(parts) for parts in zip(*pieces, strict=True))


def _not_written(error: OSError) -> UserError:
    folder = datasets.config.HF_DATASETS_CACHE
    return UserError(
        f"reference log-probs: their columns cannot be written into {folder}: {error.strerror or error}. "
        "Set HF_DATASETS_CACHE to a folder with room."
    )
