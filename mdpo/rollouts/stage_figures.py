"""A file of trajectories as figures, read line by line: what is kept of a trajectory is a few numbers and its place."""

import os
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from mdpo.errors import UserError
from mdpo.rollouts.records import Trajectory, brief, read_trajectory
from mdpo.rollouts.tables import rollout_figures


@dataclass(frozen=True)
class Place:
    """Where the line of a trajectory begins, in bytes, and whether the trajectory is right."""

    offset: int
    correct: bool


@dataclass(frozen=True)
class StageFigures:
    """`rollout_figures` with `tokens` beside them, and for each task the place of its first sample."""

    figures: dict[str, Any]
    places: dict[str, Place]


def stage_figures(path: Path) -> StageFigures:
    """Read once in a process, as long as the file stays the same. Raises UserError where it cannot be read, is empty,
    or has a line that is no trajectory."""
    try:
        facts = os.stat(path)
        return _read(path, facts.st_size, facts.st_mtime_ns)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).", "trajectories") from error


@lru_cache(maxsize=64)
def _read(path: Path, size: int, changed_ns: int) -> StageFigures:
    """`size` and `changed_ns` are what a file is known by."""
    kept, places, first = list[Trajectory](), dict[str, Place](), dict[str, int]()
    counted, offset = Tokens(), 0
    with path.open("rb") as file:
        for number, line in enumerate(tqdm(file, desc=f"reading {path}", unit=" rows", delay=3, disable=None), 1):
            one = _trajectory(line, f"{path}:{number}")
            try:
                counted.add(one)
            except (KeyError, TypeError) as error:
                raise UserError(
                    f"{path}:{number}: sequences have no assistant_masks ({error}).", "sequences"
                ) from error
            kept.append(replace(brief(one), task={}, settings={}))
            if one.sample < first.get(one.key, one.sample + 1):
                first[one.key], places[one.key] = one.sample, Place(offset, one.correct)
            offset += len(line)
    if not kept:
        raise UserError(f"{path}: has no trajectory.", "trajectories")
    return StageFigures({**rollout_figures(kept), "tokens": counted.figures()}, places)


def trajectory_at(path: Path, offset: int) -> Trajectory:
    """The one whose line begins there. Raises UserError."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return _trajectory(file.readline(), f"{path}, byte {offset}")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).", "trajectories") from error


def _trajectory(line: bytes, where: str) -> Trajectory:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: is not UTF-8 text (byte {error.start}).", "trajectories") from None
    return read_trajectory(text, where)


class Tokens:
    """Counts sampled tokens of trajectories that have ids."""

    def __init__(self):
        self.lengths, self.turns = list[int](), 0

    def add(self, trajectory: Trajectory) -> None:
        if trajectory.sequences:
            self.lengths.append(sum(sum(one["assistant_masks"]) for one in trajectory.sequences))
            self.turns += trajectory.turns

    def figures(self) -> dict[str, float] | None:
        """Means of a turn and of a trajectory, and the longest trajectory; None where none has ids."""
        if not self.turns:
            return None
        total = sum(self.lengths)
        return {
            "turn": total / self.turns,
            "trajectory": total / len(self.lengths),
            "longest": max(self.lengths),
        }
