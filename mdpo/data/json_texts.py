"""JSON texts in rows whose tables could not represent the values otherwise."""

import json
import math
import re
from typing import Any

from mdpo.errors import DropPair

DEPTH = 5  # how often one JSON text may be nested in another
NOT_JSON = (ValueError, RecursionError)  # no JSON, too deep, or a number of thousands of digits
KINDS = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number",
         type(None): "null"}  # fmt: skip
KEY = re.compile(r"""(?:role|from)\\*["']\s*:\s*\\*["'](\w+)""")
BEGINS = re.compile(
    r"""["\\\s]*(?:\[\s*\{\s*\\*["'](?:role|from|content|value|type)|\{\s*\\*["'](?:role|from))\\*["']\s*:"""
)


def kind_of(value: Any) -> str:
    """What a value is, for a reason that must not contain the value itself."""
    if isinstance(value, int | float) and not abs(value) < 1e308:
        return "NaN" if value != value else "infinite" if abs(value) == math.inf else "too large"
    return KINDS.get(type(value), type(value).__name__)


def is_text(value: Any) -> bool:
    """Whether a value is a text that has bytes: half of a surrogate pair, a cut emoji, has none."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def parsed(value: Any, name: str) -> Any:
    """A text as JSON, also where it was encoded several times; anything else as it is. Raises DropPair."""
    for _ in range(DEPTH):
        if not isinstance(value, str):
            return value
        try:
            value = json.loads(value or "null")
        except NOT_JSON as e:
            raise DropPair(f"{name} are not JSON") from e
    raise DropPair(f"{name} are JSON inside JSON, more than {DEPTH} times")


def unfolded(text: str) -> Any:
    """The JSON list or object in a text, encoded once or several times; None where it contains neither."""
    value: Any = text
    for _ in range(DEPTH):
        value = value.removeprefix("\ufeff") if isinstance(value, str) else value
        if not isinstance(value, str) or not value[:100].lstrip().startswith(("[", "{", '"')):
            break
        try:
            value = json.loads(value)
        except NOT_JSON:
            return None
    return value if isinstance(value, list | dict) else None


def begun(text: str) -> tuple[str, str]:
    """Of a text that is no JSON: (the first role in it, in lower case, the quotation mark) where it begins as a list of
    messages or one message would; two empty texts where it does not."""
    begins = BEGINS.match(text)
    role = begins and KEY.search(text[:10_000])
    return (role[1].lower(), "'" if "'" in begins[0] else '"') if role else ("", "")
