"""Pairs of messages → token ids and masks: which tokens the policy itself produced.

`mask[t] == 1` if and only if the policy samples token t at inference time in this trajectory, and what is before it in
its sequence is what it was given then: the text of an assistant message after the prompt, thoughts and tool calls
included, and the end-of-turn token that closes it. Every mask is verified against the rendered text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from mdpo.errors import DropPair
from mdpo.masking.chat_template import ChatTemplate
from mdpo.masking.conversation import Conversation
from mdpo.masking.plain_texts import plain_sides
from mdpo.masking.sequences import NO_REASONING, RenderedSide, side_sequences
from mdpo.masking.spans import tokenize
from mdpo.types import SIDES, Message, Pair, TokenizedPair, common_prefix, distinct_tokens, split

ENDS = "end-of-turn tokens inside trained answers: take them out, the template writes one behind each"


@dataclass
class Side:
    """Sequences of one side: `ids`, `mask` and `weights` have them one behind the other, a number a token each, and
    `lengths` the tokens of each. `breaks` says why each sequence after the first one begins."""

    ids: list[int]
    mask: list[int]
    weights: list[float]
    lengths: list[int]
    breaks: list[str] = field(default_factory=list)

    @property
    def sequences(self) -> list[tuple[list[int], list[int], list[float]]]:
        return list(zip(*(split(x, self.lengths) for x in (self.ids, self.mask, self.weights)), strict=True))


@dataclass
class RenderSettings:
    """What decides ids and masks. With `mask_turns` False, TRL's rule: everything after the prompt is supervised."""

    max_length: int | None
    truncation_mode: str = "drop"  # drop: over-long pairs are dropped; keep_start: cut at the end, as TRL does
    mask_turns: bool = True
    template_kwargs: dict = field(default_factory=dict)
    different_prompts: bool = False  # also pairs whose sides have a prompt each
    turns_without_reasoning: str = "keep"  # where the generation prompt opens a think block: keep, mask, drop


def tokenize_pair(pair: Pair, template: ChatTemplate, settings: RenderSettings) -> TokenizedPair:
    """Ids and masks of both sides, cut to `max_length` where the settings say so.
    Raises DropPair with the reason when this pair cannot be trained on."""
    remarks: list[str] = []
    if isinstance(pair.chosen, str):
        texts, remarks = plain_sides(pair, template, settings.mask_turns)
        sides = [Side(ids, mask, weights, [len(ids)]) for ids, mask, weights in texts]
    elif not settings.mask_turns:
        sides = _completion_sides(pair, template)
    else:
        sides, remarks = _turn_sides(pair, template, settings)
    try:
        trained = _trained(sides, settings)
    except DropPair as reason:
        reason.longest = max(length for side in sides for length in side.lengths)
        raise
    trained.remarks = list(dict.fromkeys(remarks))
    return trained


def _trained(whole: list[Side], settings: RenderSettings) -> TokenizedPair:
    sides = _truncate(whole, settings)
    for side in sides:
        if not any(m and w for m, w in zip(side.mask, side.weights, strict=True)) and any(side.mask):
            raise DropPair("every turn of a side has weight 0")
    sides = [_without_unlearned(side) if 0 in side.weights else side for side in sides]
    fields: dict[str, Any] = {}
    for name, side in zip(SIDES, sides, strict=True):
        several = len(side.lengths) > 1
        fields |= {f"{name}_ids": side.ids, f"{name}_mask": side.mask}
        fields |= {f"{name}_weights": [] if set(side.weights) <= {1.0} else side.weights}
        fields |= {f"{name}_lengths": side.lengths if several else [], f"{name}_breaks": side.breaks}
    first = [list(zip(*side.sequences[0], strict=True)) for side in sides]
    pieces = [(new, old) for side, uncut in zip(sides, whole, strict=True) for new, old in _masks(side, uncut)]
    return TokenizedPair(
        **fields,
        shared_len=common_prefix(*first),
        distinct=distinct_tokens([ids for side in sides for ids, *_ in side.sequences]),
        longest=max(length for side in whole for length in side.lengths),
        cut=any(len(new) < len(old) and new[-1] and old[len(new)] for new, old in pieces),
    )


def _masks(side: Side, uncut: Side) -> zip:
    """The mask of each sequence, and what it was before the cut."""
    return zip(split(side.mask, side.lengths), split(uncut.mask, uncut.lengths), strict=True)


def _without_unlearned(side: Side) -> Side:
    """A turn of weight 0 is context: nothing of it is supervised."""
    mask = [m if w else 0 for m, w in zip(side.mask, side.weights, strict=True)]
    return Side(side.ids, mask, [w or 1.0 for w in side.weights], side.lengths, side.breaks)


def special_tokens_in_context(pair: Pair, template: ChatTemplate) -> int:
    """How many special tokens are written as text inside user, tool and system messages of the chosen side. They become
    real tokens, as at inference; they never move a boundary. Counted so that the report can say so."""
    if isinstance(pair.chosen, str):
        return 0
    texts = (str(m.get("content") or "") for m in pair.chosen if m["role"] != "assistant")
    return sum(len(template.find_special(text)) for text in texts)


def _conversations(pair: Pair) -> tuple[list[Message], list[Message]]:
    return cast(tuple[list[Message], list[Message]], (pair.chosen, pair.rejected))  # no plain texts


def _turn_sides(pair: Pair, template: ChatTemplate, settings: RenderSettings) -> tuple[list[Side], list[str]]:
    """Both sides, and remarks."""
    sides, remarks = [], []
    of_pair = pair.n_prompt, template, pair.tools, pair.template_kwargs
    conversations = [Conversation(messages, *of_pair) for messages in _conversations(pair)]
    _refuse_over_long(conversations, settings)
    for conversation, turn_weights in zip(conversations, pair.weights, strict=True):
        rendered = side_sequences(conversation)
        if NO_REASONING in rendered.remarks and settings.turns_without_reasoning == "drop":
            raise DropPair(NO_REASONING)
        sides.append(_side(rendered, turn_weights, settings))
        remarks += rendered.remarks + [ENDS] * _ends_inside(rendered, conversation)
    return sides, remarks


def _refuse_over_long(conversations: list[Conversation], settings: RenderSettings) -> None:
    """Before turns are located, which is the most work for long conversations."""
    if settings.truncation_mode != "drop" or settings.max_length is None:
        return
    # A character is a token at most, but for bytes.
    texts = [c.text for c in conversations]
    if max(len(text.encode()) for text in texts) <= settings.max_length:
        return
    longest = max(len(tokenize(text, conversations[0].template.tokenizer)[0]) for text in texts)
    if longest > settings.max_length:
        reason = DropPair("over-long")
        reason.longest = longest
        raise reason


def _side(rendered: RenderedSide, turn_weights: list[float], settings: RenderSettings) -> Side:
    side = Side([], [], [], [], [sequence.why for sequence in rendered.sequences[1:]])
    for sequence in rendered.sequences:
        weights = [1.0] * len(sequence.ids)
        for turn in sequence.turns:
            weight = turn_weights[turn.message] if turn_weights else 1.0
            if turn.opened and settings.turns_without_reasoning == "mask":
                weight = 0.0
            for t, (start, end) in enumerate(sequence.ranges) if weight != 1.0 else ():
                if turn.start <= start and end <= turn.end and sequence.mask[t]:
                    weights[t] = weight
        side.ids += sequence.ids
        side.mask += sequence.mask
        side.weights += weights
        side.lengths.append(len(sequence.ids))
    return side


def _ends_inside(rendered: RenderedSide, conversation: Conversation) -> bool:
    """Whether a trained answer has its end-of-turn token as text."""
    turns = [turn for sequence in rendered.sequences for turn in sequence.turns]
    stops = {turn.stop for turn in turns}
    contents = [conversation.messages[turn.message].get("content") or "" for turn in turns]
    return any(stop in content for content in contents for stop in stops)


def _completion_sides(pair: Pair, template: ChatTemplate) -> list[Side]:
    """TRL 1.16's rule for conversations: ids of the whole text as the template writes it; supervised is what comes
    after the common token prefix of the prompt (with its generation prompt) and both sides."""
    both = _conversations(pair)
    prompt = template.render(both[0][: pair.n_prompt], pair.tools, generation=True, **pair.template_kwargs)
    texts = [template.render(messages, pair.tools, **pair.template_kwargs) for messages in both]
    prompt_ids, *whole = (
        template.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in (prompt, *texts)
    )
    start = min(common_prefix(prompt_ids, ids) for ids in whole)
    return [Side(ids, [0] * start + [1] * (len(ids) - start), [1.0] * len(ids), [len(ids)]) for ids in whole]


def _truncate(sides: list[Side], settings: RenderSettings) -> list[Side]:
    """Drops or cuts over-long pairs, each sequence by itself. Ours never trains a side without a supervised token, nor
    two equal sides; TRL's rule (mask_turns False) only drops pairs whose prompt alone fills `max_length`."""
    limit = settings.max_length
    too_long = limit is not None and max(length for side in sides for length in side.lengths) > limit
    if too_long and settings.truncation_mode == "drop":
        raise DropPair("over-long")
    if limit is not None and too_long:
        masks = [mask for side in sides for mask in split(side.mask, side.lengths)]
        if settings.mask_turns and any(_last_turn(mask) >= limit for mask in masks):
            raise DropPair("last turn lost")
        sides = [_cut(side, limit) for side in sides]
    if any(sum(side.mask) == 0 for side in sides) and (settings.mask_turns or too_long):
        raise DropPair("last turn lost" if too_long else "no assistant turn")
    if settings.mask_turns and all(getattr(sides[0], x) == getattr(sides[1], x) for x in ("ids", "mask", "lengths")):
        raise DropPair("equal after truncation" if too_long else "chosen equals rejected")
    supervised_ids = [[t for t, m in zip(side.ids, side.mask, strict=True) if m] for side in sides]
    if settings.mask_turns and supervised_ids[0] == supervised_ids[1]:
        raise DropPair("diverges only in user or tool text")
    return sides


def _cut(side: Side, limit: int) -> Side:
    """The first `limit` tokens of each sequence."""
    parts = ([x[:limit] for x in sequence] for sequence in side.sequences)
    ids, masks, weights = zip(*parts, strict=True)
    lengths = [len(x) for x in ids]
    return Side(sum(ids, []), sum(masks, []), sum(weights, []), lengths, side.breaks)


def _last_turn(mask: Sequence[int]) -> int:
    """Index at which the last run of supervised tokens begins; 0 where there is none."""
    last = max((t for t, m in enumerate(mask) if m), default=0)
    return last - next((n for n in range(last + 1) if not mask[last - n]), last + 1) + 1 if any(mask) else 0
