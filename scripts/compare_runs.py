"""Compares runs, as an HTML page and in the terminal: python scripts/compare_runs.py RUN RUN [--out compare.html]

Each RUN is an output folder of run_dpo.py, also of an unfinished run that has a checkpoint. Shows plots of loss,
accuracy, margin and log-probs, final metrics, and the recipe keys in which the runs differ.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _clone  # noqa: F401
import matplotlib
import yaml
from markupsafe import Markup
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from mdpo.config.parsing import Loader
from mdpo.console import say
from mdpo.errors import UserError
from mdpo.reporting.html_page import template
from mdpo.reporting.log_history import before_and_after, curve, smoothed
from mdpo.reporting.plots import PLOTS, STYLE, Line, over_steps, page_svg, thinned
from mdpo.reporting.run_report import REPORT, RESOLVED, SHOWN
from mdpo.runs.entrypoint import run

COLORS = ("#3b82d6", "#d9730d", "#2a9d6f", "#b45bd0", "#c9433f", "#8a7a1f", "#6b7a86", "#e06fa8")
STATE = "trainer_state.json"
RUN_KEYS = {"output_dir", "overwrite_output_dir", "resume_from_checkpoint", "run_name"}  # no effect on training
CURVES = ("loss", "reward_accuracy", "margins", "logps")  # of PLOTS


@dataclass
class Run:
    name: str
    history: list[dict[str, Any]]
    recipe: dict[str, Any]
    report: dict[str, Any]  # {} until the run has finished


def main(argv: list[str]) -> None:
    folders, out = parse(argv)
    runs = load(folders)
    tables = [("Final metrics", final_metrics(runs)), ("Recipe keys that differ", differing(runs))]
    for title, rows in tables:
        Console().print(terminal_table(title, [r.name for r in runs], rows))
    out.write_text(html(runs, tables), encoding="utf-8")
    say(str(out))


def parse(argv: list[str]) -> tuple[list[Path], Path]:
    parser = argparse.ArgumentParser(usage=__doc__, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--out", type=Path, default=Path("compare.html"))
    try:
        args, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error
    if unknown:
        raise UserError(f"{unknown[0]} is not an option; compare_runs.py takes output folders and --out.")
    if not 2 <= len(args.runs) <= len(COLORS):
        raise UserError(f"{len(args.runs)} runs given; name 2 to {len(COLORS)} output folders of run_dpo.py.")
    if not args.out.absolute().parent.is_dir():
        raise UserError(f"--out: there is no folder {args.out.absolute().parent}.")
    if args.out.is_dir():
        raise UserError(f"--out: {args.out} is a folder; name a file in it.")
    return args.runs, args.out


def load(folders: list[Path]) -> list[Run]:
    """Raises UserError that names a folder without a run, and the missing files."""
    states = [_state(folder) for folder in folders]
    for folder, state in zip(folders, states, strict=True):
        if lacking := [RESOLVED] * (not (folder / RESOLVED).is_file()) + [STATE] * (state is None):
            raise UserError(f"{folder} contains no run: no {' and no '.join(lacking)}.")
    basenames = [folder.resolve().name for folder in folders]
    names = [
        str(folder) if basenames.count(name) > 1 else name for name, folder in zip(basenames, folders, strict=True)
    ]
    return [
        Run(name, _parsed(state)["log_history"], _parsed(folder / RESOLVED), _parsed(folder / REPORT))
        for name, folder, state in zip(names, folders, states, strict=True)
    ]


def _parsed(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8") if path.is_file() else "{}"
    try:
        return json.loads(text) if path.suffix == ".json" else yaml.load(text, Loader)
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _state(folder: Path) -> Path | None:
    """The run's trainer state, or that of its last checkpoint."""
    state_at = {int(p.parent.name.rpartition("-")[2]): p for p in folder.glob(f"checkpoint-*[0-9]/{STATE}")}
    return folder / STATE if (folder / STATE).is_file() else state_at.get(max(state_at, default=None))


def differing(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """(key, its value in each run) of the keys whose values are not the same in all."""
    recipes = [r.recipe for r in runs]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe if key not in RUN_KEYS)
    rows = [(key, [json.dumps(recipe[key]) if key in recipe else "(default)" for recipe in recipes]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def final_metrics(runs: list[Run]) -> list[tuple[str, list[str]]]:
    after = [before_and_after(r.history)[1] for r in runs]
    rows = [(label, [f"{log[key]:.4f}" if key in log else "–" for log in after]) for label, key in SHOWN]
    loss = [curve(r.history, "loss").training for r in runs]
    rows.append(("last training loss", [f"{points[-1][1]:.4f}" if points else "–" for points in loss]))
    rows.append(("steps", [str(r.history[-1]["step"]) if r.history else "0" for r in runs]))
    for label, key in (("pairs/s", "pairs_per_second"), ("peak memory (GB)", "peak_memory_gb")):
        rows.append((label, [f"{r.report[key]:.2f}" if r.report else "–" for r in runs]))
    return rows


def terminal_table(title: str, names: list[str], rows: list[tuple[str, list[str]]]) -> Table:
    table = Table("", *map(escape, names), title=title)
    for label, values in rows or [("none", [])]:
        table.add_row(label, *map(Text, values))
    return table


def plots(runs: list[Run]):
    """(title, plot, lines) for each metric of CURVES: a color for each run, training solid, held-out dashed."""
    for plot in (plot for plot in PLOTS if plot.name in CURVES):
        for name, metric, _ in plot.lines:
            lines = []
            for r, color in zip(runs, COLORS, strict=False):
                logged = curve(r.history, metric)
                label = r.name  # once in the legend: matplotlib leaves out what begins with an underscore
                for held_out, points in ((False, smoothed(logged.training)), (True, logged.held_out)):
                    if points:
                        lines.append(Line(label, color, held_out, thinned(points)))
                        label = "_"
            if lines:
                yield f"{plot.title}: {name}" if name else plot.title, plot, lines


def html(runs: list[Run], tables) -> str:
    with matplotlib.rc_context(STYLE):
        svgs = [Markup(page_svg(over_steps(t, p.unit, lines, p.limits), t)) for t, p, lines in plots(runs)]
    names = list(zip((r.name for r in runs), COLORS, strict=False))
    return template("compare.html").render(runs=names, tables=tables, plots=svgs)


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
