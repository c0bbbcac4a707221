"""Content in parts (OpenAI's, Responses', Anthropic's, Gemini's, Bedrock's) → pieces of text, thoughts, tool calls and
tool outputs."""

import json
import re
from collections.abc import Iterator
from typing import Any

from mdpo.data.json_texts import NOT_JSON, kind_of, unfolded
from mdpo.errors import DropPair

# The fields that may contain the text of a part, by its type.
TEXTS = {**dict.fromkeys(("text", "input_text", "output_text"), ("text", "value", "content")), "refusal": ("refusal",)}
THOUGHTS = {"thinking": ("thinking", "text"), "reasoning": ("reasoning", "text"), "reasoning_text": ("text",),
            "summary_text": ("text",)}  # fmt: skip
RESULTS = {"functionResponse", "function_response", "toolResult"}  # Gemini's and Bedrock's keys of a tool's output
OTHERS = ("tool_use", "tool_result", "redacted_thinking")
# Known, and refused: what a text model does not take, and Vercel's calls.
MEDIA = ("image", "image_url", "input_image", "video", "video_url", "audio", "input_audio", "audio_url", "file",
         "input_file", "document", "tool-call", "tool-result")  # fmt: skip
KNOWN = {*TEXTS, *THOUGHTS, *OTHERS, *MEDIA}
BEGINS = re.compile(r"""["\s]*\[\s*\{\s*\\*["']type\\*["']\s*:\s*\\*["'](\w+)""")
Piece = tuple[str, Any]  # "text" or "thought" with a text, "call" with a call, "output" with a tool message's fields,
# "lost" with the name of what no template shows


def pieces(content: Any) -> Iterator[Piece]:
    """The pieces of a message's content, in order. Raises DropPair for anything else."""
    if isinstance(content, dict) and isinstance(content.get("parts"), list):
        content = content["parts"]
    elif isinstance(content, dict) and {"type", "text"} & set(content):
        content = [content]
    if not isinstance(content, list):
        if not isinstance(content, str):
            raise DropPair(f"content is {kind_of(content)}, not text")
        yield "text", content
        return
    for part in content:
        yield from _pieces_of(part)


def _pieces_of(part: Any) -> Iterator[Piece]:
    if isinstance(part, str):
        yield "text", part
        return
    if not isinstance(part, dict):
        raise DropPair(f"content part that is {kind_of(part)}")
    kind = part.get("type")
    if kind is None:
        yield from _untyped(part)
    elif not isinstance(kind, str):
        raise DropPair(f"content part {_name(part)}")
    elif kind in TEXTS:
        yield "text", _text_of(part, TEXTS[kind])
    elif kind in THOUGHTS:
        yield "thought", _text_of(part, THOUGHTS[kind])
    elif kind == "tool_use":
        yield "call", {"id": part.get("id"), "type": "function", "name": part.get("name"), "input": part.get("input")}
    elif kind == "tool_result":
        yield from _result(part, part.get("tool_use_id"), part.get("content"))
    elif kind == "redacted_thinking":
        yield "lost", "redacted_thinking"
    else:
        raise DropPair(f"content part {_name(part)}")


def _untyped(part: dict[str, Any]) -> Iterator[Piece]:
    """Gemini's and Bedrock's parts, whose only key tells what they are."""
    part = {k: v for k, v in part.items() if v is not None}
    call = next((part[k] for k in ("functionCall", "function_call", "toolUse") if k in part), None)
    result = next((part[k] for k in part if k in RESULTS), None)
    if isinstance(part.get("text"), str):
        yield "thought" if part.get("thought") is True else "text", part["text"]
    elif isinstance(call, dict):
        known = {"id": call.get("id") or call.get("toolUseId"), "type": "function", "name": call.get("name")}
        yield "call", {**known, "args": next((call[k] for k in ("args", "input") if k in call), None)}
    elif isinstance(result, dict):
        answer = result.get("response", result.get("content"))
        if isinstance(answer, list) and all(isinstance(p, dict) and len(p) == 1 for p in answer):
            answer = [p.get("json", {"type": "text", "text": p["text"]} if "text" in p else p) for p in answer]
            answer = answer[0] if len(answer) == 1 else answer
        answer = [answer] if isinstance(answer, dict) and answer.get("type") == "text" else answer
        name = {"name": result["name"]} if isinstance(result.get("name"), str) else {}
        for kind, fields in _result(result, result.get("id") or result.get("toolUseId"), answer):
            yield kind, {**fields, **name} if kind == "output" else fields
    else:
        raise DropPair(f"content part {_name(part)}")


def _result(part: dict[str, Any], call_id: Any, content: Any) -> Iterator[Piece]:
    yield "output", {"content": "" if content == [] else tool_output(content), "tool_call_id": call_id}
    if part.get("is_error") is True:
        yield "lost", "is_error"


def _text_of(part: dict[str, Any], fields: tuple[str, ...]) -> str:
    """The text of a part; OpenAI's Assistants put it into an object, Mistral's thoughts into parts of their own."""
    for field in fields:
        value = part.get(field)
        if isinstance(value, dict) and isinstance(value.get("value"), str):
            value = value["value"]
        if isinstance(value, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in value):
            value = "".join(_text_of(p, TEXTS["text"]) for p in value)
        if isinstance(value, str):
            return value
    raise DropPair(f"content part {_name(part)} without {fields[0]}")


def _name(part: dict[str, Any]) -> str:
    """Example: `{type: image_url}`, or `{inlineData}` where a part has no type."""
    kind = part.get("type")
    return f"{{type: {str(kind)[:30]}}}" if kind is not None else f"{{{', '.join(sorted(map(str, part)))[:40]}}}"


def tool_output(value: Any) -> str:
    """A tool's output as text: objects, numbers and lists that are no content parts as JSON. Raises DropPair."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, dict) and _kind(value) in TEXTS and isinstance(value.get("text"), str):
        value = [value]
    if isinstance(value, list) and value and all(isinstance(p, dict) and _kind(p) in KNOWN for p in value):
        output = list(pieces(value))
        if other := next((p for p, (kind, _) in zip(value, output, strict=False) if kind != "text"), None):
            raise DropPair(f"content part {_name(other)} in a tool's output")
        return "".join(text for _, text in output)
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, *NOT_JSON):
        raise DropPair(f"content is {kind_of(value)}, not text") from None


def _kind(part: dict[str, Any]) -> str:
    return part["type"] if isinstance(part.get("type"), str) else ""


def are_results(content: Any) -> bool:
    listed = isinstance(content, list) and content and all(isinstance(p, dict) for p in content)
    return bool(listed) and all(part.get("type") == "tool_result" or RESULTS & set(part) for part in content)


def parts_as_text(content: str) -> list[dict[str, Any]] | None:
    """The content parts that a text contains as JSON, None where it is a text of another kind. DropPair for one that
    begins so and is not JSON: cut off, or written by Python's repr."""
    if not content.startswith(("[", '"[')) or "type" not in content[:200]:
        return None
    parts = unfolded(content)
    begins = BEGINS.match(content) if parts is None else None
    if begins and begins[1] in KNOWN:
        raise DropPair("content begins as content parts in JSON and is not JSON", "content")
    listed = isinstance(parts, list) and parts and all(isinstance(p, dict) and _kind(p) in KNOWN for p in parts)
    return parts if listed else None
