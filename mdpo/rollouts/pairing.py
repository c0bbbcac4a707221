"""Trajectories → preference pairs, and what became of the rest."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import isfinite
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm.auto import tqdm

from mdpo.data.files import placed_rows, row_at
from mdpo.data.groups import AnswerPairs
from mdpo.errors import UserError
from mdpo.rollouts.scored import Scored, same_turns, scored

UNFINISHED = ("cut", "too long", "refused", "environment error")
NO_REWARD, NOT_ENDED, REPEATED = "without a reward", "not ended by the policy", "the same as an earlier one"
FEWER, ALIKE, NO_BRANCH = "fewer than two left", "no two differ in reward", "no two went the same way for a turn"
HALF = "with half of a surrogate pair, which no UTF-8 text has"
CACHED = 32  # trajectories of a task that are in several of its pairs


@dataclass(frozen=True)
class Pairing:
    """`by` is a rule of `AnswerPairs`, or branch: of two trajectories that went the same way for a turn at least, the
    longest way first. With `length_matched` those of the least difference in length come first."""

    by: str = "best_worst"  # best_worst | all | adjacent | random | branch
    min_reward_gap: float = 0.0
    max_pairs_per_prompt: int | None = None
    length_matched: bool = False
    seed: int = 42

    def pairs(self, found: list[Scored], key: str) -> list[tuple[Scored, Scored]]:
        """(chosen, rejected) of the trajectories of one task."""
        rewards: list[float | None] = [one.reward for one in found]
        if self.by != "branch" and not self.length_matched:
            rule = AnswerPairs(self.by, self.min_reward_gap, self.max_pairs_per_prompt)
            return [(found[i], found[j]) for i, j in rule.of_rewards(rewards, f"{self.seed}/{key}")]
        if not found:
            return []
        candidates = AnswerPairs("all", self.min_reward_gap).of_rewards(rewards, key)
        if self.by == "best_worst":
            best, worst = max(one.reward for one in found), min(one.reward for one in found)
            candidates = [(i, j) for i, j in candidates if (found[i].reward, found[j].reward) == (best, worst)]
        two = [(found[i], found[j]) for i, j in candidates]
        if self.by == "branch":
            two = [pair for pair in two if same_turns(*pair)]
            two.sort(key=lambda pair: -same_turns(*pair))
        if self.length_matched:
            two.sort(key=lambda pair: abs(pair[0].length - pair[1].length))
        limit = self.max_pairs_per_prompt or (1 if self.by == "best_worst" else None)
        return two[:limit]


@dataclass
class Report:
    """Counts: trajectories left out and tasks without a pair, by reason; pairs, `longer` those whose chosen side is."""

    trajectories: int = 0
    tasks: int = 0
    paired: int = 0
    pairs: int = 0
    longer: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    unpaired: Counter[str] = field(default_factory=Counter)

    def lines(self) -> list[str]:
        lines = [f"{self.trajectories} trajectories of {self.tasks} tasks"]
        lines += [f"  left out: {n} {why}" for why, n in sorted(self.left_out.items())]
        lines.append(f"{self.pairs} pairs of {self.paired} tasks")
        lines += [f"  without a pair: {n} tasks, {why}" for why, n in sorted(self.unpaired.items())]
        if self.pairs:
            lines.append(
                f"  the chosen side is longer in {self.longer} of {self.pairs} ({self.longer / self.pairs:.0%})"
            )
        return lines

    def as_dict(self) -> dict[str, Any]:
        """For `pairs.report.json`."""
        return {**vars(self), "left_out": dict(self.left_out), "unpaired": dict(self.unpaired)}


def report_of(pairs: Path) -> Path:
    """Where the report of a file of pairs is. Example: pairs.jsonl -> pairs.report.json."""
    return pairs.with_suffix(".report.json")


def paired_rows(
    paths: Iterable[Path], pairing: Pairing, max_length: int | None = None
) -> tuple[Iterator[dict[str, Any]], Report]:
    """(rows for a recipe's dataset, report), without trajectories of a recorded sequence over `max_length` tokens:
    training would drop their pairs. The rows are made one by one, and the report is whole when they are at their end.
    Raises UserError, while the rows are made."""
    report = Report()
    return _rows(paths, pairing, max_length, report), report


def _rows(paths: Iterable[Path], pairing: Pairing, max_length: int | None, report: Report) -> Iterator[dict[str, Any]]:
    with TemporaryDirectory(prefix="mdpo-pairs-") as folder:
        tasks = by_task(paths, report, max_length, Path(folder, "copies.jsonl"))
        report.tasks = len(tasks)
        for key, found in tqdm(tasks.items(), desc="pairing", unit=" tasks", delay=3, disable=None):
            read = lru_cache(maxsize=CACHED)(row_of)
            pairs = pairing.pairs(found, key)
            if not pairs:
                report.unpaired[why_unpaired(found, pairing)] += 1
            for number, (chosen, rejected) in enumerate(pairs):
                better, worse = read(chosen), read(rejected)
                row = {"chosen": side(better), "rejected": side(worse), "id": f"{key}-{number}"}
                yield {**row, "tools": better["tools"]} if better.get("tools") else row
                report.longer += chosen.length > rejected.length
            report.pairs += len(pairs)
            report.paired += bool(pairs)


def row_of(one: Scored) -> dict[str, Any]:
    """From the disk. Raises UserError where another trajectory is there by now."""
    assert one.place is not None
    path, begin = one.place
    row = row_at(path, begin)
    if read_scored(row, f"{path}, byte {begin}", Report())[1] != one:
        raise UserError(f"trajectories: {path} was changed while its pairs were made.", "trajectories")
    return row


def side(row: dict[str, Any]) -> Any:
    """Of a trajectory, as a row of pairs has it."""
    return {"messages": row["messages"], "sequences": row["sequences"]} if row.get("sequences") else row["messages"]


def why_unpaired(found: list[Scored], pairing: Pairing) -> str:
    rewards = [one.reward for one in found]
    if len(rewards) < 2:
        return FEWER
    if max(rewards) == min(rewards):
        return ALIKE
    if max(rewards) - min(rewards) < pairing.min_reward_gap:
        return f"no two differ by min_reward_gap {pairing.min_reward_gap:g}"
    return NO_BRANCH


def by_task(paths: Iterable[Path], report: Report, max_length: int | None, copies: Path) -> dict[str, list[Scored]]:
    """key -> its trajectories, each once, in the order of the files. Those of files that cannot be read from their
    middle are written to `copies`. Raises UserError."""
    tasks: dict[str, list[Scored]] = {}
    for path in paths:
        if not path.is_file():
            raise UserError(f"trajectories: there is no file {path}.")
        rows = tqdm(placed_rows(str(path)), desc=f"reading {path}", unit=" rows", delay=3, disable=None)
        for number, begin, row in rows:
            key, one = read_scored(row, f"{path}:{number}", report)
            report.trajectories += 1
            found = tasks.setdefault(key, [])
            if one is None:
                continue
            if max_length and any(len(sequence["input_ids"]) > max_length for sequence in row.get("sequences") or []):
                report.left_out[f"longer than max_length {max_length}"] += 1
                continue
            if any(one.digest == other.digest for other in found):
                report.left_out[REPEATED] += 1
                continue
            found.append(replace(one, place=copied(row, copies) if begin is None else (path, begin)))
    return tasks


def copied(row: dict[str, Any], copies: Path) -> tuple[Path, int]:
    """The place of a row in `copies`, at whose end it is written."""
    with copies.open("ab") as file:
        begin = file.tell()
        file.write(json.dumps(row).encode() + b"\n")
    return copies, begin


def read_scored(row: dict[str, Any], where: str, report: Report) -> tuple[str, Scored | None]:
    """(key, trajectory) of a row: `messages`, `reward` (a number) or `correct` (true or false), and a `key`, else the
    messages before the first turn are it; `sequences`, `tools` and `ended` may be there. None where it is left out.
    Raises UserError."""
    messages = row.get("messages")
    turns = [m.get("role") if isinstance(m, dict) else None for m in messages] if isinstance(messages, list) else []
    if None in turns or "user" not in turns or not {"reward", "correct"} & row.keys():
        raise UserError(f"{where}: is no trajectory: it needs `messages` and `reward` or `correct`.", "trajectory")
    assert isinstance(messages, list)
    prompt = messages[: turns.index("assistant")] if "assistant" in turns else messages
    key = str(row.get("key") or json.dumps(prompt, sort_keys=True, ensure_ascii=False))
    reward = row["reward"] if "reward" in row else row["correct"]
    check_reward(reward, where)
    if reward is None or row.get("ended") in UNFINISHED or "assistant" not in turns:
        report.left_out[NO_REWARD if reward is None else NOT_ENDED] += 1
        return key, None
    if has_half_pairs(row):
        report.left_out[HALF] += 1
        return key, None
    n_prompt = row.get("prompt_messages")
    try:
        n_prompt = n_prompt if isinstance(n_prompt, int) else 0
        return key, scored(messages, float(reward), row.get("sequences") or [], n_prompt)
    except (KeyError, TypeError) as error:
        raise UserError(f"{where}: sequences have no assistant_masks ({error}).", "sequences") from error


def check_reward(reward: Any, where: str) -> None:
    """Raises UserError for what is neither a finite number nor None."""
    if reward is not None and (not isinstance(reward, int | float) or not isfinite(reward)):
        raise UserError(f"{where}: reward: {reward!r:.40} is not a finite number.", "reward")


def has_half_pairs(row: dict[str, Any]) -> bool:
    """Whether a text that a pair takes cannot be written as UTF-8: an emoji that was cut in JSON's escapes."""
    taken = {name: row.get(name) for name in ("key", "messages", "tools")}
    try:
        json.dumps(taken, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False
