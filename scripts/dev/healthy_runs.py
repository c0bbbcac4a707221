"""Draw docs/healthy_runs.png: python -m scripts.dev.healthy_runs HEALTHY BROKEN [OUT]

The curves of two runs of one recipe, given as their output folders: margin, chosen log-probs by token and of stops,
both against the reference. Written to OUT, by default the page's figure.
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
from mdpo.runs.entrypoint import run

PICTURE = Path(__file__).resolve().parents[2] / "docs/healthy_runs.png"
PANELS = (  # metric, title, unit
    ("rewards/margins", "Reward margin", "chosen − rejected (β · nats)"),
    ("log_ratios_per_token/chosen", "Chosen tokens", "log π − log π_ref (nats a token)"),
    ("stop_log_ratios/chosen", "Stops of chosen turns", "log π − log π_ref (nats a turn)"),
)


def main(argv: list[str]) -> None:
    if {"-h", "--help"} & set(argv):
        return say(str(__doc__).strip())
    if len(argv) not in (2, 3):
        raise UserError("healthy_runs: needs the folder of a healthy run and of a broken one.")
    histories = [_history(Path(folder)) for folder in argv[:2]]
    with matplotlib.rc_context(STYLE):
        _drawn(histories).savefig(Path(argv[2]) if argv[2:] else PICTURE, dpi=DPI, facecolor="white")


def _history(folder: Path) -> list[dict]:
    path = folder / "trainer_state.json"
    if not path.is_file():
        raise UserError(f"healthy_runs: {path} is not there: give the output folder of a finished run.")
    return json.loads(path.read_text(encoding="utf-8"))["log_history"]


def _drawn(histories: list[list[dict]]) -> Figure:
    figure = Figure(figsize=(10.5, 3.2), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12)
    for axes, (metric, title, unit) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        for history, label, color in zip(histories, ("healthy", "broken"), (BLUE, ORANGE), strict=True):
            axes.plot(*zip(*curve(history, metric).training, strict=True), color=color, label=label, linewidth=1.8)
        axes.axhline(0, color=GRAY, linewidth=0.8)
        axes.set(title=title, xlabel="step")
        axes.set_ylabel(unit, fontsize=9)
    figure.axes[0].legend(loc="upper left")
    return figure


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
