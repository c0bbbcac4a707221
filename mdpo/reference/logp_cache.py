"""The reference's log-probs, precomputed and cached on disk: one float32 number for each supervised token, found
again by content. A β, a loss, a turn weight or an output folder changes none of them; a changed row costs itself.

A folder of shards per reference, each complete or absent, by several ranks side by side; a killed pass resumes where
its last shard ends. A shard: keys (n, 16) uint8, counts (n, 2) int32 of both sides, logps float32, and a digest.
"""

import ctypes
import math
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import xxhash
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm.auto import tqdm

from mdpo.console import say
from mdpo.data.tokenize import side_lengths
from mdpo.errors import UserError
from mdpo.ranks import gathered
from mdpo.reference.logp_columns import Columns, Distinct, Piece
from mdpo.storage import as_new_files, sync
from mdpo.types import SIDES, PairBatch

SHARD_S = 30  # seconds of work that a killed pass loses at most
Sides = tuple[np.ndarray, np.ndarray]  # log-probs of chosen and of rejected, float32


class ReferenceCache:
    """Log-probs by key in `folder`; where that is None nothing is cached."""

    def __init__(self, folder: Path | None, rank: int = 0):
        self.folder, self.rank = folder, rank
        self._new: dict[bytes, Sides] = {}
        self._written = time.monotonic()

    def shards(self, damaged: list[str]) -> Iterator[dict[str, np.ndarray]]:
        """The arrays of one shard after the other. `damaged` gets a line for each that is damaged, and removed, or
        cannot be read."""
        for path in sorted(self.folder.glob("*.safetensors")) if self.folder else ():
            try:
                yield read_shard(path)
            except OSError as error:  # the disk's trouble, not the shard's
                damaged.append(
                    f"reference log-probs: {path} cannot be read now ({error}); its pairs are computed again."
                )
            except (ValueError, SafetensorError) as error:
                path.unlink(missing_ok=True)
                damaged.append(f"reference log-probs: {path} is damaged ({error}); its pairs are computed again.")

    def add(self, key: bytes, sides: Sides) -> None:
        """Caches log-probs; every SHARD_S seconds those added since are written."""
        self._new[key] = sides
        if time.monotonic() - self._written > SHARD_S:
            self.flush()

    def flush(self) -> None:
        """A failing disk costs the cache, not the hours that the pass took: a line says so, and no more is cached."""
        if self.folder and self._new:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_shard(self.folder / f"{time.time_ns()}-{self.rank}-{uuid.uuid4().hex[:8]}.safetensors", self._new)
            except (OSError, SafetensorError) as error:
                print(
                    f"warning: reference_cache_dir: {self.folder} cannot be written to by rank {self.rank} ({error}). "
                    "This run continues without; another one computes the reference's log-probs again.",
                    flush=True,
                )
                self.folder = None
        self._new = {}
        self._written = time.monotonic()


def write_shard(path: Path, rows: dict[bytes, Sides]) -> None:
    arrays = {
        "keys": np.frombuffer(b"".join(rows), np.uint8).reshape(-1, 16).copy(),
        "counts": np.array([[len(side) for side in sides] for sides in rows.values()], np.int32),
        "logps": np.concatenate([side for sides in rows.values() for side in sides]).astype(np.float32),
    }
    draft = path.with_suffix(".tmp")
    save_file(arrays, draft, {"digest": _digest(arrays)})
    as_new_files(draft)
    sync(draft)
    os.replace(draft, path)


def read_shard(path: Path) -> dict[str, np.ndarray]:
    """Its arrays. Raises where the shard is not what was written."""
    with safe_open(path, "numpy") as file:
        arrays = {name: file.get_tensor(name) for name in ("keys", "counts", "logps")}
        if (file.metadata() or {}).get("digest") != _digest(arrays):
            raise ValueError("its digest is another")
    return arrays


def _digest(arrays: dict[str, np.ndarray]) -> str:
    digest = xxhash.xxh3_128()
    for name in ("keys", "counts", "logps"):
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------- a dataset and its keys


def row_keys(dataset: Dataset, identity: str) -> np.ndarray:
    """(n, 16) uint8, for each row a digest of the reference's identity, both sides' token ids, and which of them are
    supervised."""
    keys = bytearray()
    columns = [f"{side}_{field}" for side in SIDES for field in ("ids", "mask")]
    for table in dataset.select_columns(columns).with_format("arrow").iter(batch_size=1000):
        lists = [table.column(name).combine_chunks() for name in columns]
        values = [np.asarray(x.values, np.int32) for x in lists]
        ends = [np.asarray(x.offsets) for x in lists]
        for i in range(len(table)):
            digest = xxhash.xxh3_128(identity.encode())
            for value, end in zip(values, ends, strict=True):
                digest.update(np.int64(end[i + 1] - end[i]).tobytes())
                digest.update(value[end[i] : end[i + 1]].tobytes())
            keys += digest.digest()
    return np.frombuffer(keys, np.uint8).reshape(-1, 16)


def precompute(
    dataset: Dataset,
    score: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    collator: Callable,
    batch_size: int,
    accelerator,
    cache: ReferenceCache,
    name: str,
    identity: str = "",
    longest_cached: float = float("inf"),
) -> Dataset:
    """The dataset with the reference's log-probs of every scored token as float32 lists in the columns REFERENCE.
    `score` takes a batch and returns (S,) log-probs; it is called equally often on each rank, not at all where all is
    cached."""
    keys = row_keys(dataset, identity)
    distinct = Distinct(keys)
    count, damaged = len(distinct.first), []
    columns = Columns.of(keys, count, kept=cache.folder is not None)
    for arrays in cache.shards(damaged) if columns.mine else ():
        columns.take(distinct.places(arrays["keys"]), arrays["counts"], arrays["logps"])
    say(*dict.fromkeys(line for lines in gathered(damaged) for line in lines))
    # What one node lacks, all compute: nodes may have different disks, or look while another run writes.
    parts = gathered(np.packbits(~columns.known) if columns.mine else None)
    bits = np.bitwise_or.reduce([part for part in parts if part is not None])
    todo = np.flatnonzero(np.unpackbits(bits, count=count))
    if cache.folder:
        say(f"reference log-probs of {name}: {count - len(todo)} of {count} from {cache.folder}")
    if len(todo):
        rows = distinct.first[todo]
        new = _computed(dataset, rows, keys, score, collator, batch_size, accelerator, cache, name, longest_cached)
        columns.take_from_all([(distinct.of_row[rows], *piece) for rows, *piece in new])
        del new
        _give_memory_back()
    return columns.added_to(dataset, distinct.of_row)


def _give_memory_back() -> None:
    """glibc keeps the many small pieces that such a pass has freed: of 200 000 pairs 0.8 GB."""
    with suppress(OSError, AttributeError):  # another libc
        ctypes.CDLL(None).malloc_trim(0)


def _computed(
    dataset, todo, keys, score, collator, batch_size, accelerator, cache, name, longest_cached
) -> list[Piece]:
    """This rank's share of the rows `todo`, in pieces with the rows' numbers. Longest first, so that memory runs out at
    once or never; sides over `longest_cached` in batches of their own, which are not cached."""
    lengths = side_lengths(dataset).max(1)
    order = todo[np.argsort(-lengths[todo], kind="stable")]
    groups = [order[(lengths[order] > longest_cached) == long] for long in (True, False)]
    batches = [rows[i : i + batch_size] for rows in groups for i in range(0, len(rows), batch_size)]
    ranks, new = accelerator.num_processes, []
    steps = range(math.ceil(len(batches) / ranks))
    try:
        for step in tqdm(steps, desc=f"reference log-probs of {name}", disable=not accelerator.is_main_process):
            i = step * ranks + accelerator.process_index
            rows = batches[min(i, len(batches) - 1)]  # a rank without one repeats the last: ZeRO-3 needs all of them
            batch = PairBatch.of(collator([dataset[int(row)] for row in rows]))
            logps = score(batch.to(accelerator.device)).float().cpu()
            if i >= len(batches):
                continue
            if not torch.isfinite(logps).all():
                raise UserError(
                    f"reference log-probs of {name}: not finite in row {dataset[int(rows[0])].get('key', rows[0])} or "
                    f"one of the {len(rows)} rows scored with it. Look at the reference's weights and its dtype.",
                    key="reference log-probs",
                )
            n = len(rows)
            # Tokens of one sequence follow each other, chosen sides first, as the collator lists them.
            counts = torch.bincount(batch.sequence_of_token, minlength=2 * n).numpy()
            parts = np.split(logps.numpy(), counts.cumsum()[:-1])
            sides = list(zip(parts[:n], parts[n:], strict=True))
            new.append((rows, counts.reshape(2, n).T, np.concatenate([side for pair in sides for side in pair])))
            for row, pair in zip(rows, sides, strict=True):
                if lengths[row] <= longest_cached:
                    cache.add(keys[row].tobytes(), pair)
    finally:
        cache.flush()
    return new
