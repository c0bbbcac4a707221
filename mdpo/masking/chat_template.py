"""A model's own chat template: the texts that it writes, and what is found out about it once."""

import json
from typing import Any

from mdpo.console import first_line
from mdpo.errors import DropPair, UserError
from mdpo.masking.dates import rendered_on_day, with_day
from mdpo.masking.stops import any_of, probe_empty_block, probe_header, probe_stop
from mdpo.types import Message


class ChatTemplate:
    """A tokenizer's chat template and what is found out about it once: content form, header, end-of-turn tokens."""

    def __init__(self, tokenizer, kwargs: dict[str, Any] | None = None, locates: bool = True):
        """Without `locates` only `render` is used, as for TRL's rule, and nothing is asked of an assistant turn's end.
        Raises UserError for a template that cannot be used."""
        if not tokenizer.chat_template:
            raise UserError(
                f"The tokenizer of {tokenizer.name_or_path!r} has no chat template. "
                "Set chat_template in the recipe to a .jinja file.",
                key="chat_template",
            )
        self.tokenizer, self.kwargs = tokenizer, with_day(tokenizer, kwargs)
        added = [t for t in tokenizer.added_tokens_decoder.values() if t.content.strip()]
        self.special, self.added = any_of(t.content for t in added if t.special), any_of(t.content for t in added)
        self.text_parts = self._needs_text_parts()
        self.stops = {tokenizer.eos_token} - {None} | (probe_stop(self) if locates else set())
        self.header = probe_header(self) if locates else ""
        self.empty_block = probe_empty_block(self) if locates else ""
        # Ordinary added tokens that the template writes as others write special ones.
        own = {*self.stops, *self.added.findall(self.header)}
        self.special = any_of([*(t.content for t in added if t.special), *own])
        self.last_stops: dict[bool, str | None] = {}  # what `turns.last_stop` has found
        self.edges_alike: bool | None = None  # and `turns.edges_alike`
        self.unsupplied_blocks: dict[str, bool] = {}  # and `think_blocks.unsupplied_block`

    def find_special(self, text: str) -> list[str]:
        """The special tokens, and the template's own ones, that are in a text as text."""
        return self.special.findall(text)

    def render(self, messages: list[Message], tools=None, generation: bool = False, **kwargs) -> str:
        """The template's text. Tool-call arguments go in as objects; as JSON strings where a template needs those.
        Raises DropPair with the template's own words when it refuses the conversation."""
        if self.text_parts:
            messages = [_as_text_parts(m) for m in messages]
        kwargs = {**self.kwargs, **kwargs, "tools": tools, "add_generation_prompt": generation}
        try:
            return rendered_on_day(self.tokenizer, messages, **kwargs)
        except TypeError as first:  # deepseek_v3 concatenates the arguments to a string
            try:
                as_json = [_json_arguments(m) for m in messages]
                return rendered_on_day(self.tokenizer, as_json, **kwargs)
            except Exception:
                raise DropPair(_refusal(first)) from first
        except Exception as e:  # jinja errors of every kind, raise_exception() included
            raise DropPair(_refusal(e)) from e

    def _needs_text_parts(self) -> bool:
        """Whether content must be a list of text parts: vision templates drop or refuse a plain string."""
        for self.text_parts in (False, True):
            try:
                if "Qz0" in self.render([{"role": "user", "content": "Qz0"}]):
                    return self.text_parts
            except DropPair:
                continue
        return False


def _refusal(error: Exception) -> str:
    """A drop reason: the template's own words, but no row's whole text."""
    return f"template refuses the conversation: {first_line(error, innermost=False)[:120]}"


def _as_text_parts(message: Message) -> Message:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _json_arguments(message: Message) -> Message:
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = json.dumps(call["function"].get("arguments", {}), ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**message, "tool_calls": calls}
