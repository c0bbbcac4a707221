"""One row → one pair of conversations in one form of messages. Nothing here knows a tokenizer."""

import json
import math
from typing import Any

from mdpo.types import DropPair, Message, Pair, UserError

ROLES = ("system", "developer", "user", "assistant", "tool")


def row_to_pair(row: dict[str, Any], mask_turns: bool = True) -> Pair:
    """One row in TRL's preference form, messages or plain strings, with or without `prompt`. Raises DropPair.

    With a `prompt`, its assistant turns are context. Without one the prompt is everything before the first assistant
    turn; with `mask_turns` False it is TRL's: the turns (or characters) that both sides begin with.
    """
    prompt, sides = row.get("prompt"), [row.get("chosen"), row.get("rejected")]
    if not all(sides):
        raise DropPair("not a pair")
    tools = json.loads(row["tools"]) if isinstance(row.get("tools"), str) else row.get("tools")
    extra = {"tools": tools or None, "template_kwargs": row.get("chat_template_kwargs") or {}, "margin": _margin(row)}
    if all(isinstance(side, str) for side in sides):
        if isinstance(prompt, str):
            return Pair(prompt + sides[0], prompt + sides[1], len(prompt), margin=extra["margin"])
        n = _common_start(*sides)
        return Pair(*sides, n - 1 if n and sides[0][n - 1] == " " else n, margin=extra["margin"])
    if not all(isinstance(side, list) for side in sides):
        raise DropPair("not a pair")
    chosen, rejected = (normalise_messages(side) for side in sides)
    weights = [_weights(side) for side in sides]
    prompt_messages = prompt if isinstance(prompt, list) else []
    if isinstance(prompt, list):
        prompt = normalise_messages(prompt)
        if not (mask_turns and all(side[: len(prompt)] == prompt for side in (chosen, rejected))):
            chosen, rejected = prompt + chosen, prompt + rejected
            weights = [[1.0] * len(prompt) + side if side else [] for side in weights]
        n = len(prompt)
    elif mask_turns:
        n = _first_assistant(chosen)
        if chosen[:n] != rejected[: _first_assistant(rejected)]:
            raise DropPair("prompt mismatch")
    else:
        n = _common_start(chosen, rejected)
    if mask_turns and not all(side[-1]["role"] == "assistant" for side in (chosen, rejected)):
        raise DropPair("last turn not from the assistant")
    if any(w != 1 for side in weights for w in side[:n]) or any(m.get("weight") is not None for m in prompt_messages):
        raise DropPair("a weight in the prompt, which is not supervised")
    if any(weights) and not mask_turns:
        raise UserError(
            "Messages have a `weight`, which multiplies a turn's log-ratios: it needs mask_user_turns: true."
        )
    return Pair(chosen, rejected, n, weights=tuple(weights), **extra)


def _margin(row: dict[str, Any]) -> float | None:
    margin = row.get("margin")
    if margin is None:
        return None
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
        raise DropPair("margin is not a finite number")
    return float(margin)


def _weights(messages: list[Message]) -> list[float]:
    """The `weight` of each message, 1 where there is none; an empty list where all are 1. DropPair for a bad one."""
    weights = [m.get("weight") for m in messages]
    if any(
        w is not None and (isinstance(w, bool) or not (isinstance(w, int | float) and 0 <= w < math.inf))
        for w in weights
    ):
        raise DropPair("a message's weight is not a number >= 0")
    if any(w is not None and m["role"] != "assistant" for m, w in zip(messages, weights, strict=True)):
        raise DropPair("a weight on a message that is not the assistant's")
    weights = [1.0 if w is None else float(w) for w in weights]
    return [] if set(weights) == {1.0} else weights


def _common_start(a, b) -> int:
    """First index at which two sequences differ; one less than the shorter where they do not (TRL's rule)."""
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter - 1)


def _first_assistant(messages: list[Message]) -> int:
    return next((i for i, m in enumerate(messages) if m["role"] == "assistant"), len(messages))


def normalise_messages(messages: list[Message]) -> list[Message]:
    """Messages as templates want them: string content, tool-call arguments as objects, no null fields.
    Raises DropPair for an unknown role, missing content, or arguments that are not JSON."""
    return [_normalise(message) for message in messages]


def _normalise(message: Message) -> Message:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        role = message.get("role") if isinstance(message, dict) else type(message).__name__
        raise DropPair(f"unknown role: {role}")
    message = {k: v for k, v in message.items() if v is not None and k != "weight"}
    content = message.get("content", "")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            raise DropPair("content is not text")
        content = "".join(part["text"] for part in content)
    message["content"] = content
    if not message.get("tool_calls"):
        message.pop("tool_calls", None)
        if not content.strip() and message["role"] != "tool":  # a tool may print nothing
            raise DropPair("empty or missing content")
        return message
    message["tool_calls"] = [_normalise_call(call) for call in message["tool_calls"]]
    return message


def _normalise_call(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call in the OpenAI form, its arguments parsed: as a string they would be encoded twice."""
    call = {k: v for k, v in call.items() if v is not None}
    function = {k: v for k, v in (call.get("function") or call).items() if v is not None}
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except json.JSONDecodeError as e:
            raise DropPair("tool call arguments are not JSON") from e
    if "name" not in function:
        raise DropPair("tool call without a name")
    function = {"name": function["name"], "arguments": arguments}
    return {**{k: v for k, v in call.items() if k in ("id", "type")}, "function": function}
