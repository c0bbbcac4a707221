"""Sentinels: unique words put around each piece of content, so that its place in a rendered text is known."""

import itertools
import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field

from mdpo.errors import DropPair
from mdpo.types import Message, common_prefix

EDGE = 24  # characters of a message that a template may look at to decide how to write it
LEFT_OUT, NOT_DERIVABLE = "template leaves out content", "mask not derivable"


def numbered(i: int) -> str:
    """How a reason names the message with index `i`."""
    return f"message {i + 1}"


@dataclass
class ContentSpan:
    """One piece of content: message `owner`'s characters `before` + A … B + `after`, A and B being sentinels. White
    space around it stays outside, so that a template which strips content does to the marked text what it does to the
    plain one. `what` is its name in reasons."""

    owner: int
    before: str = ""
    after: str = ""
    what: str = "text"


@dataclass
class SentinelInserter:
    """Puts sentinels into messages. With `inside`, those of user and tool messages are put a little inside the content:
    Qwen3, for one, looks whether a user message begins with <tool_response>."""

    nonce: str
    inside: bool = False
    slots: list[ContentSpan] = field(default_factory=list)

    def message(self, message: Message, i: int) -> Message:
        """The message with sentinels around its content (behind the reasoning that it may begin with) and around each
        string in its tool calls' arguments, or around a call's name where there is no such string."""
        marked, role = dict(message), message["role"]
        own, calls = role == "assistant", message.get("tool_calls")
        thought, tag, visible = (message.get("content") or "").rpartition("</think>" if own else "\0")
        if visible.strip() or (role in ("user", "tool") and marked.get("content") is not None):
            reason_name = "the text beside a tool call" if own and calls else f"the {role} text"
            marked["content"] = thought + tag + self.text(visible, i, self.inside and not own, reason_name)
        if calls:
            marked["tool_calls"] = [self.call(call, i) for call in calls]
        return marked

    def call(self, call: dict, i: int) -> dict:
        function, before = dict(call["function"]), len(self.slots)
        function["arguments"] = self.leaves(function.get("arguments", {}), i)
        if len(self.slots) == before:
            function["name"] = self.text(function["name"], i, what="a tool call")
        return {**call, "function": function}

    def leaves(self, value, i: int):
        if isinstance(value, str) and value.strip():
            return self.text(value, i, what="a tool call's arguments")
        if isinstance(value, dict):
            return {k: self.leaves(v, i) for k, v in value.items()}
        return [self.leaves(v, i) for v in value] if isinstance(value, list) else value

    def text(self, value: str, i: int, inside: bool = False, what: str = "text") -> str:
        core = value.strip()
        lead, tail = value[: value.index(core)], value[value.index(core) + len(core) :]
        edge = min(EDGE, len(core) // 2) if inside else 0
        slot = ContentSpan(i, core[:edge], core[len(core) - edge :], what)
        s, core = len(self.slots), core[edge : len(core) - edge]
        self.slots.append(slot)
        return f"{lead}{slot.before}{self.nonce}{s}a{core}{self.nonce}{s}b{slot.after}{tail}"


def fresh_nonces(text: str) -> Iterator[str]:
    """Words that are not in the text."""
    return (word for k in itertools.count() if (word := f"Qz{k}x") not in text)


class Marks:
    """Where sentinels are in a marked text. A template may repeat a tool's name later on: first places count."""

    def __init__(self, text: str, marker: SentinelInserter):
        self.text, self.slots = text, marker.slots
        pattern = re.compile(rf"{marker.nonce}(\d+)([ab])")
        self._sentinels = [(m.start(), m.end(), int(m[1])) for m in pattern.finditer(text)]
        self._first: dict[tuple[int, str], tuple[int, int]] = {}
        for m in pattern.finditer(text):
            self._first.setdefault((int(m[1]), m[2]), (m.start(), m.end()))
        self.plain = pattern.sub("", text)
        self._starts = [start for start, _, _ in self._sentinels]
        self._widths = [0, *itertools.accumulate(end - start for start, end, _ in self._sentinels)]
        self._slots_of: dict[int, list[int]] = {}
        for s, slot in enumerate(self.slots):
            self._slots_of.setdefault(slot.owner, []).append(s)

    def unmarked(self, position: int) -> int:
        """A position in the marked text, as a position in the text without sentinels."""
        return position - self._widths[bisect_left(self._starts, position)]

    def start(self, s: int) -> int | None:
        """Where slot `s` begins in the marked text; None where the template left it out."""
        place, before = self._first.get((s, "a")), self.slots[s].before
        if place and not self.text.endswith(before, 0, place[0]):
            raise DropPair(f"{NOT_DERIVABLE}: where {numbered(self.slots[s].owner)} begins")
        return place and place[0] - len(before)

    def end(self, s: int) -> int | None:
        place, after = self._first.get((s, "b")), self.slots[s].after
        if place and not self.text.startswith(after, place[1]):
            raise DropPair(f"{NOT_DERIVABLE}: where {numbered(self.slots[s].owner)} ends")
        return place and place[1] + len(after)

    def owner(self, text: str) -> str:
        """The message from which on the text without sentinels is another one than `text`."""
        same = common_prefix(self.plain, text)
        begun = [self.slots[s].owner for start, _, s in self._sentinels if self.unmarked(start) <= same]
        return numbered(max(begun, default=0))

    def of(self, i: int) -> list[int]:
        return self._slots_of.get(i, [])

    def ranges(self, messages: list[int]) -> list[tuple[int, int]]:
        """Unmarked characters [start, end) of the content of these messages. DropPair where some was left out."""
        slots = [s for i in messages for s in self.of(i)]
        edges = [(s, self.start(s), self.end(s)) for s in slots]
        ranges = []
        for s, start, end in edges:
            if start is None or end is None:
                raise self.missing(s)
            ranges.append((self.unmarked(start), self.unmarked(end)))
        return ranges

    def missing(self, s: int) -> DropPair:
        """The reason to drop a pair whose slot `s` the template left out."""
        slot = self.slots[s]
        return DropPair(f"{LEFT_OUT}: {slot.what} ({numbered(slot.owner)}); another chat_template may write it")

    def contents(self) -> list[tuple[int, int, int]]:
        """(start, end, message) of each piece of content that the template wrote, in unmarked characters."""
        edges = [(self.start(s), self.end(s), slot.owner) for s, slot in enumerate(self.slots)]
        return [(self.unmarked(a), self.unmarked(b), i) for a, b, i in edges if a is not None and b is not None]

    def opening(self, i: int) -> int | None:
        """Where the content of message `i` begins."""
        return min((p for s in self.of(i) if (p := self.start(s)) is not None), default=None)

    def end_of(self, i: int) -> int:
        """Behind the last piece of message `i`; DropPair where the template left one out."""
        edges = [(s, self.end(s)) for s in self.of(i)]
        if not edges:
            raise DropPair(f"a turn without words ({numbered(i)})")
        last = 0
        for s, end in edges:
            if end is None:
                raise self.missing(s)
            last = max(last, end)
        return last

    def end_before(self, i: int) -> int:
        """Behind the last piece of the messages before `i`, 0 where there is none."""
        ends = (self.end(s) for s, slot in enumerate(self.slots) if slot.owner < i)
        return max((end for end in ends if end is not None), default=0)

    def next_message(self, i: int, position: int) -> int:
        """Where the first content behind `position` begins that is not message `i`'s; else the end of the text."""
        others = {s for _, _, s in self._sentinels if self.slots[s].owner != i}
        starts = (self.start(s) for s in others)
        return min((p for p in starts if p is not None and p >= position), default=len(self.text))
