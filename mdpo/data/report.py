"""What a run is going to train on: rows read and dropped, lengths, what is supervised, and what looks wrong. For
the terminal and as data_report.json."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mdpo.data.sequence_counts import Reasons, arrow_lists, counts_by_row
from mdpo.data.tokenize import DropCounts
from mdpo.data.whole_columns import whole_numbers
from mdpo.errors import UserError
from mdpo.types import SIDES

DATA_REPORT = "data_report.json"
SUSPICIOUS = (0.3, 0.7)  # accuracy of "the longer side wins": outside of it length alone may be what is learned
LENGTHS = (0.5, 1, 2)  # of max_length, at which lost rows are counted
QUANTITIES = ("sequences", "turns", "tokens", "supervised", "context", "shared")


@dataclass
class DataReport:
    """`counts` is the row accounting of each dataset, `training` and `held_out` describe the pairs that are left of all
    datasets together, as `describe` does."""

    counts: dict[str, DropCounts]
    max_length: int | None
    training: dict[str, Any] = field(default_factory=dict)
    held_out: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    unused: dict[str, list[str]] = field(default_factory=dict)  # columns that nothing reads, of each dataset

    def costs(self) -> dict[int, int]:
        """max_length at several sizes -> rows whose longer side is over it, dropped ones included."""
        if self.max_length is None:
            return {}
        longest = np.concatenate([c.longest for c in self.counts.values()] or [np.zeros(0)])
        return {int(self.max_length * x): int((longest > int(self.max_length * x)).sum()) for x in LENGTHS}

    def warnings(self) -> list[str]:
        lines = list(self.notes)
        accuracy = self.training.get("longer_wins")
        if accuracy is not None and not SUSPICIOUS[0] <= accuracy <= SUSPICIOUS[1]:
            which = "longer" if accuracy > 0.5 else "shorter"
            # R-DPO's penalty is against length: where shorter sides win it would widen the shortcut.
            ways = "length_penalty or " * (which == "longer") + "a length-normalized loss (ipo, sigmoid_norm)"
            lines.append(
                f"the side that the policy wrote more on wins in {accuracy:.0%} of the pairs: preferring the {which} "
                f"side is a shortcut. Balance lengths, or use {ways}."
            )
        return lines

    def refuse_bad_rows(self, on_bad_rows: str, max_bad_fraction: float) -> None:
        """Raises UserError where a dataset lost more rows than the recipe allows."""
        for c in (c for c in self.counts.values() if c.dropped):
            reasons = "\n".join(c.lines())
            if on_bad_rows == "error":
                raise UserError(f"on_bad_rows: error, and there are bad rows.\n{reasons}")
            if c.dropped > max_bad_fraction * c.read:
                raise UserError(
                    f"max_bad_fraction: {c.dropped} of {c.read} rows are dropped ({c.dropped / c.read:.0%}), more than "
                    f"{max_bad_fraction:.0%}.\n{reasons}\nFix the data, or raise max_bad_fraction in the recipe."
                )

    def as_dict(self) -> dict[str, Any]:
        costs = {str(length): rows for length, rows in self.costs().items()}
        return {
            "sets": {name: counts.as_dict() for name, counts in self.counts.items()},
            "training": self.training,
            "held_out": self.held_out,
            "rows_over_max_length": costs,
            "columns_not_used": self.unused,
            "warnings": self.warnings(),
        }

    def write(self, folder: str | Path) -> Path:
        path = Path(folder, DATA_REPORT)
        path.write_text(json.dumps(self.as_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return path

    def show(self) -> None:
        console = Console(highlight=False)
        console.print(_rows_table(self.counts))
        for counts in self.counts.values():
            if len(lines := counts.lines()) > 1:
                console.print("\n".join(lines), soft_wrap=True, markup=False)
        for columns, names in _by_value(self.unused).items():
            console.print(f"columns not used: {columns} (of {names})", soft_wrap=True, markup=False)
        for name, summary in (("training", self.training), ("held-out", self.held_out)):
            if summary:
                console.print(_lengths_table(name, summary))
        if self.training:
            console.print(_sentences(self.training, self.costs()), soft_wrap=True)
        for line in self.warnings():
            console.print(f"warning: {line}", style="yellow", markup=False, soft_wrap=True)


def _by_value(unused: dict[str, list[str]]) -> dict[str, str]:
    """columns -> the datasets that have them."""
    by_columns: dict[str, list[str]] = {}
    for name, columns in unused.items():
        by_columns.setdefault(", ".join(columns), []).append(name)
    return {
        columns: "all datasets" if len(names) == len(unused) > 1 else ", ".join(names)
        for columns, names in by_columns.items()
    }


def _rows_table(counts: dict[str, DropCounts]) -> Table:
    table = Table(title="rows")
    table.add_column("set", overflow="fold")
    for column in ("read", "kept", "dropped"):
        table.add_column(column, justify="right")
    for c in counts.values():
        table.add_row(
            Text(c.name), f"{c.read:,}", f"{c.kept:,}", f"{c.dropped:,}", style="" if c.kept == c.read else "yellow"
        )
    return table


def _lengths_table(name: str, summary: dict[str, Any]) -> Table:
    table = Table(title=f"{summary['pairs']:,} {name} pairs")
    table.add_column("a side")
    for side in SIDES:
        for stat in ("mean", "p50", "p95", "max"):
            table.add_column(f"{side}\n{stat}" if stat == "mean" else f"\n{stat}", justify="right")
    for quantity, label in quantities(summary).items():
        cells = [summary[quantity][side][stat] for side in SIDES for stat in ("mean", "p50", "p95", "max")]
        table.add_row(label, *(f"{cell:.1f}" if i % 4 == 0 else f"{cell:.0f}" for i, cell in enumerate(cells)))
    return table


def quantities(summary: dict[str, Any]) -> dict[str, str]:
    """Those of QUANTITIES that a table shows, and their names there. Where a side has several sequences, so are they;
    the shared tokens are then more than those that both sides begin with, and may be more than a side has."""
    if summary["several_sequences"]["sides"]:
        return {name: name if name != "shared" else "shared, of both" for name in QUANTITIES}
    return {name: name for name in QUANTITIES[1:]}


def sequence_lines(summary: dict[str, Any]) -> list[str]:
    """What the sequences of the sides share, and where a side has several, why."""
    tokens, distinct, several = summary["all_tokens"], summary["distinct_tokens"], summary["several_sequences"]
    lines = [f"{tokens:,} tokens in all sequences, {distinct:,} distinct: {distinct / tokens:.2f}"]
    if several["sides"]:
        lines.append(f"{several['sides']:,} of {2 * summary['pairs']:,} sides have more than one sequence")
    for reason, found in sorted(several["reasons"].items(), key=lambda item: -item[1]["sequences"]):
        lines.append(f"{found['sequences']:,} sequences of {found['sides']:,} sides begin anew: {reason}")
    return lines


def _sentences(summary: dict[str, Any], costs: dict[int, int]) -> str:
    lines = [
        f"{summary['share_supervised']:.0%} of the tokens are supervised; in supervised tokens the chosen side is "
        f"the longer one in {summary['longer_is_chosen']:.0%} of the pairs, and “the longer side wins” is right in "
        f"{summary['longer_wins']:.0%} (ties one half)",
        *sequence_lines(summary),
    ]
    if costs:
        lines.append(
            "rows over max_length: " + ", ".join(f"{rows:,} over {length:,}" for length, rows in costs.items())
        )
    return "\n".join(lines)


def describe(rows: Dataset) -> dict[str, Any]:
    """Of a tokenized dataset: pairs; for QUANTITIES on each side mean, p50, p95 and max (sequences, turns of the
    policy, and tokens of all sequences; `shared` is of the pair: its tokens less the distinct ones); the share that is
    supervised; how often the chosen side is longer in supervised tokens, and `longer_wins`, the accuracy of
    preferring the longer side, ties counting one half; `all_tokens`, `distinct_tokens`, and `several_sequences`: how
    many sides have more than one, and of each reason how many sequences of how many sides begin for it."""
    arrays = {name: np.zeros((len(rows), 2), np.int64) for name in ("turns", "tokens", "supervised", "sequences")}
    columns = [f"{side}_{field}" for side in SIDES for field in ("mask", "lengths", "breaks")]
    read = rows.select_columns([column for column in columns if column in rows.column_names])
    begin, reasons = 0, Reasons()
    for table in read.with_format("arrow").iter(batch_size=1000):
        for i, side in enumerate(SIDES):
            lengths, breaks = (arrow_lists(table, f"{side}_{field}") for field in ("lengths", "breaks"))
            counted = counts_by_row(arrow_lists(table, f"{side}_mask"), lengths)
            for quantity, values in zip(arrays, counted, strict=True):
                arrays[quantity][begin : begin + len(table), i] = values
            reasons.add(counted[-1], breaks)
        begin += len(table)
    tokens, supervised = arrays["tokens"], arrays["supervised"]
    distinct = whole_numbers(rows, "distinct")
    shared = tokens.sum(1) - distinct
    arrays |= {"context": tokens - supervised, "shared": np.stack([shared, shared], 1)}
    difference = supervised[:, 0] - supervised[:, 1]
    return {
        "pairs": len(rows),
        **{name: {side: _summary(arrays[name][:, i]) for i, side in enumerate(SIDES)} for name in QUANTITIES},
        "share_supervised": float(supervised.sum() / tokens.sum()),
        "longer_is_chosen": float((difference > 0).mean()),
        "longer_wins": float((difference > 0).mean() + (difference == 0).mean() / 2),
        "all_tokens": int(tokens.sum()),
        "distinct_tokens": int(distinct.sum()),
        "several_sequences": reasons.as_dict(),
    }


def _summary(values: np.ndarray) -> dict[str, float]:
    p50, p95 = np.percentile(values, [50, 95])
    return {"mean": float(values.mean()), "p50": float(p50), "p95": float(p95), "max": int(values.max())}
