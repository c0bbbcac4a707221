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
    """Tasks, conversations, the share of those with the whole reward, the share of tasks with at least one, the mean
    reward of those that have one, how conversations and calls ended, and (conversations, right) by number of turns."""
    done, by_key, turns = list(trajectories), defaultdict(list), defaultdict(list)
    for trajectory in done:
        by_key[trajectory.key].append(trajectory.correct)
        turns[trajectory.turns].append(trajectory.correct)
    return {
        "tasks": len(by_key),
        "conversations": len(done),
        "accuracy": sum(t.correct for t in done) / len(done),
        "any_correct": sum(map(any, by_key.values())) / len(by_key),
        "reward": sum(rewards) / len(rewards)
        if (rewards := [t.reward for t in done if t.reward is not None])
        else None,
        "without_reward": sum(t.reward is None for t in done),
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
        table.add_row("tasks with a right one", with_interval(figures["any_correct"], tasks))
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


def with_interval(share: float, n: int) -> str:
    """A share of n independent trials, with its 95 % interval."""
    low, high = wilson(share, n)
    return f"{share:.4f} ({low:.3f} to {high:.3f})"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for n, column in enumerate(columns):
        table.add_column(column, justify="right" if n else "left")
    return table
