"""A message's role, content and tool calls by the names of other formats → today's names. Content is not read here."""

from dataclasses import dataclass, field
from typing import Any

from mdpo.data.json_texts import begun, kind_of, unfolded
from mdpo.errors import DropPair

ROLES = ("system", "developer", "user", "assistant", "tool")
CALL, REASONING = "function_call", "reasoning"
# What other formats call a role, in lower case: ShareGPT, Gemma, Llama 3's tool output, OpenAI's first function calls,
# LangChain, ms-swift, Cohere, OpenAssistant.
ALIASES = {
    **{role: role for role in ROLES},
    **dict.fromkeys(("human", "prompter", "humanmessage", "humanmessagechunk"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "ai", "chatbot", "aimessage", "aimessagechunk"), "assistant"),
    **dict.fromkeys(("systemmessage", "systemmessagechunk"), "system"),
    **dict.fromkeys(("ipython", "observation", "function", "tool_response", "tool_result", "tool_output",
                     "function_response",
                     "function_result", "toolmessage", "toolmessagechunk", "functionmessage"), "tool"),
    **dict.fromkeys((CALL, "tool_call"), CALL),  # ShareGPT, ms-swift: the content is the call as JSON
}  # fmt: skip
ITEMS = (CALL, "function_call_output", REASONING)  # OpenAI Responses: entries of a conversation without a role
SPEAKERS = ("role", "from", "author", "speaker", "sender")
CONTENTS = ("content", "value", "parts", "message", "text")
CALLS = ("tool_calls", "function_call")
SPOKEN = {"role", "from", "lc"}
PEOPLE = ("human", "ai", "humanmessage", "aimessage")  # LangChain's types that are nobody else's
LISTS = ("messages", "conversations", "conversation")
BOOKKEEPING = ("type", "id", "status", "call_id")  # of Responses' items and LangChain's messages


@dataclass
class Named:
    """A message under today's names. `role` is one of ROLES; `content` and `calls` are as the row has them, `missing`
    says that no field held the content. `item` is CALL or REASONING for what is a part of an assistant's turn."""

    role: str
    content: Any = ""
    calls: Any = None
    rest: dict[str, Any] = field(default_factory=dict)
    item: str = ""
    missing: bool = False


def named(message: Any) -> Named:
    """Raises DropPair for anything that is not a message, or has an unknown role."""
    fields = _unwrapped(message)
    kind = fields.get("type")
    if kind in ITEMS and ("role" not in fields or "content" not in fields):
        return _item(fields, kind)
    key = next((k for k in SPEAKERS if k in fields), None)
    if key is None and isinstance(kind, str) and kind.lower() in ALIASES:
        key = "type"
    speaker = fields.pop(key) if key else None
    role = ALIASES.get(speaker.strip().lower()) if isinstance(speaker, str) else None
    if role is None:
        raise DropPair(_unknown(speaker, kind, message))
    if str(fields.get("type")).lower() in ("message", "chat", *ALIASES):
        typed = fields.pop("type")
        fields = {k: v for k, v in fields.items() if typed != "message" or k not in BOOKKEEPING}
    source = next((k for k in CONTENTS if k in fields), None)
    translated = Named(role, fields.pop(source) if source else "", rest=fields, missing=source is None)
    translated.calls = _calls(fields)
    if isinstance(fields.get("refusal"), str) and not translated.content:
        translated.content = fields.pop("refusal")
    if role == CALL:
        translated.role, translated.item, translated.content, call = "assistant", CALL, "", translated.content
        if translated.calls is not None:
            raise DropPair("both tool_calls and function_call")
        translated.calls = call
    return translated


def _unwrapped(message: Any) -> dict[str, Any]:
    """The message's own fields without nulls: LangChain writes them into `kwargs` or `data`."""
    if not isinstance(message, dict):
        raise DropPair(f"{kind_of(message)} in place of a message")
    inner = message.get("kwargs") if "lc" in message else message.get("data")
    if isinstance(inner, dict) and ("lc" in message or set(message) == {"type", "data"}):
        path = message.get("id")
        kind = message.get("type") if "lc" not in message else path[-1] if isinstance(path, list) and path else None
        message = {**inner, "type": inner.get("type") or kind}
    return {k: v for k, v in message.items() if v is not None}


def _calls(fields: dict[str, Any]) -> Any:
    """The tool calls of a message: OpenAI's, its earlier `function_call`, or LangChain's copy of either."""
    additional = fields.get("additional_kwargs")
    if isinstance(additional, dict) and not any(fields.get(k) for k in CALLS):
        fields.update({k: additional[k] for k in CALLS if additional.get(k)})
    calls, call = fields.pop("tool_calls", None), fields.pop("function_call", None)
    if calls and call is not None:
        raise DropPair("both tool_calls and function_call")
    return calls if call is None else call


def _item(fields: dict[str, Any], kind: str) -> Named:
    """An item of OpenAI's Responses that has no role."""
    call_id = fields.get("call_id") or fields.get("id")
    others = {k: v for k, v in fields.items() if k not in (*BOOKKEEPING, "role")}
    if kind == CALL:
        call = {"id": call_id, "type": "function", "name": others.pop("name", None)}
        return Named("assistant", calls=[{**call, "arguments": others.pop("arguments", None)}], rest=others, item=CALL)
    if kind == REASONING:
        content, summary = others.pop("content", None), others.pop("summary", None)
        others |= {"summary": summary} if content and summary else {}
        return Named("assistant", content or summary or [], rest=others, item=REASONING)
    return Named("tool", others.pop("output", ""), rest={**others, **({"tool_call_id": call_id} if call_id else {})})


def _unknown(speaker: Any, kind: Any, message: dict[str, Any]) -> str:
    if speaker is not None:
        return f"unknown role: {str(speaker)[:40]}"
    if isinstance(kind, str):
        return f"unknown role: None (an item {{type: {kind[:40]}}})"
    return f"unknown role: None (message has keys: {', '.join(sorted(map(str, message)))[:80]})"


def are_messages(values: Any) -> bool:
    """Whether a list contains messages, rather than data that have a `role` or a `type` of another meaning:
    [{"role": "cook"}], [{"type": "function", …}]. One entry with a known role and a content decides; the others of its
    list are then read, or refused by name."""
    return isinstance(values, list) and any(map(_tells, values))


def _tells(value: Any) -> bool:
    if not isinstance(value, dict) or not (SPOKEN & set(value) or str(value.get("type")).lower() in PEOPLE):
        return False
    try:
        message = named(value)
    except DropPair:
        return False
    return not message.missing or bool(message.calls or message.item)


def role_of(message: Any) -> str | None:
    """The role of a message of any format, one of ROLES; None for anything else."""
    try:
        return named(message).role
    except DropPair:
        return None


def conversation(value: Any) -> Any:
    """A text that contains messages as JSON (a list, one message, or an object with nothing but such a list; encoded
    once or several times) as that list, and so a list of JSON texts of one message each; anything else as it is, so
    that an answer in JSON stays a text."""
    if isinstance(value, list) and value and all(isinstance(m, str) and m.lstrip().startswith("{") for m in value):
        messages = [unfolded(text) for text in value]
        return messages if are_messages(messages) else value
    data = unfolded(value) if isinstance(value, str) else None
    if isinstance(data, dict):
        data = next((data[k] for k in LISTS if set(data) == {k}), [data])  # beside other keys, these count too
    if isinstance(data, list) and all(isinstance(m, str) for m in data):  # a list of texts that are JSON
        data = [unfolded(text) for text in data]
    return data if are_messages(data) else value


def refuse_broken(value: Any, column: str) -> None:
    """Raises DropPair for a text that begins as messages do, with a known role, and is not JSON: cut off, or written
    by Python's repr. An answer that is cut-off JSON of another kind, or code, is a text like any other."""
    role, mark = (
        begun(value) if isinstance(value, str) and value[:100].lstrip().startswith(("[", "{", '"')) else ("", "")
    )
    if role not in ALIASES or unfolded(value) is not None:
        return
    if mark == "'":
        raise DropPair(f"{column} is messages as Python writes them, not JSON: write it with json.dumps")
    raise DropPair(f"{column} begins as messages in JSON and is not JSON", column)
