"""What the page of a loop shows of each iteration's training, from the files that the run has left."""

import json
import math
from pathlib import Path
from typing import Any

from mdpo.config.parsing import FIELDS
from mdpo.reporting.html_page import PAGE
from mdpo.reporting.log_history import before_and_after, curve
from mdpo.reporting.run_report import REPORT

STATE = "trainer_state.json"
SHARE_AT_THE_END = 10  # training's metrics are means of the last tenth of its logs


def training_figures(folder: Path) -> dict[str, Any]:
    """{"of": which pairs and logs, "steps", "seconds", "pairs", "first_loss", "loss", "accuracy", "margin", "chosen"
    and "rejected" (log-probs), "chosen_ratio" and "rejected_ratio" (log π − log π_ref, nats a pair), "line",
    "warnings", "page": whether its report is there}. Metrics are those of the last evaluation, without one of the last
    logs of training; None where they are not there. Raises OSError, ValueError, KeyError or TypeError of damaged
    files."""
    report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    history = json.loads((folder / STATE).read_text(encoding="utf-8"))["log_history"]
    after = before_and_after(history)[1]
    beta = report["recipe"].get("beta", FIELDS["beta"].default)
    if after:
        of = f"{int(after['eval_pairs']):,} held-out pairs"
        found = {name: after.get(f"eval_{name}") for name in NAMES}
    else:
        of, found = "training pairs, last tenth of the logs", {name: _last(history, name) for name in NAMES}
    values = {NAMES[name]: value if value is None or math.isfinite(value) else None for name, value in found.items()}
    rewards = {side: values.pop(f"{side}_reward") for side in ("chosen", "rejected")}
    ratios = {
        f"{side}_ratio": reward / beta if reward is not None and beta else None for side, reward in rewards.items()
    }
    pairs = report["data"]["training"]["pairs"]
    facts = {"of": of, "steps": report["steps"], "seconds": report["train_seconds"], "pairs": pairs}
    said = {"line": report["chosen_logps"]["line"], "warnings": report["warnings"]}
    return {**facts, "first_loss": report["first_loss"], **values, **ratios, **said, "page": (folder / PAGE).is_file()}


NAMES = {
    "loss": "loss",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "logps/chosen": "chosen",
    "logps/rejected": "rejected",
    "rewards/chosen": "chosen_reward",
    "rewards/rejected": "rejected_reward",
}


def _last(history: list[dict[str, Any]], name: str) -> float | None:
    points = curve(history, name).training
    tail = [value for _, value in points[-max(1, len(points) // SHARE_AT_THE_END) :]]
    return sum(tail) / len(tail) if tail else None
