"""One row → one pair of conversations in one form of messages. Nothing here knows a tokenizer."""

import json
import math
from typing import Any

from mdpo.types import DropPair, Message, Pair, UserError

ROLES = ("system", "developer", "user", "assistant", "tool")
# What other formats call a role: ShareGPT, Gemma, Llama 3's tool output, OpenAI's first function calls.
ALIASES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",  # ShareGPT: its text is the call as JSON
    "ipython": "tool",
    "observation": "tool",
    "function": "tool",
}
COLUMNS = ("prompt", "conversations", "system", "chosen", "rejected", "tools", "chat_template_kwargs", "margin",
           "score_chosen", "score_rejected", "key")  # fmt: skip


def row_to_pair(row: dict[str, Any], mask_turns: bool = True, different_prompts: bool = False) -> Pair:
    """One row in TRL's preference form or ShareGPT's, messages or plain strings, with or without `prompt`
    (`conversations` in ShareGPT's). Raises DropPair.

    With a `prompt`, its assistant turns are context. Without one the prompt is everything before the first assistant
    turn, the same on both sides or, with `different_prompts`, each side's own; with `mask_turns` False it is TRL's: the
    turns (or characters) that both sides begin with.
    """
    prompt = row.get("conversations") if row.get("prompt") is None else row["prompt"]
    sides = [row.get("chosen"), row.get("rejected")]
    if not all(sides):
        raise DropPair("not a pair")
    if all(isinstance(side, str) for side in sides) and not isinstance(prompt, list):
        return _strings(prompt, sides, _margin(row))
    tools = _parsed(row["tools"], "tools") if isinstance(row.get("tools"), str) else row.get("tools")
    extra = {"tools": tools or None, "template_kwargs": row.get("chat_template_kwargs") or {}, "margin": _margin(row)}
    sides = [_as_messages(side, isinstance(prompt, list)) for side in sides]
    if isinstance(prompt, str):
        prompt = _question(prompt, sides)
    chosen, rejected = (normalise_messages(side) for side in sides)
    weights = [_weights(raw, side) for raw, side in zip(sides, (chosen, rejected), strict=True)]
    raw_prompt = prompt if isinstance(prompt, list) else []
    if raw_prompt or (isinstance(prompt, list) and not mask_turns):
        prompt = normalise_messages(raw_prompt)
        if not (mask_turns and all(side[: len(prompt)] == prompt for side in (chosen, rejected))):
            chosen, rejected = prompt + chosen, prompt + rejected
            weights = [[1.0] * len(prompt) + side if side else [] for side in weights]
        n = len(prompt)
    elif mask_turns:
        n = min(_first_assistant(side) for side in (chosen, rejected))
        same = chosen[: _first_assistant(chosen)] == rejected[: _first_assistant(rejected)]
        if not same and not different_prompts:
            raise DropPair("prompt mismatch")
    else:
        n = _common_start(chosen, rejected)
    if mask_turns and not all(side[-1]["role"] == "assistant" for side in (chosen, rejected)):
        raise DropPair("last turn not from the assistant")
    if any(w != 1 for side in weights for w in side[:n]) or any(m.get("weight") is not None for m in raw_prompt):
        raise DropPair("a weight in the prompt, which is not supervised")
    if any(weights) and not mask_turns:
        raise UserError(
            "Messages have a `weight`, which multiplies a turn's log-ratios: it needs mask_user_turns: true."
        )
    if row.get("system") and not any(side[0]["role"] == "system" for side in (chosen, rejected)):
        first = {"role": "system", "content": row["system"]}
        chosen, rejected, n = [first, *chosen], [first, *rejected], n + 1
        weights = [[1.0, *side] if side else [] for side in weights]
    return Pair(chosen, rejected, n, weights=tuple(weights), **extra)


def _strings(prompt: str | None, sides: list[str], margin: float | None) -> Pair:
    if not all(side.strip() for side in sides):
        raise DropPair("empty or missing content")
    if isinstance(prompt, str):
        return Pair(prompt + sides[0], prompt + sides[1], len(prompt), margin=margin)
    n = _common_start(*sides)
    return Pair(*sides, n - 1 if n and sides[0][n - 1] == " " else n, margin=margin)


def _as_messages(side: Any, after_prompt: bool) -> list[Message]:
    """A side as a list: one message stands for itself, a text after a prompt of messages for the answer."""
    if isinstance(side, str) and after_prompt:
        return [{"role": "assistant", "content": side}]
    if isinstance(side, dict):
        return [side]
    if not isinstance(side, list):
        raise DropPair("not a pair")
    return side


def _question(prompt: str, sides: list[list[Message]]) -> list[Message] | None:
    """What a prompt that is a text stands for, beside conversations: None where it is their first user message (as in
    UltraFeedback), that message where they begin with the assistant."""
    first = [next((m for m in normalise_messages(side[:2]) if m["role"] != "system"), None) for side in sides]
    if all(m and m["role"] == "assistant" for m in first):
        return [{"role": "user", "content": prompt}]
    if not all(m and m["role"] == "user" and m["content"].strip() == prompt.strip() for m in first):
        raise DropPair("prompt mismatch")
    return None


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text or "null")
    except json.JSONDecodeError as e:
        raise DropPair(f"{what} are not JSON") from e


def _margin(row: dict[str, Any]) -> float | None:
    """`margin`, else by how much the chosen side's score is higher, where both have one."""
    given = {name: row.get(name) for name in ("margin", "score_chosen", "score_rejected")}
    for name, value in given.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise DropPair(f"{name} is not a finite number")
    margin, better, worse = given.values()
    if margin is None and better is not None and worse is not None:
        return float(better - worse)
    return None if margin is None else float(margin)


def _weights(raw: list[Message], messages: list[Message]) -> list[float]:
    """The `weight` of each raw message, 1 where there is none; an empty list where all are 1. DropPair for a bad one,
    or one on a message that is not the assistant's."""
    weights = [m.get("weight") for m in raw]
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
    message = _named(message)
    content = message.get("content", "")
    if isinstance(content, list):
        content = "".join(_part_text(part) for part in content)
    if not isinstance(content, str):
        raise DropPair("content is not text")
    message["content"] = content
    if not message.get("tool_calls"):
        message.pop("tool_calls", None)
        if not content.strip() and message["role"] != "tool":  # a tool may print nothing
            raise DropPair("empty or missing content")
        return message
    message["tool_calls"] = [_normalise_call(call) for call in message["tool_calls"]]
    return message


def _named(message: Message) -> Message:
    """The message without null fields, with today's names: role and content, tool_calls. Raises DropPair."""
    if not isinstance(message, dict):
        raise DropPair(f"unknown role: {type(message).__name__}")
    message = {k: v for k, v in message.items() if v is not None and k != "weight"}
    if "from" in message and "role" not in message:
        message |= {"role": message.pop("from"), "content": message.pop("value", "")}
    role = str(message.get("role"))
    if role == "function_call":
        calls = _parsed(message.pop("content", ""), "tool call arguments")
        message["tool_calls"] = calls if isinstance(calls, list) else [calls]
    if isinstance(message.get("function_call"), dict):  # OpenAI's before tool_calls
        message["tool_calls"] = [{"type": "function", "function": message.pop("function_call")}]
    message["role"] = ALIASES.get(role, role)
    if message["role"] not in ROLES:
        raise DropPair(f"unknown role: {role[:40]}")
    return message


def _part_text(part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
        raise DropPair("content is not text")
    return part["text"]


def _normalise_call(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call in the OpenAI form, its arguments parsed: as a string they would be encoded twice."""
    if not isinstance(call, dict):
        raise DropPair("tool call without a name")
    call = {k: v for k, v in call.items() if v is not None}
    function = {k: v for k, v in (call.get("function") or call).items() if v is not None}
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _parsed(arguments or "{}", "tool call arguments")
    if "name" not in function:
        raise DropPair("tool call without a name")
    function = {"name": function["name"], "arguments": arguments}
    return {**{k: v for k, v in call.items() if k in ("id", "type")}, "function": function}
