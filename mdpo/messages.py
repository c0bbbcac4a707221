"""Messages of other formats → messages as chat templates want them. Whatever cannot be one drops its pair by name."""

import json
from typing import Any

from mdpo.types import DropPair, Message

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
ARGUMENTS = ("arguments", "parameters", "input", "args")  # OpenAI's name, Llama 3's, Anthropic's, LangChain's


def normalise_messages(messages: list[Message]) -> list[Message]:
    """Messages as templates want them: string content, tool-call arguments as objects, no null fields.
    Raises DropPair for an unknown role, missing content, or arguments that are not JSON."""
    return [_normalise(message) for message in messages]


def parsed(value: Any, what: str) -> Any:
    """A text as JSON, anything else as it is. Raises DropPair."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value or "null")
    except (ValueError, RecursionError) as e:  # no JSON, too deep, or a number of thousands of digits
        raise DropPair(f"{what} are not JSON") from e


def conversation(value: Any) -> Any:
    """A text that holds a JSON list of messages, or one message, as that list; anything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    listed = [found] if isinstance(found, dict) else found
    named = (
        [isinstance(m, dict) and bool({"role", "from"} & set(m)) for m in listed] if isinstance(listed, list) else []
    )
    return listed if named and all(named) else value


def is_text(value: Any) -> bool:
    """Whether a value is a text that has bytes: half of a surrogate pair, a cut emoji, has none."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def same_message(a: Message, b: Message) -> bool:
    """Whether two normalised messages say the same, white space around it and other fields aside."""
    return (a["role"], a["content"].strip(), a.get("tool_calls")) == (
        b["role"],
        b["content"].strip(),
        b.get("tool_calls"),
    )


def _normalise(message: Message) -> Message:
    message = _named(message)
    content = message.get("content", "")
    if isinstance(content, list):
        content = "".join(_part_text(part) for part in content)
    if not is_text(content):
        raise DropPair("content is not text")
    message["content"] = content
    if not message.get("tool_calls"):
        message.pop("tool_calls", None)
        if not content.strip() and message["role"] != "tool":  # a tool may print nothing
            raise DropPair("empty or missing content")
        return message
    calls = parsed(message["tool_calls"], "tool call arguments")
    if not isinstance(calls, list):
        raise DropPair("tool_calls is not a list")
    message["tool_calls"] = [_normalise_call(call) for call in calls]
    return message


def _named(message: Message) -> Message:
    """The message without null fields, with today's names: role and content, tool_calls. Raises DropPair."""
    if not isinstance(message, dict):
        raise DropPair(f"unknown role: {type(message).__name__}")
    message = {k: v for k, v in message.items() if v is not None and k != "weight"}
    if "from" in message and "role" not in message:
        message["role"] = message.pop("from")
        message.setdefault("content", message.pop("value", ""))
    role = str(message.get("role"))
    call = message.pop("function_call", None)  # OpenAI's before tool_calls
    if role == "function_call":
        call = message.pop("content", "")
    if call is not None:
        if message.get("tool_calls"):
            raise DropPair("both tool_calls and function_call")
        calls = parsed(call, "tool call arguments")
        message["tool_calls"] = [
            {"type": "function", "function": c} for c in (calls if isinstance(calls, list) else [calls])
        ]
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


def _normalise_call(call: Any) -> dict[str, Any]:
    """A tool call in the OpenAI form, its arguments parsed: as a string they would be encoded twice."""
    function = call.get("function") or call if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise DropPair("tool call without a name")
    given = [name for name in ARGUMENTS if function.get(name) is not None]
    others = {k for k, v in function.items() if v is not None} - {"name", "id", "type", "index", "function"}
    if len(given) > 1 or (not given and others):
        raise DropPair(f"tool call whose arguments cannot be told: {', '.join(sorted(map(str, others)))[:60]}")
    arguments = parsed(function[given[0]] or "{}", "tool call arguments") if given else {}
    function = {"name": function["name"], "arguments": arguments}
    return {**{k: call[k] for k in ("id", "type") if call.get(k) is not None}, "function": function}
