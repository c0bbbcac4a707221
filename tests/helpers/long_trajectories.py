"""Files of trajectories that are long beside what may be kept of them, and the memory that reading them takes."""

import json
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from mdpo.rollouts.records import Trajectory

CHARACTERS, TOKENS, SAMPLES = 60_000, 1_000, 4
FIRST = 250  # the id of trajectory 0's tokens; above 256 each one is an object
KEPT = 4_000  # bytes of a trajectory that may stay in memory
AT_A_TIME = 20  # trajectories that may be in memory: copies of one as bytes, text and objects, and a pair


def write_long(path: Path, number: int, settings: dict | None = None) -> None:
    """`number` trajectories by the policy "p", SAMPLES a task, whose last one of each is wrong."""
    with path.open("w", encoding="utf-8") as file:
        for n in range(number):
            key, sample = f"task {n // SAMPLES}", n % SAMPLES
            turns = [{"role": "user", "content": key}, {"role": "assistant", "content": f"{n} " + "x" * CHARACTERS}]
            ids = {"input_ids": [FIRST + n] * TOKENS, "assistant_masks": [0] + [1] * (TOKENS - 1)}
            one = Trajectory(key, sample, {"prompt": key}, turns, [ids], float(sample < SAMPLES - 1))
            one.settings, one.policy, one.ended, one.turns = settings or {}, "p", "done", 1
            file.write(json.dumps(asdict(one)) + "\n")


def check_peak(path: Path, call: Callable[[], object]) -> None:
    """Of reading a file of `write_long`: few trajectories at a time, and little of each."""
    with path.open("rb") as file:
        lengths = [len(line) for line in file]
    bound = AT_A_TIME * max(lengths) + KEPT * len(lengths)
    assert bound < sum(lengths) / 4
    tracemalloc.start()
    try:
        call()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < bound, f"{peak / 1e6:.1f} MB of a file of {sum(lengths) / 1e6:.1f} MB"
