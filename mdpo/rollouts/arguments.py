"""A call's arguments against the JSON schema that its tool has."""

import json
from typing import Any

KINDS = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict}


def wrong_arguments(arguments: dict[str, Any], schema: dict[str, Any]) -> str:
    """What is wrong with a call's arguments, by the tool's JSON schema; "" where nothing is."""
    parameters = schema.get("parameters") or {}
    known = parameters.get("properties") or {}
    for name in arguments:
        if name not in known:
            return f"{schema['name']} takes no argument {name}; it takes {', '.join(known) or 'none'}"
    for name in parameters.get("required") or ():
        if name not in arguments:
            return f"{schema['name']} needs the argument {name}"
    for name, value in arguments.items():
        kinds, allowed = known[name].get("type"), known[name].get("enum")
        kinds = [kinds] if isinstance(kinds, str) else kinds or []
        if known[name].get("nullable") and value is None:
            continue
        if kinds and not any(_is(value, kind) for kind in kinds):
            return f"{schema['name']}: {name} has to be {' or '.join(kinds)}, not {json.dumps(value)[:60]}"
        if allowed and value not in allowed:
            return f"{schema['name']}: {name} has to be one of {', '.join(map(str, allowed))}"
    return ""


def _is(value: Any, kind: str) -> bool:
    if kind == "null":
        return value is None
    if isinstance(value, bool):
        return kind == "boolean"
    return isinstance(value, KINDS.get(kind, object))
