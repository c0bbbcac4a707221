"""Sentinels: unique words put around each piece of content, so that its place in a rendered text is known."""

import itertools
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

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
        self._sentinels: list[tuple[int, int, int]] = []
        self._first: dict[tuple[int, str], tuple[int, int]] = {}
        pieces, last, self._removed = [], 0, [0]
        for m in pattern.finditer(text):
            place, s = m.span(), int(m[1])
            self._sentinels.append((*place, s))
            self._first.setdefault((s, m[2]), place)
            self._removed.append(self._removed[-1] + place[1] - place[0])
            pieces.append(text[last : place[0]])
            last = place[1]
        self.plain = "".join([*pieces, text[last:]])

    def unmarked(self, position: int) -> int:
        """A position in the marked text, as a position in the text without sentinels."""
        return position - self._removed[bisect_left(self._sentinels, (position,))]

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

    def of(self, i: int) -> range:
        """The slots of message `i`."""
        return range(bisect_left(self._owners, i), bisect_right(self._owners, i))

    @cached_property
    def _owners(self) -> list[int]:
        return [slot.owner for slot in self.slots]  # in the messages' order

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
        n = bisect_left(self._owners, i)
        return max((end for end in map(self.end, range(n)) if end is not None), default=0)

    def next_message(self, i: int, position: int) -> int:
        """Where the first content behind `position` begins that is not message `i`'s; else the end of the text."""
        for _, _, s in self._sentinels[bisect_left(self._sentinels, (position,)) :]:
            start = self.start(s) if self.slots[s].owner != i else None
            if start is not None and start >= position:
                return start
        return len(self.text)
