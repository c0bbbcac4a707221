"""How a chat template's own calls begin, and which of the forms that TRL can read they have."""

import copy
from typing import Any

from trl import chat_template_utils
from trl.chat_template_utils import add_response_schema, parse_response

from mdpo.data.tool_calls import read_calls
from mdpo.errors import DropPair, UserError
from mdpo.masking.chat_template import ChatTemplate
from mdpo.types import Message, common_prefix

# TRL's own, each for templates that it knows word by word.
FORMS = {n: f for n, f in vars(chat_template_utils).items() if n.endswith("_template") and isinstance(f, dict)}

ADVICE = ". Set text"  # behind what is wrong

_NAMED = {"city": {"type": "string", "description": "A."}, "days": {"type": "integer", "description": "B."}}
_TOOL = {
    "type": "function",
    "function": {"name": "qz_7", "description": "C.", "parameters": {"type": "object", "properties": _NAMED}},
}


def _said(content: str, *arguments: dict[str, Any]) -> Message:
    calls = [
        {"id": f"call0000{n}", "type": "function", "function": {"name": "qz_7", "arguments": own}}
        for n, own in enumerate(arguments)
    ]
    return {"role": "assistant", "content": content} | ({"tool_calls": calls} if calls else {})


_ASKED: list[Message] = [{"role": "user", "content": "Qz0"}]
_CALL = _said("", {"city": "Qz1", "days": 2})
_TURNS = (_said("Qz2"), _CALL, _said("", {}))
# What templates may refuse, or write in another way.
_RARE = (_said("Qz2 Qz3.", {"city": 'Qz "1"'}, {"days": 3}), _said("Qz2", {"days": 3}) | {"reasoning_content": "Qz4"})


def opener(template: ChatTemplate, tools: list[dict[str, Any]]) -> str:
    """What the template writes before a call's name, from the last added token on; the token alone where it writes that
    before nothing else. Raises UserError where it shows no tools, or no calls."""
    name, call = tools[0]["function"]["name"], {"function": {"name": "Qz1", "arguments": {}}}
    calls = [{"id": "call00001", "type": "function", **call}]
    try:
        prompt = template.render(_ASKED, tools, generation=True)
        text = template.render([*_ASKED, {"role": "assistant", "content": "", "tool_calls": calls}], tools)
        plain = template.render([*_ASKED, {"role": "assistant", "content": "Qz2"}], tools)
    except DropPair as error:
        raise UserError(f"tool_calls: {error}{ADVICE}.", "tool_calls") from error
    if name not in prompt:
        raise UserError(f"tool_calls: the chat template does not show tools{ADVICE}.", "tool_calls")
    before = text[common_prefix(prompt, text) :].partition("Qz1")[0]
    if "Qz1" not in text or not before.strip():
        raise UserError(f"tool_calls: the chat template does not show where a call begins{ADVICE}.", "tool_calls")
    added = list(template.added.finditer(before))
    if not added:
        return before.strip()
    token = added[-1].group()
    return before[added[-1].start() :].strip() if token in plain[common_prefix(prompt, plain) :] else token


def with_response_form(template: ChatTemplate) -> Any:
    """A copy of the tokenizer that knows how its template's calls are read: as it says itself, as TRL says of this
    template, or by that of TRL's forms that reads most of what the template writes. Raises UserError."""
    tokenizer = template.tokenizer
    if getattr(tokenizer, "response_template", None) or getattr(tokenizer, "response_schema", None):
        return tokenizer
    try:
        return add_response_schema(copy.copy(tokenizer))
    except ValueError as error:
        readers = [copy.copy(tokenizer) for _ in FORMS]
        for reader, form in zip(readers, FORMS.values(), strict=True):
            reader.response_template = form
        readers = [reader for reader in readers if all(_reads(reader, template, turn) for turn in _TURNS)]
        if readers:
            return max(readers, key=lambda reader: sum(_reads(reader, template, turn) for turn in _RARE))
        raise UserError(
            "tool_calls: neither the tokenizer nor any form that TRL knows reads this chat template's calls"
            f"{ADVICE}, or a response_template in tokenizer_config.json.",
            "tool_calls",
        ) from error


def read_turn(reader: Any, ids: list[int], prompt: list[int], tools: list[dict[str, Any]] | None) -> Message:
    """The turn as a message, without what is empty. `reader` is what `with_response_form` gives."""
    message = parse_response(reader, ids, prefix=prompt, tools=tools)
    return {name: value for name, value in message.items() if value not in (None, [])}


def _reads(reader: Any, template: ChatTemplate, turn: Message) -> bool:
    """Whether the turn is read back from what the template writes."""
    try:
        prompt = template.render(_ASKED, [_TOOL], generation=True)
        text = template.render([*_ASKED, turn], [_TOOL])
    except DropPair:
        return False
    begin = common_prefix(prompt, text)
    ends = [found.end() for found in template.added.finditer(text, begin)]
    end = ends[-1] if ends and not text[ends[-1] :].strip() else len(text)  # no line break behind the turn's last token
    written = text[begin:end]
    ids, before = (reader(part, add_special_tokens=False).input_ids for part in (written, text[:begin]))
    try:
        found = read_turn(reader, ids, before, [_TOOL])
        calls = [call["function"] for call in read_calls(found.get("tool_calls"))]
    except Exception:  # of a form for other templates: whatever its patterns run into
        return False
    wanted = [call["function"] for call in turn.get("tool_calls", [])]
    texts = {name: (found.get(name) or "").strip() for name in ("reasoning_content", "content")}
    return calls == wanted and texts == {
        "reasoning_content": "",
        **{name: turn[name] for name in texts if name in turn},
    }
