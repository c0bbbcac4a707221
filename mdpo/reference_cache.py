"""The reference's log-probs, computed before training and kept on disk: one float32 number for each supervised token,
found again by content. A β, a loss, a turn weight or an output folder changes none of them; a changed row costs itself.

A folder of shards per reference, written whole or not at all, by several ranks side by side; a killed pass goes on
where its last shard ends. A shard: keys (n, 16) uint8, counts (n, 2) int32 of both sides, logps float32, and a digest.
"""

import math
import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import xxhash
from accelerate.utils import gather_object
from datasets import Dataset, List, Value
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm.auto import tqdm

from mdpo.packing import REFERENCE, SIDES, on_device
from mdpo.startup import say
from mdpo.sums import token_places
from mdpo.tokens import side_lengths
from mdpo.types import UserError

SHARD_S = 30  # seconds of work that a killed pass loses at most
Sides = tuple[np.ndarray, np.ndarray]  # log-probs of chosen and of rejected, float32


class ReferenceCache:
    """Log-probs by key in `folder`; None keeps nothing."""

    def __init__(self, folder: Path | None, rank: int = 0):
        self.folder, self.rank = folder, rank
        self._new: dict[bytes, Sides] = {}
        self._written = time.monotonic()

    def load(self, wanted: set[bytes]) -> tuple[dict[bytes, Sides], list[str]]:
        """(log-probs of those wanted keys that are there, a line for each shard that is damaged, and removed, or cannot
        be read)."""
        found: dict[bytes, Sides] = {}
        damaged = []
        for path in sorted(self.folder.glob("*.safetensors")) if self.folder else ():
            try:
                shard = read_shard(path)
            except OSError as error:  # the disk's trouble, not the shard's
                damaged.append(
                    f"reference log-probs: {path} cannot be read now ({error}); its pairs are computed again."
                )
                continue
            except (ValueError, SafetensorError) as error:
                path.unlink(missing_ok=True)
                damaged.append(f"reference log-probs: {path} is damaged ({error}); its pairs are computed again.")
                continue
            found |= {key: sides for key, sides in shard if key in wanted}
        return found, damaged

    def add(self, key: bytes, sides: Sides) -> None:
        """Keeps log-probs; every SHARD_S seconds those that have come together are written."""
        self._new[key] = sides
        if time.monotonic() - self._written > SHARD_S:
            self.flush()

    def flush(self) -> None:
        if self.folder and self._new:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_shard(self.folder / f"{time.time_ns()}-{self.rank}-{uuid.uuid4().hex[:8]}.safetensors", self._new)
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
    with open(draft, "rb") as file:
        os.fsync(file.fileno())
    os.replace(draft, path)


def read_shard(path: Path) -> Iterator[tuple[bytes, Sides]]:
    """(key, log-probs of both sides) of each row. Raises where the shard is not what was written."""
    with safe_open(path, "numpy") as file:
        arrays = {name: file.get_tensor(name) for name in ("keys", "counts", "logps")}
        if (file.metadata() or {}).get("digest") != _digest(arrays):
            raise ValueError("its digest is another")
    ends = arrays["counts"].cumsum().reshape(-1, 2)
    keys, counts, logps = arrays["keys"], arrays["counts"], arrays["logps"]
    return (
        (key.tobytes(), (logps[middle - n : middle], logps[middle : middle + m]))
        for key, (n, m), (middle, _) in zip(keys, counts, ends, strict=True)
    )


def _digest(arrays: dict[str, np.ndarray]) -> str:
    digest = xxhash.xxh3_128()
    for name in ("keys", "counts", "logps"):
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------- a set and its keys


def row_keys(dataset: Dataset, identity: str) -> list[bytes]:
    """16 bytes for each row: the reference's identity, both sides' token ids, and which of them are supervised."""
    keys = []
    columns = [f"{side}_{what}" for side in SIDES for what in ("ids", "mask")]
    for table in dataset.select_columns(columns).with_format("arrow").iter(batch_size=1000):
        lists = [table.column(name).combine_chunks() for name in columns]
        values = [np.asarray(x.values, np.int32) for x in lists]
        ends = [np.asarray(x.offsets) for x in lists]
        for i in range(len(table)):
            digest = xxhash.xxh3_128(identity.encode())
            for value, end in zip(values, ends, strict=True):
                digest.update(np.int64(end[i + 1] - end[i]).tobytes())
                digest.update(value[end[i] : end[i + 1]].tobytes())
            keys.append(digest.digest())
    return keys


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
    """The set with the reference's log-probs of every scored token as float32 lists in the columns REFERENCE. `score`
    takes a batch and returns (S,) log-probs; it is called as often on each rank, and not at all where all is known."""
    keys = row_keys(dataset, identity)
    found, damaged = cache.load(set(keys))
    say(*damaged)
    # What one rank lacks all compute: they may look at different disks, or while another run writes.
    lacking = {key for part in gather_object([[key for key in set(keys) if key not in found]]) for key in part}
    todo = list({key: row for row, key in enumerate(keys) if key in lacking}.values())
    if cache.folder:
        say(f"reference log-probs of {name}: {len(set(keys)) - len(todo)} of {len(set(keys))} from {cache.folder}")
    if todo:
        found |= _computed(dataset, todo, keys, score, collator, batch_size, accelerator, cache, name, longest_cached)
    for i, side in enumerate(SIDES):
        column = [found[key][i] for key in keys]
        dataset = dataset.add_column(REFERENCE[side], column, feature=List(Value("float32")))
    return dataset


def _computed(
    dataset, todo, keys, score, collator, batch_size, accelerator, cache, name, longest_cached
) -> dict[bytes, Sides]:
    """Log-probs of the rows `todo`, from all ranks. Longest first, so that memory runs out at once or never; sides over
    `longest_cached` in batches of their own, which are not kept."""
    lengths = side_lengths(dataset).max(1)
    order = sorted(todo, key=lambda row: -lengths[row])
    groups = [[row for row in order if (lengths[row] > longest_cached) == long] for long in (True, False)]
    batches = [rows[i : i + batch_size] for rows in groups for i in range(0, len(rows), batch_size)]
    ranks, new = accelerator.num_processes, {}
    steps = range(math.ceil(len(batches) / ranks))
    try:
        for step in tqdm(steps, desc=f"reference log-probs of {name}", disable=not accelerator.is_main_process):
            i = step * ranks + accelerator.process_index
            rows = batches[min(i, len(batches) - 1)]  # a rank without one repeats the last: ZeRO-3 needs all of them
            batch = collator([dataset[row] for row in rows])
            logps = score(on_device(batch, accelerator.device)).float().cpu()
            if i >= len(batches):
                continue
            if not torch.isfinite(logps).all():
                raise UserError(
                    f"reference log-probs of {name}: not finite in row {dataset[rows[0]].get('key', rows[0])} or one "
                    f"of the {len(rows)} rows scored with it. Look at the reference's weights and its dtype."
                )
            n = len(rows)
            # Tokens of one sequence follow each other, chosen sides first, as the collator lists them.
            parts = logps.split(torch.bincount(token_places(batch, n), minlength=2 * n).tolist())
            for j, row in enumerate(rows):
                new[keys[row]] = (parts[j].numpy(), parts[n + j].numpy())
                if lengths[row] <= longest_cached:
                    cache.add(keys[row], new[keys[row]])
    finally:
        cache.flush()
    return {key: sides for part in gather_object([new]) for key, sides in part.items()}
