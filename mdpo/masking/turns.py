"""One assistant turn of a conversation: what the model was given, what it sampled, and the token that it ended with.

No template is parsed and no token id is searched for. Texts are rendered as they are and with a unique sentinel before
and after every message's content. All positions come from the sentinels, so content can contain anything, role headers
and end-of-turn markers included, without moving a boundary.
"""

import re
from dataclasses import dataclass

from mdpo.errors import DropPair
from mdpo.masking.chat_template import ChatTemplate
from mdpo.masking.conversation import Conversation, Marked
from mdpo.masking.left_out import thoughts
from mdpo.masking.sentinels import NOT_DERIVABLE, Marks, numbered
from mdpo.masking.stops import EMPTY_THINK, THINK_PREFIX
from mdpo.masking.think_blocks import supplied, think_block, unsupplied_block
from mdpo.types import common_prefix

OPENING = re.compile(r"\s*<think>")


@dataclass
class Turn:
    """Message `message` in a rendered text: its characters [start, end) were sampled, the `stop` included; that is ""
    where the template writes none. `context` is what the model was given. `opened`: its generation prompt opens a
    think block, and the message has no thoughts to close it with. `unsupplied`: nor has it any where the template
    writes an empty block that the generation prompt has not. `missing`: what of that generation prompt the
    rendered text leaves out. `blocked`: of the block that the content closes as text, the rendered text has an empty
    one before it, or none that is open.
    `apart`: in the text as a whole a token would lie across its start."""

    message: int
    context: str
    start: int
    end: int
    stop: str
    opened: bool = False
    unsupplied: bool = False
    missing: str = ""
    blocked: bool = False
    apart: bool = False

    @property
    def lacks_reasoning(self) -> bool:
        """Whether `turns_without_reasoning` decides on it."""
        return self.opened or self.unsupplied


def locate(rendered: Marked, prompt: Marked, i: int, conversation: Conversation, thoughtless: bool) -> Turn:
    """Message `i` in a text that ends with it, or goes on behind it. `thoughtless`: the message has no thoughts.
    Raises DropPair where its edges cannot be derived.

    Example (Qwen3, last turn): the text continues with `<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\nHi`, the
    generation prompt is `<|im_start|>assistant\\n`, or with enable_thinking=False everything before `Hi`. An empty
    think block that the template writes of a turn without thoughts is context either way.
    """
    marks, template, header = rendered.marks, conversation.template, conversation.template.header
    anchor, opening = rendered.behind(i), marks.opening(i)
    tail, supply = marks.plain[anchor:], prompt.text[prompt.behind(i) :]
    ahead = 0 if opening is None else marks.unmarked(opening) - anchor
    if opening is None:
        marks.end_of(i)  # raises, and says what is missing
    n, missing = supplied(tail, supply, ahead)
    if n is None:
        raise DropPair(f"{NOT_DERIVABLE}: the header of {numbered(i)} is not its generation prompt's")
    # What is missing may also be a header, of an answer right behind another one.
    opens = bool(missing.strip()) and "</" not in missing and not (header and header.strip() in missing)
    content = conversation.messages[i].get("content") or ""
    closes = "</think>" in content
    begin, opened = n, thoughtless and opens and not closes
    own = opening is not None and n >= ahead  # the policy's own words begin here
    # A header is supplied after tool output too, where the template prompts for none.
    if not own and header not in tail[:n] and tail.startswith(header, n):
        n += len(header)
    written = EMPTY_THINK.match(tail, n) is not None
    block, closing, prefix = think_block(tail, n, template.empty_block)
    doubled = closing and (not thoughtless or tail.startswith(content.strip(), block))
    blocked = closes and (opens or doubled)
    # A thought that is cut off begins with what opens it: of the empty block before it the policy saw nothing.
    cut_off = not closes and content.lstrip().startswith("<think>")
    if blocked:
        missing = prefix or missing
    elif not closes and not cut_off:  # else a block is the policy's
        n, opened = block, opened or (thoughtless and closing)
    context = prompt.text.removesuffix(supply) + tail[:n] if opened else prompt.text + tail[begin:n]
    if cut_off:
        n = block
        if supply.rstrip().endswith("<think>") and (again := OPENING.match(tail, block)):  # that was supplied
            n = again.end() + (supply.endswith("\n") and tail.startswith("\n", again.end()))
    end, stop = _end(rendered, i, conversation)
    unsupplied = thoughtless and not (closes or cut_off or opened or THINK_PREFIX.search(supply))
    unsupplied = unsupplied and (written or unsupplied_block(conversation))  # here, or where a turn is the last one
    return Turn(i, context, anchor + n, end, stop, opened, unsupplied, missing, blocked)


def _end(rendered: Marked, i: int, conversation: Conversation) -> tuple[int, str]:
    """Where message `i` ends: behind the first end-of-turn token after its last content. Between that content and
    the next message's content is only the template's own text.

    Turns that none of the usual tokens closes (`<|eom_id|>`, `<|call|>` after tool calls) end with the last special
    token that the template writes whether or not a message follows, or else with the first one. A last turn may
    have none at all.
    """
    marks, template = rendered.marks, conversation.template
    last, is_last = marks.end_of(i), i == len(rendered.messages) - 1
    tail = marks.text[last : marks.next_message(i, last)]
    closers = [(tail.find(s), s) for s in template.stops if s in tail]
    if not closers and (specials := list(template.special.finditer(tail))):
        alone = marks if is_last else Marks(conversation.render(rendered.messages[: i + 1]), rendered.marker)
        n = common_prefix([m.group() for m in specials], template.find_special(alone.text[alone.end_of(i) :]))
        closer = specials[max(n - 1, 0)]
        closers = [(closer.start(), closer.group())]
    if not closers:
        closing = tail.rstrip() if is_last and rendered.messages[i].get("tool_calls") else ""
        return marks.unmarked(last + len(closing)), ""
    position, stop = min(closers)
    return marks.unmarked(last + position + len(stop)), stop


def closing(i: int, conversation: Conversation) -> tuple[str, str]:
    """(text, stop) of a turn that the template closes only when a message follows, as by the next role's token of
    GLM-4: what is behind its last content up to and with the stop. That of message `i` with the message behind it, else
    with one made up; ("", "") where there is none."""
    messages, calls = conversation.messages, conversation.messages[i].get("tool_calls")
    following = [m for m in messages[i + 1 : i + 2] if m["role"] != "assistant"]  # no header ends a turn at inference
    if not following:
        following = [{"role": "tool", "content": "Qz", "tool_call_id": c.get("id"), "name": c["function"]["name"]}
                     for c in calls or ()] or [{"role": "user", "content": "Qz"}]  # fmt: skip
    both = [*messages[: i + 1], *following]
    try:
        rendered = conversation.mark(both, conversation.render(both))
        end, stop = _end(rendered, i, conversation)
    except DropPair:
        return "", ""
    return rendered.text[rendered.content_end(i) : end] if stop else "", stop


def last_stop(template: ChatTemplate, calls: bool) -> str | None:
    """The stop of a turn, with calls or without, that nothing follows: "" where the template writes none, None where it
    cannot be told. Found once."""
    if calls not in template.last_stops:
        call = {"id": "Qz0000001", "type": "function", "function": {"name": "Qz1", "arguments": {"Qz": "Qz2"}}}
        turn = (
            {"role": "assistant", "content": "", "tool_calls": [call]}
            if calls
            else {"role": "assistant", "content": "Qz3"}
        )
        probe = Conversation([{"role": "user", "content": "Qz4"}, turn], 1, template)
        try:
            template.last_stops[calls] = _end(probe.whole, 1, probe)[1]
        except DropPair:
            template.last_stops[calls] = None
    return template.last_stops[calls]


def sampling_stops(template: ChatTemplate) -> set[str]:
    """The tokens at which sampling ends a turn: those that close a last turn, without calls and with them, and the
    tokenizer's own. Others of `template.stops` close turns in history alone; of gpt-oss `<|end|>` closes thoughts,
    behind which a turn goes on."""
    last = last_stop(template, calls=False)
    known = {last, last_stop(template, calls=True), template.tokenizer.eos_token}
    return known - {None, ""} if last else template.stops


def as_last(turn: Turn, conversation: Conversation) -> bool:
    """Whether a turn that others follow is written as it was as the last one: stop and white space alike."""
    i = turn.message
    message = conversation.messages[i]
    stop = last_stop(conversation.template, bool(message.get("tool_calls")))
    if stop not in ("", turn.stop) or (not stop and conversation.messages[i + 1]["role"] == "assistant"):
        return False
    content = message.get("content") or ""
    if content == content.strip() or edges_alike(conversation.template):
        return True
    alone = conversation.up_to(i)
    own = locate(alone, conversation.prompt(i), i, conversation, thoughtless=not thoughts(message))
    return _words(own, alone.text) == _words(turn, conversation.text)


def edges_alike(template: ChatTemplate) -> bool:
    """Whether white space at the edges of an answer is written alike whether or not a message follows; False where it
    cannot be told. Found once."""
    if template.edges_alike is None:
        turns = [{"role": r, "content": c} for r, c in (("user", "Qz4"), ("assistant", "\n Qz3 \n"), ("user", "Qz5"))]
        try:
            sides = [Conversation(turns[:n], 1, template) for n in (2, 3)]
            both = [_words(locate(s.whole, s.prompt(1), 1, s, thoughtless=True), s.text) for s in sides]
            template.edges_alike = both[0] == both[1]
        except DropPair:
            template.edges_alike = False
    return template.edges_alike


def _words(turn: Turn, text: str) -> str:
    """What was sampled before the stop."""
    return text[turn.start : turn.end].removesuffix(turn.stop)
