"""Where each assistant turn is in the text that a model's own chat template writes.

No template is parsed and no token id is searched for. The template renders the conversation three ways: as it is;
with a unique sentinel before and after every message's content; and, for each assistant turn, the messages before it
with the generation prompt. All positions come from the sentinels, so content can contain anything, role headers and
end-of-turn markers included, without moving a boundary.
"""

import json
import re
from dataclasses import dataclass, field
from typing import Any

from mdpo.console import first_line
from mdpo.errors import DropPair, UserError
from mdpo.masking.dates import rendered_on_day, with_day
from mdpo.masking.left_out import SPACE, TOOLS, UNCLOSED, lacks_tools, left_out
from mdpo.masking.sentinels import NOT_DERIVABLE, Marks, SentinelInserter, fresh_nonces, numbered
from mdpo.masking.stops import THINK_PREFIX, any_of, probe_header, probe_stop
from mdpo.types import Message, common_prefix

EMPTY_THINK = re.compile(r"\s*<think>\s*</think>\s*")
REST_OF_EMPTY_THINK = re.compile(r"\s*</think>\s*")


@dataclass
class Span:
    """Characters [start, end) of the rendered text that the policy sampled in assistant message `message`.

    `stop` is the end-of-turn token that closes it, "" when the template writes none there (GLM-4's last turn).
    """

    start: int
    end: int
    message: int
    stop: str


@dataclass
class Rendered:
    """A rendered conversation: its text, the spans of assistant messages from `n_prompt` on, (start, end, message) of
    all pieces of content, and remarks on what the text lacks (`Pair.remarks`)."""

    text: str
    spans: list[Span]
    contents: list[tuple[int, int, int]]
    remarks: list[str] = field(default_factory=list)


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
        # Ordinary added tokens that the template writes as others write special ones.
        own = {*self.stops, *self.added.findall(self.header)}
        self.special = any_of([*(t.content for t in added if t.special), *own])

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

    def locate(self, messages: list[Message], n_prompt: int, tools=None, rendered: str | None = None, **kwargs):
        """Renders `messages` and finds the spans of every assistant message from index `n_prompt` on.
        `rendered` is what `render` made of them, where that is known. Raises DropPair when the template refuses the
        conversation or a position cannot be derived."""
        text = self.render(messages, tools, **kwargs) if rendered is None else rendered
        marked, marker, marks = self._mark(messages, text, tools, kwargs)
        spans = []
        remarks = left_out(messages, n_prompt, marks)
        if tools and lacks_tools(tools, messages, marks):
            remarks.append(TOOLS)
        for i, m in enumerate(messages):
            if i >= n_prompt and m["role"] == "assistant":
                start = self._start(marks, marker, marked, i, tools, kwargs, remarks)
                end, stop = self._end(marks, marker, marked, i, tools, kwargs)
                spans.append(Span(start, end, i, stop))
                remarks += [] if stop else [UNCLOSED]
        foreign = marks.ranges([i for i, m in enumerate(messages) if m["role"] != "assistant"])
        for span in spans:
            if span.start >= span.end or any(a < span.end and span.start < b for a, b in foreign):
                raise DropPair(f"{NOT_DERIVABLE}: where {numbered(span.message)} begins and ends")
        return Rendered(text, spans, marks.contents(), list(dict.fromkeys(remarks)))

    def _mark(self, messages, text, tools, kwargs) -> tuple[list[Message], SentinelInserter, Marks]:
        """Messages with sentinels, and the marked text: without its sentinels it has to be the template's own text."""
        nonce, marks = next(fresh_nonces(text)), None
        for inside in (False, True):
            marker = SentinelInserter(nonce, inside)
            marked = [marker.message(m, i) for i, m in enumerate(messages)]
            try:
                marks = Marks(self.render(marked, tools, **kwargs), marker)
            except DropPair:
                continue
            if marks.plain == text:
                return marked, marker, marks
        raise DropPair(f"{NOT_DERIVABLE}: the template rewrites {marks.owner(text) if marks else 'marked text'}")

    def _start(
        self, marks: Marks, marker: SentinelInserter, marked: list[Message], i: int, tools, kwargs, remarks
    ) -> int:
        """Where the policy begins to sample message `i`: after the generation prompt for the messages before it.

        Example (Qwen3, last turn): the text continues with `<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\nHi`, the
        generation prompt is `<|im_start|>assistant\\n`, or with enable_thinking=False everything before `Hi`;
        the longest one that fits counts. In earlier turns the think block is missing: then only the header is compared.
        """
        anchor, opening = marks.unmarked(marks.end_before(i)), marks.opening(i)
        tail = marks.plain[anchor:]
        base, *others = self._generation_prompts(marker, marked[:i], i, tools, kwargs)
        # GLM-4 also writes "/nothink" behind the user's text; what counts is what follows the plain prompt.
        others = [base + p.partition(base.lstrip())[2] if base.strip() and base.lstrip() in p else p for p in others]
        fitting = [p for p in (base, *others, THINK_PREFIX.sub("", base)) if tail.startswith(p)]
        if fitting:
            n = len(max(fitting, key=len))
        else:  # another think prefix that history leaves out: then the content has to follow at once
            ahead = 0 if opening is None else marks.unmarked(opening) - anchor
            n = min(common_prefix(tail, base), ahead)
            if (header := self._behind_header(tail[:ahead], base)) and tail[n:ahead].strip():
                n = header
                remarks.append(SPACE)
            if opening is None:
                marks.end_of(i)  # raises, and says what is missing
            if opening is None or tail[n:ahead].strip():
                raise DropPair(f"{NOT_DERIVABLE}: the header of {numbered(i)} is not its generation prompt's")
        own = opening is not None and anchor + n >= marks.unmarked(opening)  # the policy's own words begin here
        headed = self.header in tail[:n]  # not so after tool output, where there is no generation prompt
        if not own and not headed and tail.startswith(self.header, n):
            n += len(self.header)
        if (marked[i].get("content") or "").lstrip().startswith("<think>"):  # then a think block is the policy's own
            return anchor + n
        block = EMPTY_THINK.match(tail, n)
        if block is None and THINK_PREFIX.search(tail[:n]):
            block = REST_OF_EMPTY_THINK.match(tail, n)
        return anchor + (block.end() if block else n)

    def _behind_header(self, written: str, prompt: str) -> int:
        """Where the header ends in what the template wrote before a turn's words, if all of it is the generation
        prompt but for white space before that header; else 0."""
        begin = written.rfind(self.header) if self.header and prompt.endswith(self.header) else -1
        before = written[: max(begin, 0)].split(), prompt.removesuffix(self.header).split()
        return begin + len(self.header) if begin >= 0 and "".join(before[0]) == "".join(before[1]) else 0

    def _generation_prompts(self, marker, before, i, tools, kwargs) -> list[str]:
        """What the template writes behind the messages `before` for the policy to continue: as the recipe asks for
        it, and where the template knows the switch, with thinking off and on."""
        ways = [{}, {"enable_thinking": False}, {"enable_thinking": True}]
        if "enable_thinking" not in str(self.tokenizer.chat_template):
            ways = ways[:1]
        texts = (self.render(before, tools, generation=True, **{**kwargs, **way}) for way in ways)
        prompts = (Marks(text, marker) for text in texts)
        return [p.plain[p.unmarked(p.end_before(i)) :] for p in prompts]

    def _end(
        self, marks: Marks, marker: SentinelInserter, marked: list[Message], i: int, tools, kwargs
    ) -> tuple[int, str]:
        """Where message `i` ends: behind the first end-of-turn token after its last content. Between that content and
        the next message's content is only the template's own text.

        Turns that none of the usual tokens closes (`<|eom_id|>`, `<|call|>` after tool calls) end with the last special
        token that the template writes whether or not a message follows, or else with the first one. A last turn may
        have none at all.
        """
        last = marks.end_of(i)
        tail = marks.text[last : marks.next_message(i, last)]
        closers = [(tail.find(s), s) for s in self.stops if s in tail]
        if not closers and (specials := list(self.special.finditer(tail))):
            alone = Marks(self.render(marked[: i + 1], tools, **kwargs), marker)
            n = common_prefix([m.group() for m in specials], self.find_special(alone.text[alone.end_of(i) :]))
            closer = specials[max(n - 1, 0)]
            closers = [(closer.start(), closer.group())]
        if not closers:
            closing = tail.rstrip() if i == len(marked) - 1 and marked[i].get("tool_calls") else ""
            return marks.unmarked(last + len(closing)), ""
        position, stop = min(closers)
        return marks.unmarked(last + position + len(stop)), stop

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
