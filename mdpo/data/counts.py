"""Row accounting of a dataset while it is tokenized, for the terminal and for reports."""

import functools
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

SPECIAL, CUT, LOWER = "special tokens inside user or tool text", "a turn cut in its middle", "a margin below 0"
LISTS = ("unread", "retokenized", "remarks")  # columns of what there is to say of a row
FIRST_KEYS, MOST_REASONS = 5, 20  # keys of each reason in reports, reasons on the terminal


@dataclass
class DropCounts:
    """Row accounting of one dataset: `reasons` maps a drop reason to the keys of its rows, `kept_with` a remark to the
    keys of kept rows, `unread` a field of messages that nothing reads to the number of rows that have it. `retokenized`
    has the tokens that differ of each recorded side whose messages are rendered otherwise. `longest` are the tokens of
    the longer side of every row that was tokenized."""

    name: str
    read: int = 0
    kept: int = 0
    streamed: bool = False  # counted while the dataset is read, one epoch after another
    reasons: dict[str, list[str]] = field(default_factory=dict)
    kept_with: dict[str, list[str]] = field(default_factory=dict)
    unread: Counter = field(default_factory=Counter)
    retokenized: list[int] = field(default_factory=list)
    longest: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def add(self, row: dict[str, Any]) -> None:
        """Counts a row as FEATURES has it."""
        self.read += 1
        self.unread.update(row["unread"])
        self.retokenized += row["retokenized"]
        if row["drop_reason"]:
            self.reasons.setdefault(row["drop_reason"], []).append(row["key"])
            return
        self.kept += 1
        margin = row["margin"]
        remarks = {SPECIAL: row["special_in_context"], CUT: row["cut"], LOWER: margin is not None and margin < 0}
        for remark in [*(name for name, true in remarks.items() if true), *row["remarks"]]:
            self.kept_with.setdefault(remark, []).append(row["key"])

    def add_table(self, table: pa.Table) -> None:
        """As `add` for every row of an Arrow table; only those of which there is more to say than that they are kept
        become Python objects."""
        lists = [pc.greater(pc.list_value_length(table.column(name)), 0) for name in LISTS]
        plain = pc.equal(table.column("drop_reason"), "")
        said = [*lists, pc.invert(plain), table.column("cut"), pc.not_equal(table.column("special_in_context"), 0)]
        said.append(pc.fill_null(pc.less(table.column("margin"), 0), False))
        noted = table.filter(pc.fill_null(functools.reduce(pc.or_kleene, said), True))
        self.read += len(table) - len(noted)
        self.kept += len(table) - len(noted)
        for row in noted.to_pylist():
            self.add(row)

    def drop(self, keys: list[str], reason: str) -> None:
        """Drops rows that were counted as kept."""
        self.kept -= len(keys)
        self.reasons.setdefault(reason, []).extend(keys)
        gone = set(keys)
        self.kept_with = {
            remark: [key for key in remarked if key not in gone] for remark, remarked in self.kept_with.items()
        }

    @property
    def dropped(self) -> int:
        return self.read - self.kept

    def lines(self) -> list[str]:
        """For the terminal: a line for the dataset, and one for each reason and remark with its first keys."""
        lines = [f"{self.name}: {self.read} rows read, {self.kept} kept, {self.dropped} dropped"]
        by_rows = sorted(self.reasons.items(), key=lambda item: -len(item[1]))
        lines += [f"  dropped {len(keys)}: {reason} {_some(keys)}" for reason, keys in by_rows[:MOST_REASONS]]
        if others := by_rows[MOST_REASONS:]:
            lines.append(f"  dropped {sum(len(keys) for _, keys in others)}: {len(others)} further reasons")
        lines += [f"  kept {len(keys)} with {remark} {_some(keys)}" for remark, keys in self.kept_with.items() if keys]
        if self.retokenized:
            lines.append(f"  re-tokenized otherwise: {sum(self.retokenized)} tokens of {len(self.retokenized)} sides")
        if self.unread:
            lines.append("  message fields not used: " + ", ".join(f"{k} ({n} rows)" for k, n in self.unread.items()))
        return lines

    def as_dict(self) -> dict[str, Any]:
        """For reports, the first keys only."""
        both = {"dropped": self.reasons, "kept_with": self.kept_with}
        out = {
            kind: {name: {"rows": len(keys), "first": keys[:FIRST_KEYS]} for name, keys in keys_by_name.items()}
            for kind, keys_by_name in both.items()
        }
        if self.retokenized:
            out["retokenized"] = {"sides": len(self.retokenized), "tokens": sum(self.retokenized)}
        return {"read": self.read, "kept": self.kept, **out, "message_fields_not_used": dict(self.unread)}


def _some(keys: list[str]) -> str:
    return f"({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})"
