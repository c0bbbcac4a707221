"""What the ranks of a run tell each other besides training's own tensors, and how they wait for each other.

They wait at the store by which the process group was made. No collective is open meanwhile: NCCL's limit of 30 minutes
does not run, signals are handled, and one rank may read, write or tokenize for hours. Unless it says otherwise, every
function here is called by all ranks together, in the same order; in one process each only does its caller's work.
"""

import io
import json
import os
import pickle
import platform
import re
import time
from collections.abc import Callable
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
import torch.distributed as dist

from mdpo.errors import Preempted, RankFailed, UserError

LIMIT_S = 24 * 3600  # longer than any work of one rank: an end for ranks that no longer agree where they are
PAUSE_S = (0.002, 0.25)  # between two polls, at first and at most
ROW_RANKS = "PARALLELISM_CONFIG_SP_SIZE"
FAILED = "failed"
OF_A_RANK = re.compile(r"(?:pp_rank_|rng_state_|progress_)(\d+)")  # in names of files that this rank writes and reads
_turns = count()


def ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if ranks() > 1 else 0


def row_ranks() -> int:
    """How many ranks share each row: sequence parallel's size, which the launcher passes on from the accelerate
    file."""
    size = os.environ.get(ROW_RANKS, "")
    return max(int(size), 1) if size.isdecimal() else 1


def data_ranks() -> int:
    """How many parts a batch of all ranks has."""
    return max(ranks() // row_ranks(), 1)


def data_rank() -> int:
    """Which of these parts is this rank's."""
    return rank() // row_ranks()


def first_of_row() -> bool:
    """Whether this rank counts what the ranks of its row all have."""
    return rank() % row_ranks() == 0


def first_rank_of_node() -> int:
    return rank() - int(os.environ.get("LOCAL_RANK", rank()))


def wait_for_all() -> None:
    """Returns when every rank has come here."""
    if ranks() == 1:
        return
    store, key = _store(), f"all-{next(_turns)}"
    if store.add(key, 1) == ranks():
        store.set(f"{key}-came", "1")
    _await(store, f"{key}-came")


def agreed(work: Callable[[], Any]) -> Any:
    """What `work()` returns on rank 0, on all of them. Its UserError is raised on all; where rank 0 fails otherwise,
    the others raise RankFailed."""
    if ranks() == 1:
        return work()
    store, key = _store(), f"agreed-{next(_turns)}"
    return _told(store, key, work) if rank() == 0 else _heard(store, key, 0)


@contextmanager
def first_of_node():
    """Its body runs on the first rank of each node, and when that is done on the others, which find its results on
    the disk. Where it fails, the others raise as in `agreed` and do not run it."""
    first, turn = first_rank_of_node(), next(_turns)
    if ranks() == 1:
        yield
        return
    store, key = _store(), f"first-{turn}-{first}"
    if rank() != first:
        _heard(store, key, first)
        yield
        return
    try:
        yield
    except BaseException as error:
        store.set(key, pickled(_outcome(error)))
        raise
    store.set(key, pickled((None, None, None)))


def gathered(value: Any) -> list:
    """Every rank's `value`, by rank. Raises TypeError for a tensor that is not in the CPU's memory."""
    data = pickled(value)
    if ranks() == 1:
        return [value]
    wait_for_all()
    parts: list = [None] * ranks()
    dist.all_gather_object(parts, data)
    return [pickle.loads(part) for part in parts]


def gathered_tensor(values: torch.Tensor) -> torch.Tensor:
    """(ranks, …) on the tensor's device, which is the process group's; of one shape and dtype on all ranks. One
    collective."""
    if ranks() == 1:
        return values[None]
    parts = [torch.empty_like(values, memory_format=torch.contiguous_format) for _ in range(ranks())]
    dist.all_gather(parts, values.contiguous())
    return torch.stack(parts)


def share(sizes: dict[str, int]) -> list[str]:
    """This rank's part of `shares`."""
    return shares(sizes, ranks(), min(int(os.environ.get("LOCAL_WORLD_SIZE", ranks())), ranks()))[rank()]


def shares(sizes: dict[str, int], n_ranks: int, of_a_node: int) -> list[list[str]]:
    """For each rank the names of files that it is to read through: its own, which its node has in memory or is about to
    load, and of the others, spread over the first node's ranks, about as many bytes as its neighbors."""
    names_by_rank: list[list[str]] = [[] for _ in range(n_ranks)]
    load = [0] * n_ranks
    own = {name: int(match[1]) for name in sizes if (match := OF_A_RANK.search(name)) and int(match[1]) < n_ranks}
    for name in sorted(sizes, key=lambda name: (name not in own, -sizes[name], name)):
        owner = own[name] if name in own else min(range(of_a_node), key=load.__getitem__)
        names_by_rank[owner].append(name)
        load[owner] += sizes[name]
    return names_by_rank


class _Pickler(pickle.Pickler):
    def persistent_id(self, value):
        # Such a tensor would be rebuilt on the sender's GPU by every receiver: a context of each rank on each GPU.
        if isinstance(value, torch.Tensor) and value.device.type != "cpu":
            raise TypeError(f"a tensor on {value.device} among what ranks tell each other: move it to the CPU first")
        return None


def pickled(value: Any) -> bytes:
    """Raises TypeError for a tensor that is not in the CPU's memory, however deep inside."""
    file = io.BytesIO()
    _Pickler(file, pickle.HIGHEST_PROTOCOL).dump(value)
    return file.getvalue()


def _told(store, key: str, work: Callable[[], Any]) -> Any:
    try:
        value = work()
        data = pickled((value, None, None))
    except BaseException as error:
        store.set(key, pickled(_outcome(error)))
        raise
    store.set(key, data)
    return value


def _outcome(error: BaseException) -> tuple[None, str, tuple]:
    """For the ranks that wait: no value, the kind of error, and its arguments."""
    if isinstance(error, UserError):
        return None, "user", (str(error), error.key)
    kind = "left" if isinstance(error, Preempted) else "other"
    return None, kind, (str(error) or type(error).__name__,)


def _heard(store, key: str, first: int) -> Any:
    value, kind, parts = pickle.loads(_await(store, key))
    if kind == "user":
        raise UserError(*parts)
    if kind == "left":
        raise Preempted(*parts)
    if kind == "other":
        raise RankFailed(f"rank {first} failed: {parts[0]}")
    return value


def _store():
    return dist.PrefixStore("mdpo", dist.distributed_c10d._get_default_store())


def _await(store, key: str) -> bytes:
    """The key's value as soon as it is there. Polls: the store's own wait would hold signals up."""
    pause, end = PAUSE_S[0], time.monotonic() + LIMIT_S
    while not store.check([key]):
        if time.monotonic() > end:
            raise RankFailed(f"no other rank has come to {key} for {LIMIT_S // 3600} hours")
        time.sleep(pause)
        pause = min(pause * 1.5, PAUSE_S[1])
    return store.get(key)


# ------------------------------------------------------------------------------------ failures: any rank, at any time


def failure() -> dict | None:
    """{"rank", "host", "line"} of the first rank to report its failure; None where none has, or in one process
    or without a process group."""
    if ranks() == 1:
        return None
    store = _store()
    return json.loads(store.get(FAILED)) if store.check([FAILED]) else None


def claim_failure(line: str) -> dict:
    """As `failure`, after this rank has reported its own, which counts if no other rank has before."""
    mine = {"rank": rank(), "host": platform.node(), "line": line}
    return json.loads(_store().compare_set(FAILED, "", json.dumps(mine)))
