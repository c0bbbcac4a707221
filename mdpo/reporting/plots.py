"""Plots of a run: data first (`Plot`, `lines_of`), then a matplotlib figure, as PNG and as SVG for HTML pages.

Color tells what (chosen green, rejected orange, everything else blue), the stroke tells which pairs: training is
solid, over its raw values, held-out dashed with dots. All colors can be read on white and on black.
"""

import io
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mdpo.reporting.log_history import curve, latest_turns, smoothed
from mdpo.reporting.turn_tables import turn_tables

SIZE, DPI = (4.8, 3.0), 160  # inches, dots an inch
BLUE, GREEN, ORANGE = "#3b82d6", "#2a9d6f", "#d9730d"
TURNS = ("#3b82d6", "#d9730d", "#2a9d6f", "#b45bd0", "#c9433f", "#8a7a1f")  # curves of the first turns
INK, GRAY, LINE = "#1f2328", "#57606a", "#d0d7de"
OF_THE_PAGE = {INK: "var(--ink)", GRAY: "var(--gray)", LINE: "var(--line)"}
MOST_POINTS = 400  # of a curve: as many as a plot of this size has columns for
STYLE = {
    **{"font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left"},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "y"},
    **{"axes.edgecolor": GRAY, "axes.labelcolor": GRAY, "text.color": INK, "axes.titlecolor": INK, "grid.color": LINE},
    **{"xtick.color": GRAY, "ytick.color": GRAY, "axes.axisbelow": True, "legend.frameon": False},
    **{"svg.fonttype": "none", "svg.hashsalt": "mdpo", "legend.fontsize": 9, "axes.unicode_minus": True},
}


@dataclass(frozen=True)
class Plot:
    """One plot over steps: its file name, title, y axis with unit, and (label, metric, color) of its lines."""

    name: str
    title: str
    unit: str
    lines: tuple[tuple[str, str, str], ...]
    limits: tuple[float, float] | None = None


PLOTS = (
    Plot("loss", "Loss", "loss a pair", (("", "loss", BLUE),)),
    Plot(
        "reward_accuracy",
        "Reward accuracy",
        "share of pairs",
        (("", "rewards/accuracies", BLUE),),
        (-0.03, 1.03),
    ),
    Plot("margins", "Reward margin", "chosen − rejected (β · nats)", (("", "rewards/margins", BLUE),)),
    Plot(
        "rewards",
        "Rewards of both sides",
        "β · (log π − log π_ref)",
        (("chosen", "rewards/chosen", GREEN), ("rejected", "rewards/rejected", ORANGE)),
    ),
    Plot(
        "logps",
        "Log-probs of both sides",
        "log π of a side (nats)",
        (("chosen", "logps/chosen", GREEN), ("rejected", "logps/rejected", ORANGE)),
    ),
    Plot(
        "logps_per_token",
        "Log-probs by token",
        "log π of a token (nats)",
        (("chosen", "logps_per_token/chosen", GREEN), ("rejected", "logps_per_token/rejected", ORANGE)),
    ),
    Plot("stops", "Stop tokens of chosen turns", "log π of a stop (nats)", (("", "stop_logps/chosen", GREEN),)),
    Plot("grad_norm", "Gradient norm, before clipping", "L2 norm", (("", "grad_norm", BLUE),)),
    Plot("learning_rate", "Learning rate", "learning rate", (("", "learning_rate", BLUE),)),
    Plot("tokens_per_second", "Speed", "tokens/s, all processes", (("", "tokens_per_second", BLUE),)),
    Plot("memory", "Peak memory so far", "GB, main process", (("", "peak_memory_gb", BLUE),)),
)
NAMES = {*(plot.name for plot in PLOTS), "margins_by_turn", "margin_of_turns", "accuracy_by_turns"}
ONLY_AS_LOGGED = {"learning_rate", "peak_memory_gb"}  # not noisy: nothing to smooth


@dataclass
class Line:
    """A drawn line: (step, value) points, raw ones behind them where they were smoothed."""

    label: str
    color: str
    held_out: bool
    points: list[tuple[float, float]]
    raw: list[tuple[float, float]] = field(default_factory=list)


def lines_of(plot: Plot, history: list[dict[str, Any]]) -> list[Line]:
    """Training and held-out line of each metric that the history has."""
    lines = []
    for name, metric, color in plot.lines:
        logged = curve(history, metric)
        for held_out, points in ((False, logged.training), (True, logged.held_out)):
            if points:
                smooth = not held_out and metric not in ONLY_AS_LOGGED and len(points) >= 20
                label = f"{name} {'held-out' if held_out else 'training'}".strip()
                line, raw = (smoothed(points), thinned(points)) if smooth else (points, [])
                lines.append(Line(label, color, held_out, thinned(line), raw))
    return lines


def turn_lines(history: list[dict[str, Any]]) -> list[Line]:
    """Margins of the first turns over steps: of held-out pairs if they were evaluated twice, else of training pairs."""
    curves = [(k, color, curve(history, f"margins/turn_{k}")) for k, color in enumerate(TURNS, start=1)]
    held_out = any(len(margins.held_out) > 1 for _, _, margins in curves)
    drawn = [(k, color, margins.held_out if held_out else smoothed(margins.training)) for k, color, margins in curves]
    return [Line(f"turn {k}", color, held_out, thinned(points)) for k, color, points in drawn if points]


def thinned(points: list[tuple[int, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most `most` points, each the mean of as many neighbors as that takes."""
    each = -(-len(points) // most)
    groups = [points[i : i + each] for i in range(0, len(points), each)]
    return [tuple(sum(values) / len(values) for values in zip(*group, strict=True)) for group in groups]


def over_steps(title: str, unit: str, lines: list[Line], limits: tuple[float, float] | None = None) -> Figure:
    figure, axes = new_figure(title)
    for line in lines:
        if line.raw:
            axes.plot(*zip(*line.raw, strict=True), color=line.color, alpha=0.3, linewidth=0.8)
        dots = len(line.points) <= 40 if line.held_out else len(line.points) == 1
        axes.plot(
            *zip(*line.points, strict=True),
            color=line.color,
            linewidth=1.8,
            linestyle="--" if line.held_out else "-",
            marker="o" if dots else None,
            markersize=4,
            label=line.label,
        )
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    number_ticks(axes)
    if limits:
        axes.set_ylim(*limits)
    else:
        values = [value for line in lines for _, value in line.points + line.raw]
        room = (max(values) - min(values)) * (0.3 if len(lines) > 2 else 0.06) or 0.1 * abs(values[0]) or 1
        axes.set_ylim(0 if min(values) >= 0 else min(values) - 0.2 * room, max(values) + room)
    if len(lines) > 1 or lines[0].held_out:
        above = {"loc": "upper left", "ncols": 3 if len(lines) > 4 else 2} if len(lines) > 2 and not limits else {}
        axes.legend(**{"loc": "best", **above})
    return figure


def number_ticks(axes) -> None:
    """Each tick label is a complete number: a common factor would be printed over the title."""
    axes.yaxis.set_major_formatter(
        lambda v, _: (f"{v:,.0f}" if abs(v) >= 1000 else f"{v:.4g}").replace("e-0", "e-").replace("-", "−")
    )


def bars(title: str, xlabel: str, unit: str, table: list[dict], key: str, value: str) -> Figure:
    """One bar for each row of `table`: its number `key`, its height `value`, and its count of pairs."""
    figure, axes = new_figure(title)
    heights = [row[value] for row in table]
    drawn = axes.bar([str(row[key]) for row in table], heights, color=BLUE, width=0.6)
    numbers = [f"{row[value]:.2f}\n{row['pairs']:,.0f} pairs" for row in table]
    if len(table) <= 6:
        axes.bar_label(drawn, numbers, fontsize=9, padding=2, color=INK)
    axes.axhline(0, color=GRAY, linewidth=0.8)
    axes.margins(y=0.28)
    axes.set_xlim(-0.6, max(len(table), 4) - 0.4)
    if value == "accuracies":
        axes.set_ylim(0, 1.3)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.set_xlabel(xlabel)
    axes.set_ylabel(unit)
    return figure


def new_figure(title: str) -> tuple[Figure, Any]:
    """(figure, axes) of a plot's size, with its title."""
    figure = Figure(figsize=SIZE)
    figure.subplots_adjust(left=0.18, right=0.97, bottom=0.16, top=0.89)  # a layout engine would take half of the time
    axes = figure.add_subplot()
    axes.set_title(title)
    return figure, axes


def draw(history: list[dict[str, Any]]) -> Iterable[tuple[str, str, Figure]]:
    """(name, title, matplotlib figure) of every plot that the history has data for."""
    with matplotlib.rc_context(STYLE):
        for plot in PLOTS:
            if lines := lines_of(plot, history):
                yield plot.name, plot.title, over_steps(plot.title, plot.unit, lines, plot.limits)
        if lines := turn_lines(history):
            title = f"Margin by turn ({'held-out' if lines[0].held_out else 'training'} pairs)"
            yield "margins_by_turn", title, over_steps(title, "chosen − rejected (β · nats)", lines)
        which, names = latest_turns(history)
        tables = turn_tables(names)
        if table := tables["by_turn"]:
            title, unit = "Margin by turn", "chosen − rejected (β · nats)"
            yield "margin_of_turns", title, bars(title, f"turn; {which}", unit, table, "turn", "margins")
        if table := tables["by_number_of_turns"]:
            title, xlabel = "Accuracy by number of turns", f"turns of the chosen side; {which}"
            yield "accuracy_by_turns", title, bars(title, xlabel, "share of pairs", table, "turns", "accuracies")


def write_plots(folder: Path, history: list[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    """Draws every plot: `folder`/NAME.png, and name -> (title, SVG for an HTML page). Plots of an earlier run that
    this one has no data for are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {}
    for name, title, figure in draw(history):
        with matplotlib.rc_context(STYLE):
            figure.savefig(folder / f"{name}.png", dpi=DPI, facecolor="white")
            drawn[name] = (title, page_svg(figure, title))
    for name in NAMES - set(drawn):
        (folder / f"{name}.png").unlink(missing_ok=True)
    return drawn


def page_svg(figure: Figure, title: str) -> str:
    """The figure as an SVG element that takes ink, gray and line colors from the page, in light and dark mode."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # ids would repeat between the plots of one page
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups()
    svg = svg.replace(svg[: svg.index(">") + 1], f'<svg viewBox="0 0 {width} {height}" role="img">', 1)
    for color, variable in OF_THE_PAGE.items():
        svg = svg.replace(color, variable)
    return svg.replace(">", f"><title>{title}</title>", 1)
