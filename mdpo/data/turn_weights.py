"""The fields of a message that say how much of it is learned: `weight`, and what other formats call it."""

import json
import math
from typing import Any

from mdpo.errors import DropPair

LOSS = ("loss", "train", "training", "trainable")  # ms-swift and AgentInstruct, others, axolotl: whether to learn it


def turn_weight(fields: dict[str, Any], role: str, unread: dict[str, None]) -> float | None:
    """The factor of a message's log-ratios: `weight`, or 0 where the message says not to learn it; None where it says
    nothing. Takes those fields out; names in `unread` what is asked for and has no effect. Raises DropPair."""
    weight = fields.pop("weight", None)
    if weight is not None and not (_finite(weight) and weight >= 0):
        raise DropPair(f"a message's weight is {json.dumps(weight, default=str)[:20]}, not a number >= 0")
    if weight is not None and role != "assistant":
        raise DropPair("a weight on a message that is not the assistant's")
    switches = {name: _truth(name, fields.pop(name)) for name in LOSS if name in fields}
    if role != "assistant":
        unread |= {f"{name} of {role} messages": None for name, value in switches.items() if value}
        return None
    weights = {**({"weight": float(weight)} if weight is not None else {}), **switches}
    if len({value > 0 for value in weights.values()}) > 1 or len(set(switches.values())) > 1:
        both = " and ".join(weights)
        raise DropPair(f"{both} of one message contradict each other", both)
    return next(iter(weights.values()), None)


def _truth(name: str, value: Any) -> float:
    """1 or 0 for true and false, also as texts; a number >= 0 as it is."""
    text = value.strip().lower() if isinstance(value, str) else ""
    if isinstance(value, bool) or text in ("true", "false", "1", "0", "1.0", "0.0"):
        return float(value is True or text in ("true", "1", "1.0"))
    if not _finite(value) or value < 0:
        raise DropPair(f"{name} is {json.dumps(value, default=str)[:20]}, neither true nor false")
    return float(value)


def _finite(value: Any) -> bool:
    """Whether a value is a number that a float can hold."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) < 1e308 and not math.isnan(value)
