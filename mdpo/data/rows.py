"""One row → one pair of conversations in one form of messages. Nothing here knows a tokenizer."""

from typing import Any

from mdpo.data.forms import COLUMNS, as_preference
from mdpo.data.json_texts import kind_of
from mdpo.data.messages import (
    Conversation,
    is_text,
    normalize_messages,
    parsed,
    read_messages,
    refuse_broken,
    same_message,
)
from mdpo.data.questions import begins
from mdpo.data.recorded import recorded_pair
from mdpo.data.row_numbers import margin_of, weight_of
from mdpo.data.tool_calls import read_tools
from mdpo.errors import DropPair, UserError
from mdpo.types import Message, Pair

__all__ = ["COLUMNS", "row_to_pair"]
TRAILING = "a turn of the environment behind the last answer"
SPACED = "prompts that differ in white space or further fields, chosen's used for both"
NO_USER = "no user turn"
FROM_JSON = "sides that were messages as JSON text"
OTHER_SYSTEM = "a system column of other words than the conversation's own system message, which counts"
Sides = list[list[Message]]


def row_to_pair(
    row: dict[str, Any], mask_turns: bool = True, different_prompts: bool = False, sides: tuple | None = None
) -> Pair:
    """One row in any form of docs/rows.md, messages or plain strings. Raises DropPair.

    With a prompt, its assistant turns are context. Without one the prompt is everything before the first answer, the
    first assistant turn behind a user turn, the same on both sides or, with `different_prompts`, each side's own; with
    `mask_turns` False it is TRL's: the turns (or characters) that both sides begin with. With `mask_turns`, messages
    behind the last answer are left out. `sides` take the place of the row's own.
    """
    original, row = row, as_preference(row, mask_turns, sides)
    if "recorded" in row:
        if not mask_turns:
            raise UserError("Recorded sequences say which tokens are supervised: they need mask_user_turns: true.",
                            "sequences")  # fmt: skip
        of_row = {"margin": margin_of(row), "weight": weight_of(row)}
        return recorded_pair(row, lambda *both: row_to_pair(original, mask_turns, different_prompts, both), of_row)
    for name in (name for name in original if name in row["used"]):
        refuse_broken(original[name], name)
    prompt, sides = _prompt(row), [row.get("chosen"), row.get("rejected")]
    for name, side in zip(("chosen", "rejected"), sides, strict=True):
        if not side:
            raise DropPair(f"not a pair: {name} is {'empty' if side in ('', [], {}) else kind_of(side)}")
    if any(isinstance(original.get(name), str) and isinstance(row[name], list) for name in ("chosen", "rejected")):
        row["remarks"].append(FROM_JSON)
    if all(isinstance(side, str) for side in sides) and not isinstance(prompt, list):
        return _strings(row, prompt, sides)
    extra = {**_for_template(row, different_prompts), "margin": margin_of(row), "weight": weight_of(row)}
    both, weights, n, notes = _conversations(prompt, sides, mask_turns, different_prompts)
    if any(w != 1 for side in weights for w in side[n:]) and not mask_turns:
        raise UserError("Messages have a `weight` or `loss: false`, which say how much of a turn is learned: they need "
                        "mask_user_turns: true.", "weight")  # fmt: skip
    first = normalize_messages([{"role": "system", "content": row["system"]}], "system") if row.get("system") else []
    own = [side[0] for side in both if side[0]["role"] == "system"]
    if first and not all(same_message(message, *first) for message in own):
        row["remarks"].append(OTHER_SYSTEM)
    if first and not own:
        both, n = [first + side for side in both], n + 1
        weights = [[1.0, *side] if side else [] for side in weights]
    if not n:  # without turn masks: what both sides begin with
        raise DropPair("the prompt is empty: the sides begin with no message in common")
    remarks = row["remarks"] + list(notes.remarks)
    return Pair(*both, n, weights=tuple(weights), remarks=remarks, unread=list(notes.unread), **extra)


def _conversations(prompt, sides: list, mask_turns: bool, different_prompts: bool):
    """(both sides as whole conversations, their weights, messages of context, remarks and unread fields)."""
    sides = [_as_messages(*side, isinstance(prompt, list)) for side in zip(("chosen", "rejected"), sides, strict=True)]
    read = [read_messages(side, name) for side, name in zip(sides, ("chosen", "rejected"), strict=True)]
    both, weights = [side.messages for side in read], [side.weights for side in read]
    if isinstance(prompt, str):
        prompt = _question(prompt, both) if prompt.strip() else None
    asked, remarks = read_messages(prompt or [], "prompt"), []
    if asked.messages or (prompt is not None and not mask_turns):
        prompt, n = asked.messages, len(asked.messages)
        conversations = [_behind(prompt, *side, once=mask_turns) for side in zip(both, weights, strict=True)]
        both, weights = [side for side, _ in conversations], [w for _, w in conversations]
        remarks += [NO_USER] if not any(m["role"] == "user" for m in both[0]) else []
    elif mask_turns:
        both, n, remarks = _shared_context(both, different_prompts)
    else:
        n = _common_start(*both)
    if mask_turns:
        ends = [_last_answer(side, n) + 1 for side in both]
        remarks += [TRAILING] if any(end < len(side) for end, side in zip(ends, both, strict=True)) else []
        both, weights = ([side[:end] for side, end in zip(each, ends, strict=True)] for each in (both, weights))
    if any(w not in (0, 1) for side in (*weights, asked.weights) for w in side[:n]):
        raise DropPair("a weight in the prompt, which is not supervised")
    notes = Conversation(remarks=dict.fromkeys(remarks))
    for part in (asked, *read):
        notes.unread |= part.unread
        notes.remarks |= part.remarks
    return both, weights, n, notes


def _shared_context(both: Sides, different: bool) -> tuple[Sides, int, list[str]]:
    """(both sides, messages of context, remarks) where no prompt is given: what is before the first answer has to
    say the same on both sides, and chosen's words are used for both. Raises DropPair."""
    firsts = [first_answer(side) for side in both]
    n, starts = min(firsts), [side[:first] for side, first in zip(both, firsts, strict=True)]
    shorter = min(map(len, starts))
    differs = next((i for i in range(shorter) if not same_message(starts[0][i], starts[1][i])), shorter)
    if differs == max(map(len, starts)):
        same = starts[0] == starts[1]
        return (both if same else [both[0], starts[0] + both[1][n:]]), n, [] if same else [SPACED]
    if not different:
        raise DropPair(
            f"prompt mismatch: message {differs + 1} of the sides differs; allow_different_prompts: true keeps both"
        )
    if any(m["role"] == "assistant" for start in starts for m in start[n:]):
        raise DropPair("prompt mismatch: the assistant's greeting is in another place on the other side")
    return both, n, []


def first_answer(messages: list[Message]) -> int:
    """Index of the first assistant turn behind a user turn; what the assistant says before is a greeting."""
    asked = next((i for i, m in enumerate(messages) if m["role"] == "user"), -1)
    return next((i for i, m in enumerate(messages) if i > asked and m["role"] == "assistant"), len(messages))


def _last_answer(side: list[Message], n: int) -> int:
    """Index of the last assistant turn. Raises DropPair where what follows the context of `n` messages has none."""
    last = max((i for i, m in enumerate(side) if m["role"] == "assistant"), default=-1)
    if last < n and last < len(side) - 1:
        raise DropPair("last turn not from the assistant")
    return last


def _prompt(row: dict[str, Any]) -> str | list[Message] | None:
    prompts = [row[name] for name in ("prompt", "conversations") if row.get(name) not in (None, [], {})]
    if len(prompts) > 1 and not _same(*prompts):
        raise DropPair("both prompt and conversations, which differ")
    prompt = prompts[0] if prompts else row.get("prompt")
    if prompt is not None and not isinstance(prompt, str | list | dict):
        raise DropPair("prompt is neither text nor messages")
    return ([prompt] if prompt else None) if isinstance(prompt, dict) else prompt


def _same(a: Any, b: Any) -> bool:
    lists = isinstance(a, list) and isinstance(b, list)
    return a == b or (lists and len(a) == len(b) and begins(a, b))


def _for_template(row: dict[str, Any], different: bool) -> dict[str, Any]:
    """What a row has for the chat template: tools, and variables of its own. Tools are part of the prompt: those of the
    sides have to be the same, but with `different`. Raises DropPair."""
    tools, kwargs = read_tools(row.get("tools")), parsed(row.get("chat_template_kwargs"), "chat_template_kwargs")
    if kwargs and (not isinstance(kwargs, dict) or {"tools", "messages", "add_generation_prompt"} & set(kwargs)):
        raise DropPair("chat_template_kwargs is not an object of the template's own variables")
    rejected = None if row.get("rejected_tools") is None else read_tools(row["rejected_tools"]) or []
    rejected = None if rejected == (tools or []) else rejected
    if rejected is not None and not different:
        raise DropPair("the sides have different tools, which are part of the prompt; allow_different_prompts: true "
                       "keeps both")  # fmt: skip
    return {"tools": tools, "rejected_tools": rejected, "template_kwargs": kwargs or {}}


def _behind(prompt: list[Message], side: list[Message], weights: list[float], once: bool):
    """(whole conversation, its weights): the prompt and the side, which with `once` may begin with the prompt itself.
    Raises DropPair where it begins with the prompt's question and continues otherwise."""
    n = len(prompt)
    if once and len(side) >= n and all(map(same_message, side, prompt)):
        return prompt + side[n:], weights
    asked = next((m for m in prompt if m["role"] == "user"), None)
    again = next((m for m in side[:2] if m["role"] != "system"), None)
    if once and asked and again and same_message(asked, again):
        raise DropPair(
            "prompt mismatch: a side begins with the prompt's question and does not go on as the prompt does"
        )
    return prompt + side, [1.0] * n + weights if weights else []


def _strings(row: dict[str, Any], prompt: str | None, sides: list[str]) -> Pair:
    if any(row.get(name) for name in ("system", "tools", "rejected_tools", "chat_template_kwargs")):
        raise DropPair("system, tools or chat_template_kwargs beside plain texts")
    if not all(map(is_text, (prompt or "", *sides))):
        raise DropPair("content is not text")
    if not all(side.strip() for side in sides):
        raise DropPair("empty or missing content")
    if isinstance(prompt, str):
        whole = [prompt + side for side in sides]
        return Pair(*whole, len(prompt), margin=margin_of(row), weight=weight_of(row), remarks=row["remarks"])
    n = _common_start(*sides)
    n = n - 1 if n and sides[0][n - 1] == " " else n
    return Pair(*sides, n, margin=margin_of(row), weight=weight_of(row), prompt_given=False, remarks=row["remarks"])


def _as_messages(name: str, side: Any, after_prompt: bool) -> list[Message]:
    """A side as a list: one message alone, or a text behind a prompt of messages, which is the answer."""
    if isinstance(side, str) and after_prompt:
        return [{"role": "assistant", "content": side}]
    if isinstance(side, dict):
        return [side]
    if not isinstance(side, list):
        raise DropPair(f"not a pair: {name} is {kind_of(side)}, not messages")
    return side


def _question(prompt: str, sides: list[list[Message]]) -> list[Message] | None:
    """What a prompt that is a text means, beside conversations: None where it is their first user message (as in
    UltraFeedback), that message where they begin with the assistant."""
    both = [[m for m in side if m["role"] != "system"] for side in sides]
    asked = [next((m["content"].strip() for m in side if m["role"] == "user"), None) for side in both]
    if all(text == prompt.strip() for text in asked):  # behind the assistant's greeting, maybe
        return None
    if all(side and side[0]["role"] == "assistant" for side in both):
        return [{"role": "user", "content": prompt}]
    raise DropPair("prompt mismatch: the text in prompt is not the first user message of the sides")


def _common_start(a, b) -> int:
    """First index at which two sequences differ; one less than the shorter where they do not (TRL's rule)."""
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter - 1)
