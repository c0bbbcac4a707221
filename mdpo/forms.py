"""Rows in the forms that are documented in public → rows with `prompt`, `chosen` and `rejected`."""

from typing import Any

from mdpo.messages import conversation

TEXTS = ("prompt", "conversations", "chosen", "rejected")


def as_preference(row: dict[str, Any]) -> dict[str, Any]:
    """The row in the columns that `mdpo.data` reads. Raises DropPair."""
    return {name: conversation(value) if name in TEXTS else value for name, value in row.items()}
