"""Tool calls and tools of other formats → OpenAI's form, and ids for calls that have none."""

import json
import re
from typing import Any

from mdpo.data.json_texts import is_text, kind_of, parsed
from mdpo.errors import DropPair
from mdpo.types import Message

# OpenAI's name, Llama 3's, Anthropic's, LangChain's.
ARGUMENTS = ("arguments", "parameters", "input", "args")
ID = re.compile(r"[a-zA-Z0-9]{9}")  # what Mistral's templates require, and all others accept


def read_calls(value: Any) -> list[dict[str, Any]]:
    """A list of calls, one call, or either as JSON text → calls as templates want them. Raises DropPair."""
    calls = parsed(value, "tool calls")
    if calls is None:
        return []
    if isinstance(calls, dict):
        calls = [calls]
    if not isinstance(calls, list):
        raise DropPair(f"tool_calls is {kind_of(calls)}, not a list")
    normalized = [_read_call(call) for call in calls]
    if not is_text(json.dumps(normalized, ensure_ascii=False, default=str)):
        raise DropPair("tool calls are not text")
    return normalized


def _read_call(call: Any) -> dict[str, Any]:
    """A tool call in the OpenAI form, its arguments parsed: as a string they would be encoded twice."""
    call = parsed(call, "tool calls")
    function = call.get("function") or call if isinstance(call, dict) else None
    if isinstance(function, str) and function.lstrip().startswith("{"):
        function = parsed(function, "tool calls")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        kind = call.get("type") if isinstance(call, dict) else None
        raise DropPair("tool call without a name" + (f" {{type: {kind}}}" if kind in ("custom", "mcp") else ""))
    names = [name for name in ARGUMENTS if function.get(name) is not None]
    others = {k for k, v in function.items() if v is not None} - {"name", "id", "type", "index", "function"}
    if len(names) > 1 or (not names and others):
        raise DropPair(f"tool call whose arguments cannot be told: {', '.join(sorted(map(str, others)))[:60]}")
    arguments = _arguments(function[names[0]]) if names else {}
    own = {"id": call["id"]} if call.get("id") is not None else {}
    return {**own, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _arguments(value: Any) -> dict[str, Any]:
    """By name: templates that write each argument refuse a list or a bare value, others would write an invalid call."""
    arguments = parsed(value, "tool call arguments")
    if arguments and not isinstance(arguments, dict):
        raise DropPair(f"tool call arguments are {kind_of(arguments)}, not an object")
    return arguments or {}


def read_tools(value: Any) -> list[dict[str, Any]] | None:
    """A row's `tools` as {type: function, function: …} each; None where there are none. Raises DropPair."""
    tools = parsed(value, "tools")
    if isinstance(tools, dict):
        tools = [tools]
    if tools and not isinstance(tools, list):
        raise DropPair("tools is not a list of objects")
    normalized: list[dict[str, Any]] = []
    for tool in tools or []:
        tool = parsed(tool, "tools")
        if not isinstance(tool, dict):
            raise DropPair("tools is not a list of objects")
        functions = next((tool[k] for k in ("functionDeclarations", "function_declarations") if k in tool), [tool])
        normalized += [_tool(t) for t in functions] if isinstance(functions, list) else [tool]
    return normalized or None


def _tool(tool: Any) -> dict[str, Any]:
    """Bare functions (OpenAI's first, Responses', Anthropic's, MCP's) are wrapped; another kind of tool is kept as it
    is, for the template to take or refuse."""
    if not isinstance(tool, dict):
        raise DropPair("tools is not a list of objects")
    function, kind = tool.get("function"), tool.get("type")
    if isinstance(function, str) and function.lstrip().startswith("{"):
        function = parsed(function, "tools")
    if isinstance(function, dict):
        return {"type": "function", **tool, "function": _described(function)}
    if isinstance(tool.get("name"), str) and kind in (None, "function", "custom"):
        return {"type": "function", "function": _described({k: v for k, v in tool.items() if k != "type"})}
    return tool


def _described(function: dict[str, Any]) -> dict[str, Any]:
    """A function with its parameters under that name, as an object."""
    schema = next((k for k in ("input_schema", "inputSchema") if k in function and "parameters" not in function), None)
    described = {"parameters" if k == schema else k: v for k, v in function.items()}
    if isinstance(described.get("parameters"), str):
        described["parameters"] = parsed(described["parameters"], "tools")
    return described


def linked(messages: list[Message], strict: bool = False) -> list[Message]:
    """The messages with an id for each call that has none, and for each tool message that names none that of its call,
    in order. With `strict` ids that are not nine letters or digits are replaced as well, in both places alike.
    The same messages always get the same ids, none of them twice."""
    ids = {str(c["id"]) for m in messages for c in m.get("tool_calls") or () if c.get("id")}
    fresh = (word for n in range(1, 100_000) if (word := f"call{n:05d}") not in ids)
    renamed: dict[str, str] = {}
    out, waiting = [], []
    for message in messages:
        if message.get("tool_calls"):
            calls = []
            for call in message["tool_calls"]:
                call_id = call.get("id")
                fits = call_id and (not strict or (isinstance(call_id, str) and ID.fullmatch(call_id)))
                if not fits:
                    call_id, before = next(fresh), call_id
                    renamed |= {str(before): call_id} if before else {}
                calls.append({**call, "id": call_id})
            waiting = [call["id"] for call in calls]
            message = {**message, "tool_calls": calls}
        elif message["role"] == "tool":
            call_id = message.get("tool_call_id")
            call_id = renamed.get(str(call_id), call_id) if call_id else next(iter(waiting), None)
            waiting = [word for word in waiting if word != call_id]
            message = {**message, "tool_call_id": call_id} if call_id else message
        out.append(message)
    return out
