"""Draw docs/healthy_runs.png: python -m scripts.dev.healthy_runs HEALTHY BROKEN [OUT]

The curves of two runs of one recipe, given as their output folders: margin, chosen log-probs by token and of stops,
both against the reference. Where both have trajectories of checkpoints in answers/STEP (scripts/sample.py --save), the
share of right ones is drawn beside them, with 95 % intervals. Written to OUT, by default the page's figure.
"""

import json
import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from mdpo.console import say
from mdpo.errors import UserError
from mdpo.reporting.log_history import curve
from mdpo.reporting.plots import BLUE, DPI, GRAY, ORANGE, STYLE
from mdpo.rollouts.iterations import TRAJECTORIES
from mdpo.rollouts.stage_figures import stage_figures
from mdpo.rollouts.tables import wilson
from mdpo.runs.entrypoint import run

PICTURE = Path(__file__).resolve().parents[2] / "docs/healthy_runs.png"
PANELS = (  # metric, title, unit
    ("rewards/margins", "Reward margin", "chosen − rejected (β · nats)"),
    ("log_ratios_per_token/chosen", "Chosen tokens", "log π − log π_ref (nats a token)"),
    ("stop_log_ratios/chosen", "Stops of chosen turns", "log π − log π_ref (nats a turn)"),
)
RUNS = (("healthy", BLUE), ("broken", ORANGE))


def main(argv: list[str]) -> None:
    if {"-h", "--help"} & set(argv):
        return say(str(__doc__).strip())
    if len(argv) not in (2, 3):
        raise UserError("healthy_runs: needs the folder of a healthy run and of a broken one.")
    folders = [Path(folder) for folder in argv[:2]]
    histories, answers = [_history(folder) for folder in folders], [_answers(folder) for folder in folders]
    if bool(answers[0]) != bool(answers[1]):
        without = folders[bool(answers[0])]
        raise UserError(f"healthy_runs: {without} has no answers/STEP/{TRAJECTORIES}, and the other run has.")
    with matplotlib.rc_context(STYLE):
        _drawn(histories, answers).savefig(Path(argv[2]) if argv[2:] else PICTURE, dpi=DPI, facecolor="white")


def _history(folder: Path) -> list[dict]:
    path = folder / "trainer_state.json"
    if not path.is_file():
        raise UserError(f"healthy_runs: {path} is not there: give the output folder of a finished run.")
    history = json.loads(path.read_text(encoding="utf-8"))["log_history"]
    if missing := [metric for metric, *_ in PANELS if not curve(history, metric).training]:
        raise UserError(f"healthy_runs: {path} has no {missing[0]}: give the folder of a run of run_dpo.py.")
    return history


def _answers(folder: Path) -> list[tuple[int, float, int]]:
    """(step, share of right trajectories, trajectories), by step."""
    found = []
    for path in folder.glob(f"answers/*/{TRAJECTORIES}"):
        if not path.parent.name.isdecimal():
            raise UserError(f"healthy_runs: {path.parent}: a step is a number.")
        figures = stage_figures(path).figures
        found.append((int(path.parent.name), figures["accuracy"], figures["tasks"]))
    return sorted(found)


def _drawn(histories: list[list[dict]], answers: list[list[tuple[int, float, int]]]) -> Figure:
    count = len(PANELS) + bool(answers[0])
    figure = Figure(figsize=(3.5 * count, 3.2), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12)
    panels = figure.subplots(1, count)
    for axes, (metric, title, unit) in zip(panels, PANELS, strict=False):
        for history, (label, color) in zip(histories, RUNS, strict=True):
            axes.plot(*zip(*curve(history, metric).training, strict=True), color=color, label=label, linewidth=1.8)
        axes.axhline(0, color=GRAY, linewidth=0.8)
        axes.set(title=title, xlabel="step")
        axes.set_ylabel(unit, fontsize=9)
    panels[0].legend(loc="upper left")
    if answers[0]:
        for points, (label, color) in zip(answers, RUNS, strict=True):
            bounds = [wilson(share, n) for _, share, n in points]
            low, high = (
                [abs(share - b[end]) for (_, share, _), b in zip(points, bounds, strict=True)] for end in (0, 1)
            )
            steps, shares, _ = zip(*points, strict=True)
            panels[-1].errorbar(
                steps, shares, [low, high], color=color, label=label, linewidth=1.8, marker="o", capsize=3
            )
        panels[-1].set(title="Right answers", xlabel="step", ylim=(0, 1))
        panels[-1].set_ylabel("share of questions, greedy", fontsize=9)
    return figure


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
