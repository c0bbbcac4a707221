"""A side's messages → its sequences: texts as the model saw them, and in each the turns that it sampled.

Turn k is the prompt of message k, the messages before it with the generation prompt, and behind it what the model
sampled, tokenized apart, with the token that ends a turn. Turns are one sequence as long as the next prompt's ids begin
with all ids so far; where they do not, because a template takes earlier thoughts out, moves the system message or ends
a turn in the history otherwise, a new sequence begins. Where one rendered text holds every turn in its context
(`in_one_text`), that is the only sequence; `by_turns` is the same without that shortcut, but for an empty think block
that a template writes of a last turn only: there each turn is the last one.
"""

from bisect import bisect_left, bisect_right
from contextlib import suppress
from dataclasses import dataclass, field, replace

from mdpo.errors import DropPair
from mdpo.masking.breaks import why
from mdpo.masking.conversation import Conversation, Marked
from mdpo.masking.left_out import lost, remarks_of, thoughts, unread, unwritten_field, written
from mdpo.masking.sentinels import LEFT_OUT, NOT_DERIVABLE, numbered
from mdpo.masking.spans import PromptTokens, Range, mask_of, same_text, tokenize
from mdpo.masking.think_blocks import REST_OF_EMPTY_THINK
from mdpo.masking.turns import Turn, as_last, closing, locate

NO_STOP = "end-of-turn missing"
APART = "a turn tokenized apart from its header"
NO_REASONING = "turns without reasoning whose generation prompt opens a think block (turns_without_reasoning)"
UNSUPPLIED = (
    "turns without reasoning whose empty think block the generation prompt does not supply (chat_template_kwargs: "
    "{enable_thinking: false} of the recipe or the row may; else turns_without_reasoning: mask or drop)"
)
CLOSED = "thoughts of a turn whose generation prompt leaves no room for any"


@dataclass
class RenderedSequence:
    """A text of N tokens, `ids`, and the characters [start, end) behind each; `mask` is 1 where the policy sampled the
    token. `turns` are those in it, `contents` (start, end, message) of the messages' own text, `why` it begins, "" for
    a side's first one."""

    text: str
    ids: list[int]
    ranges: list[Range]
    mask: list[int]
    contents: list[tuple[int, int, int]]
    why: str = ""
    turns: list[Turn] = field(default_factory=list)

    def tokens_of(self, turn: Turn) -> range:
        """The tokens whose characters are a turn's."""
        begin = bisect_left(self.ranges, turn.start, key=lambda place: place[0])
        return range(begin, bisect_right(self.ranges, turn.end, key=lambda place: place[1]))


@dataclass
class RenderedSide:
    sequences: list[RenderedSequence]
    remarks: list[str] = field(default_factory=list)


def side_sequences(conversation: Conversation) -> RenderedSide:
    """Raises DropPair where the template refuses the conversation, leaves content out, or a turn cannot be found."""
    if not conversation.trained:
        raise DropPair("no assistant turn")
    conversation.text  # noqa: B018  what the template refuses as a whole is refused
    try:
        one = in_one_text(conversation)
    except DropPair:
        one = None
    sequences = by_turns(conversation) if one is None else [one]
    seen = conversation.prompt(conversation.trained[-1]) if one is None else conversation.whole
    remarks = remarks_of(conversation, seen.marks)
    turns = [turn for sequence in sequences for turn in sequence.turns]
    return RenderedSide(sequences, remarks + [APART] * any(turn.apart for turn in turns))


def in_one_text(conversation: Conversation) -> RenderedSequence | None:
    """The whole conversation as the template writes it, if that holds each turn in the context in which it was sampled,
    with all that the policy wrote; else None."""
    whole, tokenizer = conversation.whole, conversation.template.tokenizer
    _refuse_losses(whole)
    turns, text, last = [], whole.text, len(conversation.messages) - 1
    for i in conversation.trained:
        own = thoughts(conversation.messages[i])
        turn = locate(whole, conversation.prompt_of_whole(i), i, conversation, thoughtless=not own)
        if text[: turn.start] != turn.context or turn.blocked or lost(own, i, whole, conversation):
            return None
        if (
            "</think>" in (conversation.messages[i].get("content") or "")
            and "</think>" not in text[turn.start : turn.end]
        ):
            return None  # an empty block, which history leaves out
        if i < last and not as_last(turn, conversation):
            return None
        if i == last and not turn.stop:
            text, turn = _closed(turn, whole, conversation)
        turns.append(turn)
    _refuse_overlap(turns, whole, conversation)
    ids, ranges = tokenize(text, tokenizer)
    try:
        ranges, mask = mask_of(text, ids, ranges, [(turn.start, turn.end) for turn in turns], tokenizer)
    except DropPair:
        return None
    sequence = RenderedSequence(text, ids, ranges, mask, whole.marks.contents(), turns=turns)
    _verify(sequence, turns, conversation)
    return sequence


def by_turns(conversation: Conversation) -> list[RenderedSequence]:
    """Each turn in its own context; the reference implementation of `in_one_text`."""
    tokenizer, sequences = conversation.template.tokenizer, list[RenderedSequence]()
    tokens = PromptTokens(tokenizer)
    for i in conversation.trained:
        prompt = conversation.prompt(i)
        _refuse_losses(prompt)
        turn, sampled = _sampled(i, prompt, conversation)
        start, text = len(turn.context), turn.context + sampled
        ids, ranges, mask, apart = _tokenized(turn.context, text, tokens, tokenizer)
        turn = replace(turn, start=start, end=len(text), apart=apart)
        before = sequences[-1] if sequences else None
        sequence = RenderedSequence(text, ids, ranges, mask, prompt.marks.contents(), turns=[turn])
        _verify(sequence, [turn], conversation)
        if before and ids[: len(before.ids)] == before.ids:
            sequence.mask[: len(before.ids)] = before.mask
            sequence.turns = [*before.turns, turn]
            sequence.why = before.why
            sequences[-1] = sequence
        else:
            sequence.why = why(before, prompt, conversation) if before else ""
            sequences.append(sequence)
    return sequences


def _tokenized(context: str, text: str, tokens: PromptTokens, tokenizer) -> tuple:
    """(ids, ranges, mask, whether tokenized apart) of a text that was sampled behind `context`: apart from it, unless
    the text as a whole has the context's own tokens and an edge between two where that ends."""
    given, places = tokens.of(context)
    ids, ranges = tokens.of(text)
    if ids[: len(given)] == given:
        n = max(len(given) - 1, 0)  # none before the context's last token reaches over its end
        with suppress(DropPair):
            tail, mask = mask_of(text, ids[n:], ranges[n:], [(len(context), len(text))], tokenizer)
            return ids, [*ranges[:n], *tail], [0] * n + mask, False
    more, behind = tokenize(text[len(context) :], tokenizer, goes_on=True)
    moved = ((a + len(context), b + len(context)) for a, b in behind)
    return [*given, *more], [*places, *moved], [0] * len(given) + [1] * len(more), True


def _sampled(i: int, prompt: Marked, conversation: Conversation) -> tuple[Turn, str]:
    """Turn `i` and its text as sampled, from the text that ends with it. What the template leaves out of it is taken
    from `content`, where it is text; else the pair is dropped."""
    message, own = conversation.messages[i], thoughts(conversation.messages[i])
    rendered = conversation.up_to(i)
    turn = locate(rendered, prompt, i, conversation, thoughtless=not own)
    _refuse_overlap([turn], rendered, conversation)
    text, turn = (rendered.text, turn) if turn.stop else _closed(turn, rendered, conversation)
    sampled = text[turn.start : turn.end]
    if own and "</" in turn.missing:
        raise DropPair(f"{CLOSED} ({numbered(i)}); chat_template_kwargs may: {{enable_thinking: true}}")
    if turn.blocked or not written(own, i, rendered.marks):
        if name := unwritten_field(message, i, rendered.marks):
            if not unread(conversation.template):
                raise DropPair(f"{LEFT_OUT}: {name} ({numbered(i)}); another chat_template may write it")
        else:
            sampled = _with_thoughts(message["content"], sampled, turn, rendered, i)
    return turn, sampled


def _with_thoughts(content: str, sampled: str, turn: Turn, rendered: Marked, i: int) -> str:
    """The thoughts that `content` begins with, less what the generation prompt supplies of them, and behind them what
    the template writes of the rest."""
    visible = content.rpartition("</think>")[2]
    head = content[: len(content) - len(visible.lstrip())]
    supplied = turn.missing
    if head.startswith(supplied):
        head = head.removeprefix(supplied)
    elif supplied.strip() and head.lstrip().startswith(supplied.strip()):
        head = head.lstrip().removeprefix(supplied.strip())
    rest = sampled.partition("</think>")[2] if REST_OF_EMPTY_THINK.match(sampled) else sampled
    before, as_it_is, behind = rest.partition(content.strip())
    if as_it_is and before.strip():  # behind the calls
        return sampled
    if visible.strip():
        opening = rendered.marks.opening(i)
        return head + sampled[0 if opening is None else max(rendered.marks.unmarked(opening) - turn.start, 0) :]
    # Before calls, the content is written as it is, behind an empty block or without one; or left out, or the block is.
    return head.rstrip() + behind if as_it_is else head + sampled if rest == sampled else head.rstrip() + rest


def _closed(turn: Turn, rendered: Marked, conversation: Conversation) -> tuple[str, Turn]:
    """The text up to a turn that the template writes no end of, and the token that ends it at inference; the turn."""
    written_end, stop = closing(turn.message, conversation)
    if not stop:
        raise DropPair(f"{NO_STOP}: nothing closes {numbered(turn.message)}")
    text = rendered.text[: rendered.content_end(turn.message)] + written_end
    return text, replace(turn, end=len(text), stop=stop)


def _refuse_losses(rendered: Marked) -> None:
    """Raises DropPair where a template leaves user, tool or system text out, or has an assistant's text behind the
    message that follows it: then what the policy wrote, and where, cannot be told from the messages."""
    messages, marks = rendered.messages, rendered.marks
    marks.ranges([i for i, m in enumerate(messages) if m["role"] != "assistant"])
    for i, message in enumerate(messages[:-1]):
        following = marks.opening(i + 1)
        ends = [marks.end(s) or 0 for s in marks.of(i)] if message["role"] == "assistant" else []
        if following is not None and max(ends, default=0) > following:
            raise DropPair(f"{NOT_DERIVABLE}: the text of {numbered(i)} stands behind {numbered(i + 1)}")


def _refuse_overlap(turns: list[Turn], rendered: Marked, conversation: Conversation) -> None:
    foreign = [(a, b) for a, b, i in rendered.marks.contents() if conversation.messages[i]["role"] != "assistant"]
    for turn in turns:
        if turn.start >= turn.end or any(a < turn.end and turn.start < b for a, b in foreign):
            raise DropPair(f"{NOT_DERIVABLE}: where {numbered(turn.message)} begins and ends")


def _verify(sequence: RenderedSequence, turns: list[Turn], conversation: Conversation) -> None:
    """Each turn's tokens decode to its text, and the last one is the end of turn."""
    tokenizer = conversation.template.tokenizer
    for turn in turns:
        span_ids = [sequence.ids[t] for t in sequence.tokens_of(turn) if sequence.mask[t]]
        expected = sequence.text[turn.start : turn.end]
        if not span_ids or not same_text(expected, span_ids, tokenizer):
            raise DropPair(f"{NOT_DERIVABLE}: {numbered(turn.message)} has other tokens than its text")
        if turn.stop and tokenizer.convert_ids_to_tokens(span_ids[-1]) != turn.stop:
            raise DropPair(f"{NO_STOP}: {turn.stop} behind {numbered(turn.message)} is not read as one token")
        if not turn.stop:
            raise DropPair(f"{NO_STOP}: nothing closes {numbered(turn.message)}")
