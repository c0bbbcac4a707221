"""A run's log history: curves over steps, metrics before and after, how far chosen log-probs moved.

`history` is Trainer's `state.log_history`, a list of dicts with a `step` each. Checkpoints save it, so after a resume
it is that of the whole run.
"""

import math
from dataclasses import dataclass
from typing import Any

HELD_OUT = "eval_"
FALL = 0.01  # of |log-prob|: a smaller fall is stated without a warning


@dataclass
class Curve:
    """(step, value) of one metric in order of steps, one value a step: `training` as logged, `held_out` of
    evaluations."""

    training: list[tuple[int, float]]
    held_out: list[tuple[int, float]]

    def __bool__(self):
        return bool(self.training or self.held_out)


def curve(history: list[dict[str, Any]], name: str) -> Curve:
    """The curve of the metric `name`. Non-finite values are left out (`not_finite` counts them); of several at one step
    the last one counts."""
    return Curve(_points(history, name), _points(history, HELD_OUT + name))


def _points(history: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    value_at = {log["step"]: log[name] for log in history if name in log and math.isfinite(log[name])}
    return sorted(value_at.items())


def not_finite(history: list[dict[str, Any]]) -> dict[str, int]:
    """metric -> how many of its logged values are non-finite, for metrics that have any."""
    counts: dict[str, int] = {}
    for log in history:
        for name, value in log.items():
            if isinstance(value, float) and not math.isfinite(value):
                counts[name] = counts.get(name, 0) + 1
    return counts


def smoothed(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Means of each point and its neighbors, a twentieth of the curve's points to each side, as far as there are any.
    Under 20 points nothing is smoothed."""
    half, values, out = len(points) // 20, [value for _, value in points], []
    for i, (step, _) in enumerate(points):
        window = values[max(0, i - half) : i + half + 1]
        out.append((step, sum(window) / len(window)))
    return out


def evaluations(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [log for log in history if HELD_OUT + "loss" in log]


def before_and_after(history: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The evaluation before the first step and the last one after it, each {} where there is none."""
    logs = evaluations(history)
    before = next((log for log in logs if log["step"] == 0), {})
    return before, next((log for log in reversed(logs) if log["step"] > 0), {})


def latest_turns(history: list[dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """(which pairs and step, that log with names without prefix) of the last log with metrics by turn: an evaluation's
    where there is one, else training's; ("", {}) without any."""
    for prefix, pairs in ((HELD_OUT, "held-out"), ("", "training")):
        for log in reversed(history):
            names = {k.removeprefix(prefix): v for k, v in log.items() if k.startswith(prefix)}
            if any(name.startswith("pairs/") for name in names):
                return f"{pairs} pairs at step {log['step']}", names
    return "", {}


@dataclass(frozen=True)
class Moved:
    """By how many nats a pair the log-probs of both sides moved, chosen's from `was`, and a line that says so."""

    chosen: float
    rejected: float
    was: float
    line: str

    @property
    def fell(self) -> bool:
        """Whether chosen fell by more than FALL."""
        return self.chosen < -FALL * abs(self.was)


def moved(history: list[dict[str, Any]], beta: float) -> Moved | None:
    """From the first and the last evaluation; without two, from training's rewards, which are β · (log π − log π_ref)
    of the same pairs: their mean over the last tenth of the logs. None where neither is there."""
    logs = [log for log in evaluations(history) if math.isfinite(log["eval_logps/chosen"])]
    if logs and logs[0]["step"] != logs[-1]["step"]:
        first, last = logs[0], logs[-1]
        was, now = first["eval_logps/chosen"], last["eval_logps/chosen"]
        change, rejected = now - was, last["eval_logps/rejected"] - first["eval_logps/rejected"]
        where = f"held-out pairs, {was:.2f} at step {first['step']}, {now:.2f} at step {last['step']}"
        text = f"log-probs of the chosen side {_moved(change)} nats a pair ({where}); rejected {_moved(rejected)}"
    else:
        tails = [tail(history, f"rewards/{side}") for side in ("chosen", "rejected")]
        if not all(tails):
            return None
        change, rejected = (sum(values) / len(values) / beta for values in tails)
        was = curve(history, "logps/chosen").training[-1][1] - change
        n = len(tails[0])
        where = f"training pairs, mean of the last {n} logs" if n > 1 else "training pairs, the last log"
        text = f"log-probs of the chosen side less the reference's: {change:+.2f} nats ({where})"
        text += f", rejected {rejected:+.2f}"
    return Moved(change, rejected, was, f"{text}.")


def chosen_logps(history: list[dict[str, Any]], beta: float) -> tuple[str, bool]:
    """(one line on how far the chosen side's log-probs moved, whether they fell), of `moved`; ("", False) without."""
    found = moved(history, beta)
    return (found.line, found.fell) if found else ("", False)


def fall_of(history: list[dict[str, Any]], name: str, to_reference: str) -> tuple[float, str]:
    """(by how much the held-out metric `name` fell from its first to its last evaluation, where); without two of them,
    how far the training metric `to_reference` is below 0, the mean over the last tenth of its logs. (0, "") where
    neither is there."""
    points = curve(history, name).held_out
    if len(points) > 1:
        (first, before), (last, after) = points[0], points[-1]
        return before - after, f"held-out pairs, step {first} to {last}"
    values = tail(history, to_reference)
    return (-sum(values) / len(values), "training pairs, against the reference") if values else (0.0, "")


def tail(history: list[dict[str, Any]], name: str) -> list[float]:
    """The last tenth of what training logged of the metric `name`, one value at least where there is any."""
    points = curve(history, name).training
    return [value for _, value in points[-max(1, len(points) // 10) :]]


def _moved(change: float) -> str:
    return f"{'fell' if change < 0 else 'rose'} by {abs(change):.2f}"
