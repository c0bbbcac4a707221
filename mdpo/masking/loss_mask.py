"""Pairs of messages → token ids and masks: which tokens the policy itself produced.

`mask[t] == 1` if and only if the policy samples token t at inference time in this trajectory: the text of an assistant
message after the prompt, tool calls included, and the end-of-turn token that closes it. Every mask is verified against
the rendered text before it leaves this module.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

from mdpo.errors import DropPair
from mdpo.masking.chat_template import ChatTemplate, Rendered
from mdpo.masking.plain_texts import plain_sides
from mdpo.masking.recorded import compared, recorded_fields, refuse_other_prompts, refuse_unknown_ids
from mdpo.masking.sentinels import NOT_DERIVABLE, numbered
from mdpo.masking.spans import APART, same_text, supervised, tokenize
from mdpo.types import SIDES, Message, Pair, TokenizedPair, common_prefix, distinct_tokens, split

NO_STOP = "end-of-turn missing"
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
    pair_weights: bool = True  # whether a row's `weight` is read; TRL has none

    @classmethod
    def of(cls, args) -> "RenderSettings":
        """From an MDPOConfig."""
        return cls(args.max_length, args.truncation_mode, args.mask_user_turns, pair_weights=not args.of_trl)


def tokenize_pair(pair: Pair, template: ChatTemplate, settings: RenderSettings) -> TokenizedPair:
    """Ids and masks of both sides, cut to `max_length` where the settings say so.
    Raises DropPair with the reason when this pair cannot be trained on."""
    remarks, retokenized = list[str](), list[int]()
    if any(pair.recorded):
        sides, remarks, retokenized = _recorded_sides(pair, template, settings)
    elif isinstance(pair.chosen, str):
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
    trained.remarks, trained.retokenized = list(dict.fromkeys(remarks)), retokenized
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
    if isinstance(pair.chosen, str) or pair.recorded[0]:
        return 0
    texts = (str(m.get("content") or "") for m in pair.chosen if m["role"] != "assistant")
    return sum(len(template.find_special(text)) for text in texts)


def _conversations(pair: Pair) -> tuple[list[Message], list[Message]]:
    return cast(tuple[list[Message], list[Message]], (pair.chosen, pair.rejected))  # no plain texts


def _recorded_sides(pair: Pair, template, settings: RenderSettings) -> tuple[list[Side], list[str], list[int]]:
    """Sides of which one at least is recorded, remarks, and of each recorded side that its messages are rendered
    otherwise than, how many tokens differ."""
    sides, remarks, retokenized = list[Side](), list[str](), list[int]()
    for name, own in zip(SIDES, pair.recorded, strict=True):
        if own is None:
            side, said = _rendered_side(pair, name, template)
            remarks += said
        else:
            refuse_unknown_ids(own, name, template.tokenizer)
            side = Side(*recorded_fields(own))
        if own is not None and own.compared:
            said, tokens = compared(own, partial(_rendered_side, pair, name, template), template.tokenizer)
            remarks, retokenized = remarks + said, retokenized + [tokens] * (tokens > 0)
        sides.append(side)
    if not settings.different_prompts:
        refuse_other_prompts(sides)
    return sides, remarks, retokenized


def _rendered_side(pair: Pair, name: str, template) -> tuple[Side, list[str]]:
    """The side of a pair that is not recorded, or the messages of one that is; and remarks. Raises DropPair."""
    if not template.tokenizer.chat_template:
        raise DropPair("no chat template")
    number, pair = SIDES.index(name), pair.side(name)
    text = template.render(_conversations(pair)[number], pair.tools, **pair.template_kwargs)
    encoded = tokenize(text, template.tokenizer)
    return _turn_side(_conversations(pair)[number], pair.weights[number], text, encoded, pair, template)


def _turn_sides(pair: Pair, template: ChatTemplate, settings: RenderSettings):
    """Both sides, and remarks."""
    both = _conversations(pair)
    pairs = [pair.side(name) for name in SIDES]
    texts = [template.render(m, of.tools, **pair.template_kwargs) for m, of in zip(both, pairs, strict=True)]
    encoded = [tokenize(text, template.tokenizer) for text in texts]
    longest = max(len(ids) for ids, _ in encoded)
    if settings.truncation_mode == "drop" and settings.max_length is not None and longest > settings.max_length:
        reason = DropPair("over-long")  # before its turns are located: long conversations are the most work
        reason.longest = longest
        raise reason
    rendered = zip(both, pair.weights, texts, encoded, pairs, strict=True)
    sides, remarks = zip(*(_turn_side(*side, template) for side in rendered), strict=True)
    return list(sides), [remark for of_side in remarks for remark in of_side]


def _turn_side(messages, turn_weights, text: str, encoded, pair: Pair, template: ChatTemplate) -> tuple[Side, list]:
    rendered = template.locate(messages, pair.n_prompt, pair.tools, text, **pair.template_kwargs)
    if not rendered.spans:
        raise DropPair("no assistant turn")
    spans = [(s.start, s.end) for s in rendered.spans]
    ids, ranges, mask, apart = supervised(text, spans, encoded, template.tokenizer)
    _verify(rendered, ids, ranges, template)
    stops = {span.stop for span in rendered.spans} - {""}
    stop_in_content = any(
        stop in (messages[span.message].get("content") or "") for span in rendered.spans for stop in stops
    )
    weights = [1.0] * len(ids)
    for span in rendered.spans if turn_weights else ():
        for t, (start, end) in enumerate(ranges):
            if span.start <= start and end <= span.end:
                weights[t] = turn_weights[span.message]
    return Side(ids, mask, weights, [len(ids)]), rendered.remarks + [APART] * apart + [ENDS] * stop_in_content


def _verify(rendered: Rendered, ids, ranges, template: ChatTemplate) -> None:
    """Each span's tokens decode to its text, the text is the message's own, and its last token is the end of turn."""
    for span in rendered.spans:
        span_ids = [t for t, (start, end) in zip(ids, ranges, strict=True) if span.start <= start and end <= span.end]
        expected = rendered.text[span.start : span.end]
        if not same_text(expected, span_ids, template.tokenizer):
            raise DropPair(f"{NOT_DERIVABLE}: {numbered(span.message)} has other tokens than its text")
        if span.stop and template.tokenizer.convert_ids_to_tokens(span_ids[-1]) != span.stop:
            raise DropPair(f"{NO_STOP}: {span.stop} behind {numbered(span.message)} is not read as one token")
        if not span.stop and rendered.text[span.end :].strip():
            raise DropPair(f"{NO_STOP}: nothing closes {numbered(span.message)}")


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
