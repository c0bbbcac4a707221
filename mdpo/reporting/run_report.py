"""The metrics of a finished run: run_report.json, and the table on the terminal."""

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mdpo.reporting.answer_lines import lines_of
from mdpo.reporting.environment import hardware, repository, versions
from mdpo.reporting.health import health_warnings
from mdpo.reporting.log_history import before_and_after, chosen_logps, curve, latest_turns
from mdpo.reporting.turn_tables import turn_tables

REPORT, RESOLVED = "run_report.json", "recipe_resolved.yaml"
OF_TRAINING = ("train", "steps", "train_seconds", "pairs_per_second", "peak_memory_gb")
# Rows of the table: label, metric.
SHOWN = (
    ("loss", "eval_loss"),
    ("reward accuracy", "eval_rewards/accuracies"),
    ("mean reward margin", "eval_rewards/margins"),
    ("log-probs chosen", "eval_logps/chosen"),
    ("log-probs rejected", "eval_logps/rejected"),
)


def write_report(folder: str | Path, metrics: dict, history: list[dict], data: dict, args) -> dict:
    """Writes `run_report.json` into the output folder and returns it: metrics, the evaluation before the first step if
    there was one, the first loss, metrics by turn, how far chosen log-probs moved, warnings of a policy that breaks,
    row accounting, versions, commit and machine."""
    metrics = {**metrics, **of_the_training(Path(folder, REPORT), metrics["steps"])}
    losses, (pairs, turns) = curve(history, "loss").training, latest_turns(history)
    line, fell = chosen_logps(history, args.beta)
    report = {
        **metrics,
        "before": before_and_after(history)[0],
        "first_loss": losses[0][1] if losses else None,
        "turns": {"of": pairs, **turn_tables(turns)},
        "chosen_logps": {"line": line, "fell": fell},
        "warnings": health_warnings(history, args.beta),
        "data": data,
        "versions": versions(),
        "repository": repository(),
        "machine": hardware(args.world_size),
    }
    Path(folder, REPORT).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return report


def of_the_training(path: Path, steps: int) -> dict:
    """What a start that trained nothing, as of a finished run, leaves as the report of the training has it."""
    if steps or not path.exists():
        return {}
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        return {key: earlier[key] for key in OF_TRAINING}
    except (ValueError, TypeError, KeyError):  # damaged, or of another program
        return {}


def show_result(report: dict) -> None:
    """The table at the end of a run: held-out metrics before and after, speed and memory."""
    console = Console(highlight=False)
    if answers := report.get("answers"):
        for line in lines_of(answers, min(console.width, 80)):
            console.print(line, soft_wrap=True, markup=False)
    before, after = report["before"], report["after"]
    if after:
        table = Table(title=f"held-out pairs: {int(after['eval_pairs'])}")
        shown = {name: metrics for name, metrics in (("before", before), ("after", after)) if metrics}
        table.add_column("")
        for name in shown:
            table.add_column(name, justify="right")
        for name, key in SHOWN:
            table.add_row(name, *(f"{metrics[key]:.4f}" for metrics in shown.values()))
        console.print(table)
    if report["first_loss"] is not None:
        console.print(f"first training loss {report['first_loss']:.4f}")
    console.print(speed_line(report))
    if line := report["chosen_logps"]["line"]:
        console.print(line, soft_wrap=True, markup=False)
    for line in report["warnings"]:
        console.print(f"warning: {line}", style="yellow", soft_wrap=True, markup=False)


def speed_line(report: dict) -> str:
    speed = f"{report['pairs_per_second']:.2f} pairs/s over {report['steps']} steps"
    memory = f"peak memory {report['peak_memory_gb']:.2f} GB a process"
    return f"{speed}, {report['train_seconds']:.0f} s of training, {memory}"
