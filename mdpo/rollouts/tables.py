"""Tables of held-out metrics by number of turns, and of rollouts, with confidence intervals."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import torch
from rich.table import Table

from mdpo.loss.metrics import COLUMNS, summarize
from mdpo.rollouts.records import ENDS, Trajectory
from mdpo.types import turn_begins

Z = 1.959964  # of the normal distribution, for 95 %


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share observed in n independent trials (Wilson 1927): (low, high); (0, 1) without trials.
    Example: 8 of 10 -> (0.4902, 0.9433)."""
    if n == 0:
        return 0.0, 1.0
    center, spread = share + Z**2 / (2 * n), Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    scale = 1 + Z**2 / n
    return max(0.0, (center - spread) / scale), min(1.0, (center + spread) / scale)


def mean_interval(groups: Iterable[Sequence[float]]) -> tuple[float, float] | None:
    """The 95 % interval of the mean m of all N values, where only groups (the samples of a task) are independent:
    m ± Z · √(n / (n − 1) · Σ_g (Σ_g v − m |g|)²) / N, of n groups. None of fewer than two groups.
    Example: [[1, 0], [1, 1]] -> m = 0.75, √(2 · (0.25 + 0.25)) / 4 = 0.25, (0.2600, 1.2400)."""
    groups = [group for group in groups if group]
    n, count = len(groups), sum(map(len, groups))
    if n < 2:
        return None
    mean = sum(map(sum, groups)) / count
    spread = math.sqrt(n / (n - 1) * sum((sum(group) - mean * len(group)) ** 2 for group in groups)) / count
    return mean - Z * spread, mean + Z * spread


def reward_interval(rewards: Iterable[Sequence[float]]) -> tuple[float, float] | None:
    """The 95 % interval of the mean reward, of each task's rewards: Wilson's where all are 0 or 1, as of a share."""
    groups = [group for group in rewards if group]
    values = [value for group in groups for value in group]
    if values and set(values) <= {0, 1}:
        return wilson(sum(values) / len(values), len(groups))
    return mean_interval(groups)


def count_turns(mask: Sequence[int]) -> int:
    """The supervised turns of a side: runs of 1 in its mask. Example: [0, 1, 1, 0, 1] -> 2."""
    return int(turn_begins(mask).sum())


def by_turns(table: torch.Tensor, turns: Sequence[int]) -> dict[str, dict[str, float]]:
    """{number of turns, and "all": pairs, accuracy, margin (in reward), loss} of a table of per-pair
    metrics (see mdpo.loss.metrics, (B, columns)); `turns[row]` belongs to the pair of that row number."""
    turns_of_pair = torch.tensor([turns[row] for row in table[:, COLUMNS.index("row")].long().tolist()])
    groups = {str(n): table[turns_of_pair == n] for n in sorted(set(turns_of_pair.tolist()))} | {"all": table}
    figures = {}
    for name, rows in groups.items():
        metrics = summarize(rows)
        figures[name] = {
            "pairs": len(rows),
            "accuracy": metrics["rewards/accuracies"],
            "margin": metrics["rewards/margins"],
            "loss": rows[:, COLUMNS.index("loss")].mean().item(),
        }
    return figures


def held_out_table(figures: dict[str, dict[str, float]]) -> Table:
    table = _table(
        "held-out pairs, by turns of the chosen side", "turns", "pairs", "reward accuracy", "mean margin", "loss"
    )
    for name, f in figures.items():
        if name == "all":
            table.add_section()
        accuracy = with_interval(f["accuracy"], f["pairs"])
        table.add_row(name, str(f["pairs"]), accuracy, f"{f['margin']:.4f}", f"{f['loss']:.4f}")
    return table


def rollout_figures(trajectories: Iterable[Trajectory]) -> dict:
    """Tasks, conversations, samples of a task, the share of conversations with the whole reward (pass@1), of tasks with
    at least one (pass@k) and with no other (pass^k), the mean reward of those that have one with its interval, mean
    turns, how conversations and calls ended, and (conversations, right) by number of turns."""
    done, by_key, turns, rewards = list(trajectories), defaultdict(list), defaultdict(list), defaultdict(list)
    for trajectory in done:
        by_key[trajectory.key].append(trajectory.correct)
        turns[trajectory.turns].append(trajectory.correct)
        if trajectory.reward is not None:
            rewards[trajectory.key].append(trajectory.reward)
    rewarded = sum(map(len, rewards.values()))
    return {
        "tasks": len(by_key),
        "conversations": len(done),
        "samples": max(map(len, by_key.values())),
        "accuracy": sum(t.correct for t in done) / len(done),
        "any_correct": sum(map(any, by_key.values())) / len(by_key),
        "all_correct": sum(map(all, by_key.values())) / len(by_key),
        "reward": sum(map(sum, rewards.values())) / rewarded if rewarded else None,
        "reward_interval": reward_interval(rewards.values()),
        "without_reward": len(done) - rewarded,
        "turns": sum(t.turns for t in done) / len(done),
        "ended": {end: sum(t.ended == end for t in done) for end in ENDS},
        "calls": dict(Counter(ended for t in done for _, ended in t.calls)),
        "by_turns": {n: (len(right), sum(right)) for n, right in sorted(turns.items())},
    }


def rollout_tables(figures: dict) -> list[Table]:
    """Intervals are over tasks: conversations of one task are not independent."""
    tasks, conversations = figures["tasks"], figures["conversations"]
    table = _table(f"rollouts: {tasks} tasks, {conversations} conversations", "", "")
    table.show_header = False
    table.add_row("right answers", with_interval(figures["accuracy"], tasks))
    if conversations > tasks:
        k = figures["samples"]
        table.add_row(f"tasks with a right one (pass@{k})", with_interval(figures["any_correct"], tasks))
        table.add_row(f"tasks with no wrong one (pass^{k})", with_interval(figures["all_correct"], tasks))
    if figures["reward"] is not None:
        table.add_row("mean reward", f"{figures['reward']:.4f}")
    if figures["without_reward"]:
        table.add_row("without a reward", str(figures["without_reward"]))
    for end, count in figures["ended"].items():
        table.add_row(f"ended: {end}", str(count))
    table.add_row("calls", str(sum(figures["calls"].values())))
    for end, count in sorted(figures["calls"].items()):
        if end != "ok":
            table.add_row(f"calls: {end}", str(count))
    turns = _table("rollouts by turns", "turns", "conversations", "right answers")
    for n, (count, right) in figures["by_turns"].items():
        turns.add_row(str(n), str(count), with_interval(right / count, min(count, tasks)))
    return [table, turns]


def with_interval(share: float, n: int, digits: int = 4) -> str:
    """A share of n independent trials, with its 95 % interval to a digit less."""
    low, high = wilson(share, n)
    return f"{share:.{digits}f} ({low:.{digits - 1}f} to {high:.{digits - 1}f})"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for n, column in enumerate(columns):
        table.add_column(column, justify="right" if n else "left")
    return table
