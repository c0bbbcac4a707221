"""Trajectories on disk: JSON Lines, one appended as each ends, so that a kill loses none that has ended, and the same
command continues with those that are missing."""

import fcntl
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from tqdm.auto import tqdm

from mdpo.errors import UserError
from mdpo.rollouts.tasks import Task
from mdpo.sequences import common_prefix
from mdpo.types import Message

ENDS = ("done", "cut", "too long", "max turns", "refused", "environment error")

RIGHT = "right_answer"  # the reward of maths, by the function of that name
ROUNDING = 1e-9  # of a sum of weighted rewards
BEGIN = b'{"key"'  # of each line
BLOCK = 1 << 16


@dataclass
class SampledTurn:
    """The ids that the policy was given and those that it sampled, its stop included; the log-prob of each in nats,
    where the backend knows it."""

    prompt: list[int]
    ids: list[int]
    logprobs: list[float] | None = None


@dataclass
class Trajectory:
    """One conversation. `ended` is one of ENDS: the policy called nothing more; a token limit cut its turn; the context
    had no room for a turn; it had all its turns; the chat template refused what was said, or the environment failed, as
    `error` says. `calls` are (tool, how it
    ended) in order. `rewards` has each source's number, `reward` their weighted sum, None where a source had none.
    `sequences` are the ids as they were sampled (see `recorded_sequences`), empty where the backend has no ids.
    `settings` are those of sampling, `policy` says which weights sampled."""

    key: str
    sample: int
    task: dict[str, Any]
    messages: list[Message]
    sequences: list[dict[str, list]] = field(default_factory=list)
    reward: float | None = None
    rewards: dict[str, float | None] = field(default_factory=dict)
    ended: str = ""
    error: str = ""
    turns: int = 0
    calls: list[tuple[str, str]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    policy: str = ""
    prompt_messages: int = 0  # how many of `messages` came before the first turn
    tools: list[dict[str, Any]] | None = None  # as the chat template got them

    @property
    def correct(self) -> bool:
        """Of maths by math-verify alone, whatever is added to it; else a reward of 1 and more."""
        judged = self.rewards.get(RIGHT, self.reward)
        return self.reward is not None and judged is not None and judged >= 1 - ROUNDING


def recorded_sequences(turns: Iterable[SampledTurn]) -> list[dict[str, list]]:
    """The turns as sequences of ids, a new one where the next prompt does not begin with all ids so far; the form that
    rows may have (docs/rows.md): 1 in `assistant_masks` where the policy sampled the token.

    Example: prompt [1, 2] sampled [3], prompt [1, 2, 3, 4] sampled [5] -> one sequence [1, 2, 3, 4, 5], mask
    [0, 0, 1, 0, 1]; a second prompt [1, 9] sampled [5] begins another one.
    """
    sequences = list[dict[str, list]]()
    for turn in turns:
        last = sequences[-1] if sequences else None
        if last is None or common_prefix(last["input_ids"], turn.prompt) < len(last["input_ids"]):
            last = {"input_ids": [], "assistant_masks": [], "logprobs": []}
            sequences.append(last)
        new = turn.prompt[len(last["input_ids"]) :]
        last["input_ids"] += [*new, *turn.ids]
        last["assistant_masks"] += [0] * len(new) + [1] * len(turn.ids)
        last["logprobs"] += [None] * len(new) + (turn.logprobs or [None] * len(turn.ids))
    for sequence in sequences:
        known = [x for x, sampled in zip(sequence["logprobs"], sequence["assistant_masks"], strict=True) if sampled]
        if None in known:
            del sequence["logprobs"]
    return sequences


def first_settings(path: Path) -> dict[str, Any]:
    """Of the first trajectory in a file; {} where there is none."""
    try:
        with path.open(encoding="utf-8") as file:
            return json.loads(file.readline())["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}


class Records:
    """The trajectories of one file, which one process writes; without their messages and sequences, which are on the
    disk. Raises UserError where the file has other ones than this command would make: of another policy, of other
    settings, of tasks that are not there."""

    def __init__(self, path: Path, policy: str, settings: dict[str, Any]):
        self.path, self.policy, self.settings = path, policy, settings
        self.torn = 0  # bytes of a line that a kill cut, removed
        self._file = path.open("a", encoding="utf-8", errors="backslashreplace")
        # A file beside it, that nobody reads: a lock of this kind goes with the first descriptor that is closed.
        self._lock = path.with_name(f".{path.name}.lock").open("w")
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{path}: another process writes it.", "save") from None
        self.done = self._read()

    def _read(self) -> list[Trajectory]:
        """One line at a time is in memory: a stage may have tens of GB of them."""
        done, tasks = list[Trajectory](), dict[str, dict[str, Any]]()
        with self.path.open("rb") as file:
            whole, size = whole_lines(file), os.fstat(file.fileno()).st_size
            file.seek(whole)
            begin = file.read(len(BEGIN))
            if not (begin == BEGIN or BEGIN.startswith(begin)):
                raise UserError(f"{self.path}: is no file of trajectories.", "save")
            texts = self._texts(file, whole)
            for number, text in enumerate(texts, 1):
                try:
                    one = read_trajectory(text, f"{self.path}:{number}")
                except UserError:
                    for _ in texts:  # of a file that is no text at all, that is what is said
                        pass
                    raise
                self._refuse_others(one, number)
                task = tasks.setdefault(one.key, one.task)  # one for all samples
                one.task, one.policy, one.settings = task if task == one.task else one.task, self.policy, self.settings
                done.append(brief(one))
        twice = [key for key, n in Counter((t.key, t.sample) for t in done).items() if n > 1]
        if twice:
            raise UserError(f"{self.path}: {twice[0][0]!r}, sample {twice[0][1]}, is there twice.", "save")
        self.torn = size - whole
        if self.torn:  # nothing of another file has been touched
            os.truncate(self.path, whole)
        return done

    def _texts(self, file: BinaryIO, whole: int) -> Iterator[str]:
        """The lines of the first `whole` bytes. Raises UserError."""
        file.seek(0)
        name, begin = f"reading {self.path}", 0
        with tqdm(total=whole, unit="B", unit_scale=True, desc=name, delay=3, disable=None) as bar:
            while begin < whole:
                line = file.readline()
                try:
                    text = line[:-1].decode("utf-8")
                except UnicodeDecodeError as error:
                    raise UserError(f"{self.path}: is not UTF-8 text (byte {begin + error.start}).", "save") from None
                yield text
                begin += len(line)
                bar.update(len(line))

    def _refuse_others(self, trajectory: Trajectory, number: int) -> None:
        theirs = {"policy": trajectory.policy, **trajectory.settings}
        ours = {"policy": self.policy, **self.settings}
        others = [f"{name} {theirs.get(name)!r}, now {value!r}" for name, value in ours.items()
                  if theirs.get(name) != value]  # fmt: skip
        if others:
            raise UserError(
                f"{self.path}:{number}: was sampled with {'; '.join(others)}. Give another file, or remove it.",
                "save",
            )

    def missing(self, wanted: list[tuple[Task, int]]) -> list[tuple[Task, int]]:
        """Of (task, sample) those that have not ended yet. Raises UserError where the file has others."""
        there = {(trajectory.key, trajectory.sample) for trajectory in self.done}
        if foreign := there - {(task.key, sample) for task, sample in wanted}:
            key, sample = min(foreign)
            raise UserError(f"{self.path}: has {key!r}, sample {sample}, which these tasks do not have.", "save")
        rows = {task.key: task.row for task, _ in wanted}
        if changed := [trajectory.key for trajectory in self.done if trajectory.task != rows[trajectory.key]]:
            raise UserError(f"{self.path}: the task {changed[0]!r} was another one.", "save")
        return [(task, sample) for task, sample in wanted if (task.key, sample) not in there]

    def append(self, trajectory: Trajectory) -> None:
        """Written to the disk before it returns. Raises UserError where that takes no more."""
        trajectory.policy, trajectory.settings = self.policy, self.settings
        try:
            self._file.write(json.dumps(asdict(trajectory), ensure_ascii=False) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(
                f"{self.path}: {error.strerror}; {len(self.done)} trajectories are there. The same command continues.",
                "save",
            ) from error
        self.done.append(brief(trajectory))

    def close(self) -> None:
        self._file.close()
        self._lock.close()


def whole_lines(file: BinaryIO) -> int:
    """The bytes up to and with the last line end, looked for from the end."""
    end = file.seek(0, os.SEEK_END)
    while end:
        begin = max(0, end - BLOCK)
        file.seek(begin)
        if (found := file.read(end - begin).rfind(b"\n")) >= 0:
            return begin + found + 1
        end = begin
    return 0


def brief(trajectory: Trajectory) -> Trajectory:
    """Without what takes the memory: thousands of these are held."""
    return replace(trajectory, messages=[], sequences=[], tools=None)


def read_trajectory(line: str, where: str) -> Trajectory:
    """Raises UserError for a line that is none."""
    try:
        row = json.loads(line)
        row["calls"] = [tuple(call) for call in row["calls"]]
        return Trajectory(**row)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where}: is no trajectory ({error}).", "trajectory") from error
