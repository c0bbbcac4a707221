"""Metrics by turn as tables."""

import re
from typing import Any

NAME = re.compile(r"(margins|accuracies|pairs)/(?:turn_(\d+)|(\d+)_turns)\Z")


def turn_tables(metrics: dict[str, Any], prefix: str = "") -> dict[str, list[dict[str, float]]]:
    """The metrics of one log as two tables: {"by_turn": [{"turn", "pairs", "margins"}, …],
    "by_number_of_turns": [{"turns", "pairs", "margins", "accuracies"}, …]}, in order."""
    tables: dict[str, dict[int, dict[str, float]]] = {"turn": {}, "turns": {}}
    for name, value in metrics.items():
        match = NAME.match(name.removeprefix(prefix)) if name.startswith(prefix) else None
        if match:
            column, number = ("turn", match[2]) if match[2] else ("turns", match[3])
            tables[column].setdefault(int(number), {column: int(number)})[match[1]] = value
    return {
        key: [tables[column][n] for n in sorted(tables[column])]
        for key, column in (("by_turn", "turn"), ("by_number_of_turns", "turns"))
    }
