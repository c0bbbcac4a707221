"""What one column of a row contains: messages, objects of them, numbers; and `Form`, a documented way to write it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mdpo.data.json_texts import kind_of, unfolded
from mdpo.data.messages import conversation
from mdpo.data.messages import role_of as known_role
from mdpo.errors import DropPair
from mdpo.types import Message

Row = dict[str, Any]
HOLDS = ("messages", "conversations", "conversation")  # of an object around messages
SEQUENCES = "sequences"  # of an object that is a side as it was sampled


@dataclass(frozen=True)
class Form:
    """One documented way to write a part of a pair: the columns that a row of this form has, further ones that it
    reads, where it is documented and how it is read (lines of docs/rows.md), and `read`, row → the part. Of a form
    that has several answers, a list in each of its columns, `rewards` gives one of each answer, or None."""

    columns: tuple[str, ...]
    source: str
    rule: str
    read: Callable[[Row], Any]
    also: tuple[str, ...] = ()
    rewards: Callable[[Row], list[float | None]] | None = None


def number(row: Row, name: str) -> float:
    """A number in a column. Raises DropPair."""
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e308:
        raise DropPair(f"{name} is {kind_of(value)}, not a finite number")
    return float(value)


def role_of(message: Any) -> str | None:
    """user, system or assistant by any usual name; another role as it is."""
    if not isinstance(message, dict):
        return None
    role = known_role(message) or message.get("role", message.get("from", message.get("type")))
    return "system" if role == "developer" else role.lower() if isinstance(role, str) else None


def structured(value: Any) -> Any:
    """A text that contains messages, or an object of them, as JSON: parsed. Anything else as it is."""
    value = conversation(value)
    data = unfolded(value) if isinstance(value, str) else None
    if isinstance(data, dict) and (is_recorded(data) or any(isinstance(data.get(name), list) for name in HOLDS)):
        return data
    return value


def is_recorded(side: Any) -> bool:
    """Whether a side is an object with sequences of token ids."""
    return isinstance(side, dict) and side.get(SEQUENCES) is not None and not {"role", "from"} & set(side)


def unwrapped(side: Any) -> tuple[Any, list[Message] | None]:
    """(what is in an object with `messages` or `conversations`, its tools); any other side as it is."""
    if isinstance(side, dict) and not {"role", "from"} & set(side):
        for name in HOLDS:
            if isinstance(side.get(name), list):
                system = side.get("system") if role_of((side[name] or [0])[0]) != "system" else None
                first = [{"role": "system", "content": system}] if system else []
                return first + side[name], side.get("tools")
    return side, None
