"""One row → one pair of conversations in one form of messages. Nothing here knows a tokenizer."""

import math
from typing import Any

from mdpo.forms import as_preference
from mdpo.messages import is_text, normalise_messages, parsed, read_messages, refuse_broken, same_message
from mdpo.tool_calls import read_tools
from mdpo.types import DropPair, Message, Pair, UserError

COLUMNS = ("prompt", "conversations", "system", "chosen", "rejected", "tools", "chat_template_kwargs", "margin",
           "score_chosen", "score_rejected", "key")  # fmt: skip


TOLD = ("unread", "remarks")


def row_to_pair(row: dict[str, Any], mask_turns: bool = True, different_prompts: bool = False) -> Pair:
    """One row in TRL's preference form or ShareGPT's, messages or plain strings, with or without `prompt`
    (`conversations` in ShareGPT's). Raises DropPair.

    With a `prompt`, its assistant turns are context. Without one the prompt is everything before the first assistant
    turn, the same on both sides or, with `different_prompts`, each side's own; with `mask_turns` False it is TRL's: the
    turns (or characters) that both sides begin with.
    """
    row = as_preference(row)
    for name in ("prompt", "conversations", "chosen", "rejected"):
        refuse_broken(row.get(name), name)
    prompt, sides = _prompt(row), [row.get("chosen"), row.get("rejected")]
    if not all(sides):
        raise DropPair("not a pair")
    if all(isinstance(side, str) for side in sides) and not isinstance(prompt, list):
        return _strings(row, prompt, sides)
    extra = {**_for_template(row), "margin": _margin(row)}
    sides = [_as_messages(side, isinstance(prompt, list)) for side in sides]
    if isinstance(prompt, str):
        prompt = _question(prompt, sides) if prompt.strip() else None
    read = [read_messages(side, name) for side, name in zip(sides, ("chosen", "rejected"), strict=True)]
    (chosen, rejected), weights = (side.messages for side in read), [side.weights for side in read]
    asked = read_messages(prompt or [], "prompt")
    if asked.messages or (prompt is not None and not mask_turns):
        prompt, n = asked.messages, len(asked.messages)
        both = zip((chosen, rejected), weights, strict=True)
        (chosen, w), (rejected, v) = (_behind(prompt, side, of, once=mask_turns) for side, of in both)
        weights = [w, v]
    elif mask_turns:
        n = min(_first_assistant(side) for side in (chosen, rejected))
        same = chosen[: _first_assistant(chosen)] == rejected[: _first_assistant(rejected)]
        if not same and not different_prompts:
            raise DropPair("prompt mismatch")
    else:
        n = _common_start(chosen, rejected)
    if mask_turns and not all(side[-1]["role"] == "assistant" for side in (chosen, rejected)):
        raise DropPair("last turn not from the assistant")
    if any(w not in (0, 1) for side in (*weights, asked.weights) for w in side[:n]):
        raise DropPair("a weight in the prompt, which is not supervised")
    if any(w != 1 for side in weights for w in side[n:]) and not mask_turns:
        raise UserError("Messages have a `weight` or `loss: false`, which say how much of a turn is learned: they need "
                        "mask_user_turns: true.")  # fmt: skip
    if row.get("system") and not any(side[0]["role"] == "system" for side in (chosen, rejected)):
        first = normalise_messages([{"role": "system", "content": row["system"]}])
        chosen, rejected, n = first + chosen, first + rejected, n + 1
        weights = [[1.0, *side] if side else [] for side in weights]
    told = {what: list(dict.fromkeys(x for part in (asked, *read) for x in getattr(part, what))) for what in TOLD}
    return Pair(chosen, rejected, n, weights=tuple(weights), **extra, **told)


def _prompt(row: dict[str, Any]) -> str | list[Message] | None:
    given = [row[name] for name in ("prompt", "conversations") if row.get(name) not in (None, [], {})]
    if len(given) > 1 and given[0] != given[1]:
        raise DropPair("both prompt and conversations, which differ")
    prompt = given[0] if given else row.get("prompt")
    if prompt is not None and not isinstance(prompt, str | list | dict):
        raise DropPair("prompt is neither text nor messages")
    return ([prompt] if prompt else None) if isinstance(prompt, dict) else prompt


def _for_template(row: dict[str, Any]) -> dict[str, Any]:
    """What a row has for the chat template: tools, and variables of its own."""
    tools, kwargs = read_tools(row.get("tools")), parsed(row.get("chat_template_kwargs"), "chat_template_kwargs")
    if kwargs and (not isinstance(kwargs, dict) or {"tools", "messages", "add_generation_prompt"} & set(kwargs)):
        raise DropPair("chat_template_kwargs is not an object of the template's own variables")
    return {"tools": tools, "template_kwargs": kwargs or {}}


def _behind(prompt: list[Message], side: list[Message], weights: list[float], once: bool):
    """(whole conversation, its weights): the prompt and the side, which with `once` may begin with the prompt itself.
    Raises DropPair where it begins with the prompt's question and goes on otherwise."""
    n = len(prompt)
    if once and len(side) >= n and all(map(same_message, side, prompt)):
        return prompt + side[n:], weights
    asked = next((m for m in prompt if m["role"] == "user"), None)
    again = next((m for m in side[:2] if m["role"] != "system"), None)
    if once and asked and again and same_message(asked, again):
        raise DropPair("prompt mismatch")
    return prompt + side, [1.0] * n + weights if weights else []


def _strings(row: dict[str, Any], prompt: str | None, sides: list[str]) -> Pair:
    if any(row.get(name) for name in ("system", "tools", "chat_template_kwargs")):
        raise DropPair("system, tools or chat_template_kwargs beside plain texts")
    if not all(map(is_text, (prompt or "", *sides))):
        raise DropPair("content is not text")
    if not all(side.strip() for side in sides):
        raise DropPair("empty or missing content")
    if isinstance(prompt, str):
        return Pair(prompt + sides[0], prompt + sides[1], len(prompt), margin=_margin(row))
    n = _common_start(*sides)
    n = n - 1 if n and sides[0][n - 1] == " " else n
    return Pair(*sides, n, margin=_margin(row), prompt_given=False)


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


def _margin(row: dict[str, Any]) -> float | None:
    """`margin`, else by how much the chosen side's score is higher, where both have one."""
    given = [row.get(name) for name in ("margin", "score_chosen", "score_rejected")]
    for name, value in zip(("margin", "score_chosen", "score_rejected"), given, strict=True):
        if value is not None and not _finite(value):
            raise DropPair(f"{name} is not a finite number")
    margin, better, worse = given
    if margin is None and better is not None and worse is not None:
        margin = float(better) - float(worse)
        if not math.isfinite(margin):
            raise DropPair("margin is not a finite number")
    return None if margin is None else float(margin)


def _finite(value: Any) -> bool:
    """Whether a value is a number that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e308


def _common_start(a, b) -> int:
    """First index at which two sequences differ; one less than the shorter where they do not (TRL's rule)."""
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter - 1)


def _first_assistant(messages: list[Message]) -> int:
    return next((i for i, m in enumerate(messages) if m["role"] == "assistant"), len(messages))
