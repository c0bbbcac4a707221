"""Plots of a loop by iteration, as SVG for its page: data first (`Series`, `Stack`), then matplotlib figures."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from mdpo.reporting.plots import BLUE, GRAY, GREEN, INK, ORANGE, STYLE, TURNS, new_figure, number_ticks, page_svg
from mdpo.reporting.token_view import VISIBLE

ENDED = {
    "done": GREEN,
    "cut": ORANGE,
    "too long": "#8a7a1f",
    "max turns": BLUE,
    "refused": GRAY,
    "environment error": "#c9433f",
}
MOST_KINDS, MOST_TICKS, MOST_LETTERS = len(TURNS), 12, 24


@dataclass(frozen=True)
class Series:
    """(iteration, value, low, high) points; low and high are the value where no interval is known."""

    label: str
    color: str
    points: list[tuple[int, float, float, float]]


@dataclass(frozen=True)
class Stack:
    """The part of one kind in the bar of each iteration."""

    label: str
    color: str
    values: dict[int, float]


def plain(label: str, color: str, values: dict[int, float | None]) -> Series:
    """Without intervals, and without iterations that have no value."""
    return Series(label, color, [(n, v, v, v) for n, v in values.items() if v is not None])


def over_iterations(title: str, unit: str, series: list[Series], shares: bool = False) -> Figure:
    """Lines with their intervals; the axis of `shares` goes from 0 to 1."""
    figure, axes = new_figure(title)
    for place, line in enumerate(series):
        n, value, low, high = (list(column) for column in zip(*line.points, strict=True))
        style = {"color": line.color, "linewidth": 1.8, "marker": "o", "markersize": 4, "label": line.label}
        if low == value == high:
            axes.plot(n, value, **style)
            continue
        aside = 0.04 * (place - (len(series) - 1) / 2)  # else intervals would hide each other
        below = [max(0.0, v - bound) for v, bound in zip(value, low, strict=True)]
        above = [max(0.0, bound - v) for v, bound in zip(value, high, strict=True)]
        axes.errorbar([x + aside for x in n], value, yerr=[below, above], elinewidth=1.2, capsize=3, **style)
    bounds = [bound for line in series for _, _, low, high in line.points for bound in (low, high)]
    bottom = 0.0 if min(bounds) >= 0 else min(bounds) - 0.1 * (max(bounds) - min(bounds))
    room = (max(bounds) - bottom) * (0.25 if len(series) > 1 else 0.1) or 1.0
    axes.set_ylim(bottom, max(bounds) + room)
    if shares:
        _share_axis(axes, legend=len(series) > 1)
    if len(series) > 1:
        axes.legend(loc="upper center", ncols=3)
    return _finished(figure, axes, unit, [n for line in series for n, *_ in line.points])


def stacked(
    title: str, unit: str, stacks: list[Stack], numbers: dict[int, str] | None = None, whole: bool = False
) -> Figure:
    """A bar for each iteration, its kinds upon each other; `numbers` stand above the bars. `whole` are shares of
    1 together."""
    figure, axes = new_figure(title)
    iterations = sorted({n for stack in stacks for n in stack.values})
    base = dict.fromkeys(iterations, 0.0)
    for stack in stacks:
        heights = [stack.values.get(n, 0.0) for n in iterations]
        axes.bar(iterations, heights, bottom=list(base.values()), color=stack.color, width=0.6, label=stack.label)
        base = {n: base[n] + height for n, height in zip(iterations, heights, strict=True)}
    for n, text in (numbers or {}).items():
        axes.annotate(text, (n, base[n]), (0, 2), textcoords="offset points", ha="center", fontsize=9, color=INK)
    axes.set_ylim(0, (max(base.values()) or 1) * 1.3)
    if whole:
        _share_axis(axes, legend=True)
    axes.legend(loc="upper center", ncols=3, columnspacing=1.0, handlelength=1.0)
    return _finished(figure, axes, unit, iterations)


def _share_axis(axes: Any, legend: bool) -> None:
    axes.set_ylim(-0.03 if axes.lines else 0, 1.3 if legend else 1.05)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])


def _finished(figure: Figure, axes: Any, unit: str, iterations: list[int]) -> Figure:
    axes.set_xlabel("iteration")
    axes.set_ylabel(unit)
    first, last = min(iterations), max(iterations)
    aside = 0.6 + max(0, 2 - (last - first)) / 2  # few bars are no wider than many
    axes.set_xlim(first - aside, last + aside)
    axes.set_xticks(sorted(set(iterations))[:: 1 + (last - first) // MOST_TICKS])
    number_ticks(axes)
    return figure


def draw_loop(facts: dict[str, Any], training: dict[int, dict[str, Any]]) -> dict[str, tuple[str, str]]:
    """name -> (title, SVG) of every plot that there is data for; `facts` are those of `loop_figures`."""
    drawn = {}
    with matplotlib.rc_context(STYLE):
        for name, title, figure in [*_held_out(facts["evaluations"]), *_pairs(facts["pairs"]), *_training(training)]:
            drawn[name] = (title, page_svg(figure, title))
    return drawn


def _held_out(found: dict[int, dict[str, Any]]) -> Iterable[tuple[str, str, Figure]]:
    if not found:
        return
    k = max(f["samples"] for f in found.values())
    lines = [("right", "pass@1", BLUE)] + [("any", f"pass@{k}", GREEN), ("all", f"pass^{k}", ORANGE)] * (k > 1)
    shares = [Series(label, color, [(n, *f["shares"][name]) for n, f in found.items()]) for name, label, color in lines]
    title = "Right answers, held-out tasks"
    yield "right", title, over_iterations(title, "share, 95 % interval", shares, shares=True)
    rewards = [(n, f["reward"], *(f["reward_interval"] or [f["reward"]] * 2)) for n, f in found.items()
               if f["reward"] is not None]  # fmt: skip
    if rewards:
        title = "Mean reward, held-out tasks"
        yield "reward", title, over_iterations(title, "reward, 95 % interval", [Series("", BLUE, rewards)])
    tokens = {n: f["tokens"] for n, f in found.items() if f["tokens"]}
    if tokens:
        of = [plain(f"a {name}", color, {n: t[name] for n, t in tokens.items()})
              for name, color in (("turn", BLUE), ("trajectory", ORANGE))]  # fmt: skip
        yield "tokens", "Sampled tokens", over_iterations("Sampled tokens", "tokens, mean", of)
    turns = plain("", BLUE, {n: f["turns"] for n, f in found.items()})
    yield "turns", "Turns", over_iterations("Turns", "turns of a trajectory, mean", [turns])
    ended = [Stack(end, color, {n: f["ended"].get(end, 0) / f["conversations"] for n, f in found.items()})
             for end, color in ENDED.items()]  # fmt: skip
    ended = [stack for stack in ended if any(stack.values.values())]
    if ended:
        title = "How trajectories ended"
        yield "ended", title, stacked(title, "share of trajectories", ended, whole=True)
    if failed := failed_calls(found):
        yield "calls", "Calls that failed", stacked("Calls that failed", "share of calls", failed)


def failed_calls(found: dict[int, dict[str, Any]]) -> list[Stack]:
    """Of all calls of an iteration, by kind; the rarest kinds together where there are many."""
    totals: dict[str, int] = {}
    for figures in found.values():
        for kind, count in figures["calls"].items():
            if kind != "ok":
                totals[kind] = totals.get(kind, 0) + count
    kinds = sorted(totals, key=lambda kind: (-totals[kind], kind))
    groups = [[kind] for kind in kinds]
    if len(kinds) > MOST_KINDS:
        groups = [*groups[: MOST_KINDS - 1], kinds[MOST_KINDS - 1 :]]
    stacks = []
    for group, color in zip(groups, TURNS, strict=False):
        shares = {n: sum(f["calls"].get(kind, 0) for kind in group) / (sum(f["calls"].values()) or 1)
                  for n, f in found.items()}  # fmt: skip
        label = _label(group[0]) if len(group) == 1 else f"{len(group)} other kinds"
        stacks.append(Stack(label, color, shares))
    return stacks


def _label(kind: str) -> str:
    """Of a legend: in letters that a font and an SVG have, no formula."""
    text = kind.encode("utf-8", "backslashreplace").decode("utf-8").translate(VISIBLE)
    return (text if len(text) <= MOST_LETTERS else text[: MOST_LETTERS - 1] + "…").replace("$", r"\$").lstrip("_")


def _pairs(reports: dict[int, dict[str, Any]]) -> Iterable[tuple[str, str, Figure]]:
    if reports:
        longer = Stack("chosen is longer", BLUE, {n: r["longer"] for n, r in reports.items()})
        rest = Stack("chosen is not", GRAY, {n: r["pairs"] - r["longer"] for n, r in reports.items()})
        numbers = {n: f"{r['pairs']:,}" for n, r in reports.items()}
        yield "pairs", "Pairs", stacked("Pairs", "pairs", [longer, rest], numbers)


def _training(found: dict[int, dict[str, Any]]) -> Iterable[tuple[str, str, Figure]]:
    plots = (
        ("accuracy", "Reward accuracy of training", "share of pairs", (("", "accuracy", BLUE),)),
        ("margin", "Reward margin of training", "chosen − rejected (β · nats)", (("", "margin", BLUE),)),
        ("ratio", "Policy against reference", "log π − log π_ref (nats a pair)",
         (("chosen", "chosen_ratio", GREEN), ("rejected", "rejected_ratio", ORANGE))),
    )  # fmt: skip
    for name, title, unit, lines in plots:
        series = [plain(label, color, {n: f[key] for n, f in found.items()}) for label, key, color in lines]
        if series := [line for line in series if line.points]:
            yield f"training_{name}", title, over_iterations(title, unit, series, shares=name == "accuracy")
