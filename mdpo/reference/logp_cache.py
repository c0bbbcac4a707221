"""The reference's log-probs, precomputed and cached on disk: one float32 number for each supervised token, found
again by content. A β, a loss, a turn weight or an output folder changes none of them; a changed row costs itself.

A folder of shards per reference, each complete or absent, by several ranks side by side; a killed pass resumes where
its last shard ends. A shard has n sequences: keys (n, 16) uint8, counts (n, 1) int32, logps float32, and a digest.
Older ones have n pairs and counts (n, 2), of both sides.
"""

import ctypes
import math
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache as cached
from pathlib import Path

import numpy as np
import torch
import xxhash
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm.auto import tqdm

from mdpo.console import say
from mdpo.data.sampler import prompt_groups
from mdpo.errors import UserError
from mdpo.forward.collators import PackedCollator
from mdpo.ranks import first_of_row, gathered, row_ranks
from mdpo.reference.logp_columns import Columns, Distinct, Piece
from mdpo.reference.sequences import Sequences, batches, pair_keys
from mdpo.storage import as_new_files, sync
from mdpo.types import SIDES, PairBatch

SHARD_S = 30  # seconds of work that a killed pass loses at most


class ReferenceCache:
    """Log-probs by key in `folder`; where that is None nothing is cached."""

    def __init__(self, folder: Path | None, rank: int = 0):
        self.folder, self.rank = folder, rank
        self._new: dict[bytes, np.ndarray] = {}
        self._written = time.monotonic()

    def shards(self, damaged: list[str]) -> Iterator[dict[str, np.ndarray]]:
        """The arrays of one shard after the other. `damaged` gets a line for each that is damaged, and removed, or
        cannot be read."""
        for path in sorted(self.folder.glob("*.safetensors")) if self.folder else ():
            try:
                yield read_shard(path)
            except OSError as error:  # the disk's trouble, not the shard's
                damaged.append(
                    f"reference log-probs: {path} cannot be read now ({error}); its sequences are computed again."
                )
            except (ValueError, SafetensorError) as error:
                path.unlink(missing_ok=True)
                damaged.append(f"reference log-probs: {path} is damaged ({error}); its sequences are computed again.")

    def add(self, key: bytes, logps: np.ndarray) -> None:
        """Caches a sequence's log-probs; every SHARD_S seconds those added since are written."""
        self._new[key] = logps
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


def write_shard(path: Path, logps: dict[bytes, np.ndarray]) -> None:
    arrays = {
        "keys": np.frombuffer(b"".join(logps), np.uint8).reshape(-1, 16).copy(),
        "counts": np.array([[len(values)] for values in logps.values()], np.int32),
        "logps": np.concatenate([*logps.values()]).astype(np.float32),
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


# --------------------------------------------------------------------------------------------- a dataset's log-probs


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
    """The dataset with the reference's log-probs of every scored token as float32 lists in the columns REFERENCE, those
    of a side's sequences one behind the other. `score` takes a batch of `batch_size` pairs, whose sides are sequences,
    and returns (S,) log-probs; it is called equally often on each rank, not at all where all is cached."""
    sequences = Sequences.of(dataset, identity)
    distinct = Distinct(sequences.keys)
    count, damaged = len(distinct.first), []
    columns = Columns.of(sequences.keys, sequences.per_side, count, kept=cache.folder is not None)
    by_pair = cached(lambda: PairPlaces(dataset, identity, sequences, distinct))
    for arrays in cache.shards(damaged) if columns.mine else ():
        if arrays["counts"].shape[1] == 2:
            columns.take(by_pair().places(arrays["keys"]), arrays["counts"].reshape(-1), arrays["logps"])
        else:
            columns.take(distinct.places(arrays["keys"]), arrays["counts"][:, 0], arrays["logps"])
    say(*dict.fromkeys(line for lines in gathered(damaged) for line in lines))
    # What one node lacks, all compute: nodes may have different disks, or look while another run writes.
    parts = gathered(np.packbits(~columns.known) if columns.mine else None)
    bits = np.bitwise_or.reduce([part for part in parts if part is not None])
    todo = np.flatnonzero(np.unpackbits(bits, count=count))
    if cache.folder:
        say(f"reference log-probs of {name}: {count - len(todo)} of {count} sequences from {cache.folder}")
    if len(todo):
        numbers = distinct.first[todo]
        new = _computed(
            dataset, sequences, numbers, score, collator, batch_size, accelerator, cache, name, longest_cached
        )
        columns.take_from_all([(distinct.of_key[numbers], *piece) for numbers, *piece in new])
        del new
        _give_memory_back()
    return columns.added_to(dataset, distinct.of_key, sequences.per_side)


class PairPlaces:
    """Where log-probs go that were cached pair by pair, as before sequences were: those of rows whose sides are one
    sequence each."""

    def __init__(self, dataset: Dataset, identity: str, sequences: Sequences, distinct: Distinct):
        rows = np.flatnonzero((sequences.per_side == 1).all(1))
        self._pairs = Distinct(pair_keys(dataset, identity)[rows])
        first = sequences.first_of_row[rows[self._pairs.first]]
        self._of_pair = distinct.of_key[np.stack([first, first + 1], 1)]

    def places(self, keys: np.ndarray) -> np.ndarray:
        """(2m,) for keys (m, 16) of pairs: which distinct sequence chosen is, and rejected; -1 for none of them."""
        places = self._pairs.places(keys)
        return np.where(places[:, None] < 0, -1, self._of_pair[places]).reshape(-1)


def _give_memory_back() -> None:
    """glibc keeps the many small pieces that such a pass has freed: of 200 000 pairs 0.8 GB."""
    with suppress(OSError, AttributeError):  # another libc
        ctypes.CDLL(None).malloc_trim(0)


def _computed(
    dataset, sequences, todo, score, collator, batch_size, accelerator, cache, name, longest_cached
) -> list[Piece]:
    """This rank's share of the sequences `todo`, in pieces with their numbers. Those first that take most memory, so
    that it runs out at once or never; those over `longest_cached` in batches of their own, which are not cached."""
    prompts = prompt_groups(dataset) if isinstance(collator, PackedCollator) else None
    is_long = sequences.tokens[todo] > longest_cached
    parts = [
        part for one in (True, False) for part in batches(sequences, todo[is_long == one], prompts, 2 * batch_size)
    ]
    ranks, new = accelerator.num_processes // row_ranks(), []
    steps = range(math.ceil(len(parts) / ranks))
    try:
        for step in tqdm(steps, desc=f"reference log-probs of {name}", disable=not accelerator.is_main_process):
            i = step * ranks + accelerator.process_index // row_ranks()
            numbers = parts[min(i, len(parts) - 1)]  # a rank without one repeats the last: ZeRO-3 needs all of them
            batch = PairBatch.of(collator(sequences.pairs(dataset, numbers)))
            logps = score(batch.to(accelerator.device)).float().cpu()
            if i >= len(parts) or not first_of_row():
                continue
            if not torch.isfinite(logps).all():
                row = int(sequences.row[numbers[0]])
                raise UserError(
                    f"reference log-probs of {name}: not finite in row {dataset[row].get('key', row)} or one of the "
                    f"{len(numbers)} sequences scored with it. Look at the reference's weights and its dtype.",
                    key="reference log-probs",
                )
            of_sequences = by_sequence(batch, logps.numpy())[: len(numbers)]
            new.append((numbers, np.array([len(x) for x in of_sequences]), np.concatenate(of_sequences)))
            for number, values in zip(numbers, of_sequences, strict=True):
                if sequences.tokens[number] <= longest_cached:
                    cache.add(sequences.keys[number].tobytes(), values)
    finally:
        cache.flush()
    return new


def by_sequence(batch: PairBatch, logps: np.ndarray) -> list[np.ndarray]:
    """(S,) log-probs of a batch whose sides are one sequence each, apart: chosen and rejected of the first pair, of the
    second, … Tokens of one sequence follow each other, chosen sides first, as the collator lists them."""
    n = batch.n_pairs
    counts = torch.bincount(batch.sequence_of_token, minlength=2 * n).cpu().numpy()
    parts = np.split(logps, counts.cumsum()[:-1])
    return [parts[side * n + pair] for pair in range(n) for side in range(len(SIDES))]
