"""The tables on the page of a loop: rows of (label, one cell for each iteration)."""

from typing import Any

from markupsafe import Markup

Row = tuple[str, list[str | Markup]]
NONE = "–"


def trajectory_rows(found: dict[int, dict[str, Any]]) -> list[Row]:
    """Of the figures of each iteration's trajectories."""
    if not found:
        return []
    all_figures, k = list(found.values()), max(f["samples"] for f in found.values())
    rows: list[Row] = [("right answers (pass@1)", [_share(f["shares"]["right"]) for f in all_figures])]
    if k > 1:
        rows.append((f"tasks with a right one (pass@{k})", [_share(f["shares"]["any"]) for f in all_figures]))
        rows.append((f"tasks with no wrong one (pass^{k})", [_share(f["shares"]["all"]) for f in all_figures]))
    rows.append(("mean reward", [_reward(f) for f in all_figures]))
    rows.append(("tasks", [_count(f["tasks"]) for f in all_figures]))
    rows.append(("trajectories", [_count(f["conversations"]) for f in all_figures]))
    rows.append(("turns, mean", [f"{f['turns']:.2f}" for f in all_figures]))
    for name, label in (("turn", "a turn, mean"), ("trajectory", "a trajectory, mean"), ("longest", "longest")):
        form = "{:,.0f}" if name == "longest" else "{:,.1f}"
        cells = [form.format(f["tokens"][name]) if f["tokens"] else NONE for f in all_figures]
        rows.append((f"sampled tokens, {label}", cells))
    rows.append(("calls", [_count(sum(f["calls"].values())) for f in all_figures]))
    for kind in sorted({kind for f in all_figures for kind in f["calls"]} - {"ok"}):
        rows.append((f"calls: {kind}", [_part(f["calls"].get(kind, 0), sum(f["calls"].values())) for f in all_figures]))
    for end in dict.fromkeys(end for f in all_figures for end in f["ended"]):
        if any(f["ended"].get(end) for f in all_figures):
            rows.append((f"ended: {end}", [_part(f["ended"].get(end, 0), f["conversations"]) for f in all_figures]))
    if any(f["without_reward"] for f in all_figures):
        rows.append(("without a reward", [_count(f["without_reward"]) for f in all_figures]))
    return rows


def pair_rows(found: dict[int, dict[str, Any]]) -> list[Row]:
    """Of what scripts/pair_rollouts.py reports."""
    if not found:
        return []
    reports = list(found.values())
    rows: list[Row] = [("paired by", [str(r["pairs_by"]) for r in reports])]
    rows.append(("trajectories", [_count(r["trajectories"]) for r in reports]))
    for why in sorted({why for r in reports for why in r["left_out"]}):
        rows.append((f"left out: {why}", [_part(r["left_out"].get(why, 0), r["trajectories"]) for r in reports]))
    rows.append(("tasks", [_count(r["tasks"]) for r in reports]))
    rows.append(("tasks with a pair", [_part(r["paired"], r["tasks"]) for r in reports]))
    for why in sorted({why for r in reports for why in r["unpaired"]}):
        rows.append((f"without a pair: {why}", [_part(r["unpaired"].get(why, 0), r["tasks"]) for r in reports]))
    rows.append(("pairs", [_count(r["pairs"]) for r in reports]))
    rows.append(("the chosen side is longer", [_part(r["longer"], r["pairs"]) for r in reports]))
    return rows


def training_rows(found: dict[int, dict[str, Any]], links: dict[int, Markup], reference: str) -> list[Row]:
    """Of `training_figures`, with a link to each report; `reference` is the loop's key."""
    if not found:
        return []
    runs = list(found.values())
    rows: list[Row] = [("pairs", [_count(r["pairs"]) for r in runs]), ("steps", [_count(r["steps"]) for r in runs])]
    rows.append(("minutes", [f"{r['seconds'] / 60:.1f}" for r in runs]))
    rows.append(("reference", [_reference(n, reference) for n in found]))
    rows.append(("metrics of", [r["of"] for r in runs]))
    labels = {
        "first_loss": "first loss",
        "loss": "loss",
        "accuracy": "reward accuracy",
        "margin": "mean reward margin",
        "chosen": "log-probs chosen",
        "rejected": "log-probs rejected",
        "chosen_ratio": "log π − log π_ref, chosen (nats a pair)",
        "rejected_ratio": "log π − log π_ref, rejected (nats a pair)",
    }
    for name, label in labels.items():
        if any(r[name] is not None for r in runs):
            rows.append((label, [NONE if r[name] is None else f"{r[name]:.4f}" for r in runs]))
    rows.append(("report", [links.get(n, NONE) for n in found]))
    return rows


def _reference(n: int, reference: str) -> str:
    if n == 1 or reference == "first":
        return "the first policy"
    return f"the policy of iteration {n - 1}"


def _share(interval: tuple[float, float, float]) -> str:
    share, low, high = interval
    return f"{share:.4f} ({low:.3f} to {high:.3f})"


def _reward(figures: dict[str, Any]) -> str:
    if figures["reward"] is None:
        return NONE
    if figures["reward_interval"] is None:
        return f"{figures['reward']:.4f}"
    low, high = figures["reward_interval"]
    return f"{figures['reward']:.4f} ({low:.3f} to {high:.3f})"


def _count(number: int) -> str:
    return f"{number:,}"


def _part(number: int, of: int) -> str:
    return f"{number:,} ({100 * number / of:.0f} %)" if of and number else f"{number:,}"
