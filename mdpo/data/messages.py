"""Messages of other formats → messages as chat templates expect them. What cannot become one drops its pair."""

from dataclasses import dataclass, field
from typing import Any

from mdpo.data.content import Piece, are_results, parts_as_text, pieces, tool_output
from mdpo.data.json_texts import is_text as is_text
from mdpo.data.json_texts import kind_of
from mdpo.data.json_texts import parsed as parsed
from mdpo.data.message_forms import CALL, REASONING, ROLES, Named, named
from mdpo.data.message_forms import conversation as conversation
from mdpo.data.message_forms import refuse_broken as refuse_broken
from mdpo.data.message_forms import role_of as role_of
from mdpo.data.tool_calls import read_calls
from mdpo.data.turn_weights import turn_weight
from mdpo.errors import DropPair
from mdpo.masking.left_out import FIELDS
from mdpo.types import Message

# Fields that are read, or say nothing that a template could leave out.
READ = {"role", "content", "tool_calls", "tool_call_id"}
JSON_PARTS = "content parts that were JSON texts"


@dataclass
class Conversation:
    """Messages as templates expect them. `weights` has a number for each, or is empty where all are 1; `unread` names
    fields that no template needs, in order of appearance; `remarks` as `Pair.remarks`."""

    messages: list[Message] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    unread: dict[str, None] = field(default_factory=dict)
    remarks: dict[str, None] = field(default_factory=dict)


@dataclass
class _Turn:
    """A message being read: its number in the row, its weight where it has one, which item of a turn it is."""

    message: Message
    number: int
    weight: float | None = None
    item: str = ""
    plain: bool = False


def normalize_messages(messages: list[Message], where: str = "") -> list[Message]:
    """Messages as templates expect them: string content, tool-call arguments as objects, no null fields.
    Raises DropPair with the message's number, from 1, in `where` (a column)."""
    return read_messages(messages, where).messages


def read_messages(messages: list[Message], where: str = "") -> Conversation:
    """As `normalize_messages`, with weights and remarks. One entry may become several messages (tool
    outputs and a text in one), several may become one (the items of one answer). Raises DropPair."""
    out, turns = Conversation(), []
    for number, message in enumerate(messages, 1):
        if _is_plain(message):
            turns.append(_Turn(message.copy(), number, plain=True))
            continue
        try:
            for turn in _read(message, number, out):
                if not _joined(turns, turn):
                    turns.append(turn)
        except DropPair as reason:
            raise DropPair(f"{_place(where, number)}{reason}", reason.key) from None
    for turn in turns:
        if not turn.plain and (reason := _empty(turn.message)):
            raise DropPair(f"{_place(where, turn.number)}{reason}")
    out.messages = [turn.message for turn in turns]
    weights = [1.0 if turn.weight is None else turn.weight for turn in turns]
    out.weights = [] if set(weights) <= {1.0} else weights
    return out


def same_message(a: Message, b: Message) -> bool:
    """Whether two normalized messages say the same, apart from white space around it, ids of calls and other fields."""
    (text, calls), (other_text, other_calls) = ((m["content"].strip(), m.get("tool_calls", ())) for m in (a, b))
    same_words = (a["role"], text) == (b["role"], other_text)
    return same_words and [c["function"] for c in calls] == [c["function"] for c in other_calls]


def _place(where: str, number: int) -> str:
    return f"{where}, message {number}: " if where else f"message {number}: "


def _is_plain(message: Any) -> bool:
    """Whether a message is a role and a text, as nearly all are: those are taken as they are."""
    if not isinstance(message, dict) or len(message) != 2:
        return False
    role, content = message.get("role"), message.get("content")
    return (
        isinstance(content, str)
        and role in ROLES
        and not content.startswith(("[", '"['))
        and "</think>" not in content
        and is_text(content)
        and not content.isspace()
        and content != ""
    )


def _empty(message: Message) -> str:
    """Why a message is empty, "" where it is not. A tool may print nothing, a call needs no text."""
    content, role = message["content"], message["role"]
    if role == "tool" or message.get("tool_calls"):
        return ""
    if role != "assistant":
        return "" if content.strip() else "empty or missing content"
    thought, _, answer = content.rpartition("</think>")
    if answer.strip():
        return ""
    thoughts_alone = thought.replace("<think>", "").strip() or any(message.get(name) for name in FIELDS)
    return "an assistant turn of thoughts alone" if thoughts_alone else "an empty assistant turn"


def _read(message: Any, number: int, out: Conversation) -> list[_Turn]:
    """The messages of one entry."""
    entry = named(message)
    weight = turn_weight(entry.rest, entry.role, out.unread)
    for name in FIELDS:  # blank ones say nothing, and keep templates from looking for those in the content
        if isinstance(value := entry.rest.get(name), str) and not value.strip():
            del entry.rest[name]
        elif value and not isinstance(value, str | bool) and entry.role == "assistant":
            raise DropPair(f"{name} is {kind_of(value)}, not text")
    for name, value in entry.rest.items():
        empty = value is False or value in ("", [], {})
        if not empty and name not in READ and (name, entry.role) != ("name", "tool"):
            out.unread[name] = None
    if isinstance(entry.content, str) and entry.role != "tool":
        if listed := parts_as_text(entry.content):
            entry.content = listed
            out.remarks[JSON_PARTS] = None
    if entry.role == "tool" and are_results(entry.content):
        entry.role = "user"  # Anthropic's blocks, in the message of their own that other formats have
    if entry.role == "tool":
        if entry.missing and set(entry.rest) - {"name", "id", "tool_call_id"}:
            raise DropPair(f"empty or missing content (message has keys: {', '.join(sorted(entry.rest))[:80]})")
        read = [{"content": tool_output(entry.content)}]
    elif entry.role == "assistant":
        read = [_assistant(entry, out)]
    else:
        read = _others(entry, out)
    turns = [fields if "role" in fields else {"role": entry.role, **entry.rest, **fields} for fields in read]
    if not all(is_text(turn["content"]) for turn in turns):
        raise DropPair("content is not text")
    return [_Turn(turn, number, weight, entry.item) for turn in turns]


def _assistant(entry: Named, out: Conversation) -> dict[str, Any]:
    """An answer's fields. Templates write thoughts, then the text, then calls: pieces in another order would be
    trained on in an order in which they were not sampled."""
    order = {"thought": 0, "text": 1, "call": 2}
    by_kind: dict[str, list] = {kind: [] for kind in order}
    last = "thought"
    for kind, value in _known(pieces(entry.content), out):
        if kind not in order:
            raise DropPair("a tool's output in an assistant message")
        if order[kind] < order[last] and value:
            raise DropPair(f"a {kind} behind a {last}, which chat templates write the other way round")
        last = kind if value else last
        by_kind[kind].append(value)
    fields: dict[str, Any] = {"content": "".join(by_kind["text"])}
    if thoughts := "\n".join(filter(None, by_kind["thought"])):
        if entry.rest.get("reasoning_content", thoughts) != thoughts:
            raise DropPair("both reasoning_content and thoughts in the content")
        fields["reasoning_content"] = thoughts
        out.unread["reasoning_content"] = None
    calls, content_calls = (read_calls(raw) if raw else [] for raw in (entry.calls, by_kind["call"]))
    # LangChain has both.
    if calls and content_calls and [c["function"] for c in calls] != [c["function"] for c in content_calls]:
        raise DropPair("both tool_calls and calls in the content, which differ")
    fields |= {"tool_calls": calls or content_calls} if calls or content_calls else {}
    return fields


def _others(entry: Named, out: Conversation) -> list[dict[str, Any]]:
    """The fields of a user's or system message, and of the tool outputs in it (Anthropic, Gemini)."""
    read: list[dict[str, Any]] = []
    if entry.calls:
        raise DropPair(f"tool calls in a {entry.role} message")
    for kind, value in _known(pieces(entry.content), out):
        if kind == "output" and entry.role == "user":
            read.append({"role": "tool", **{k: v for k, v in value.items() if v is not None}})
        elif kind != "text":
            raise DropPair(f"a {kind} in a {entry.role} message")
        elif read and "role" not in read[-1]:
            read[-1]["content"] += value
        else:
            read.append({"content": value})
    # White space beside tool outputs is no message.
    outputs = any("role" in fields for fields in read)
    return [f for f in read if not outputs or "role" in f or f["content"].strip()] or [{"content": ""}]


def _known(content, out: Conversation) -> list[Piece]:
    """The pieces that a template can show; the others are named in `unread`."""
    known = []
    for kind, value in content:
        if kind == "lost":
            out.unread[value] = None
        else:
            known.append((kind, value))
    return known


def _joined(turns: list[_Turn], turn: _Turn) -> bool:
    """Whether a turn was merged into the one before: a call behind an answer, anything of an answer behind its
    thoughts, as items of one answer."""
    before = turns[-1] if turns else None
    if not before or before.message["role"] != "assistant" or turn.message["role"] != "assistant":
        return False
    if turn.item != CALL and before.item != REASONING:
        return False
    if before.weight is not None and turn.weight is not None and before.weight != turn.weight:
        raise DropPair("items of one turn with different weights")
    message = {**before.message, **{k: v for k, v in turn.message.items() if k not in ("content", "tool_calls")}}
    thoughts = [m["reasoning_content"] for m in (before.message, turn.message) if m.get("reasoning_content")]
    message |= {"reasoning_content": "\n".join(dict.fromkeys(thoughts))} if thoughts else {}
    message["content"] += turn.message["content"]
    calls = [*before.message.get("tool_calls", ()), *turn.message.get("tool_calls", ())]
    message |= {"tool_calls": calls} if calls else {}
    before.message, before.item = message, turn.item
    before.weight = turn.weight if before.weight is None else before.weight
    return True
