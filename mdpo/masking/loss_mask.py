"""Pairs of messages → token ids and masks: which tokens the policy itself produced.

`mask[t] == 1` if and only if the policy samples token t at inference time in this trajectory, and what is before it in
its sequence is what it was given then: the text of an assistant message after the prompt, thoughts and tool calls
included, and the end-of-turn token that closes it. Every mask is verified against the rendered text.
"""

from collections.abc import Sequence
from typing import Any

from mdpo.errors import DropPair
from mdpo.masking.chat_template import ChatTemplate
from mdpo.masking.plain_texts import plain_sides
from mdpo.masking.sides import ENDS, RenderSettings, Side, completion_sides, recorded_sides, turn_sides
from mdpo.types import SIDES, Pair, TokenizedPair, distinct_tokens, split

__all__ = ["ENDS", "RenderSettings", "Side", "special_tokens_in_context", "tokenize_pair"]


def tokenize_pair(pair: Pair, template: ChatTemplate, settings: RenderSettings) -> TokenizedPair:
    """Ids and masks of both sides, cut to `max_length` where the settings say so.
    Raises DropPair with the reason when this pair cannot be trained on."""
    remarks, retokenized = list[str](), list[int]()
    if any(pair.recorded):
        sides, remarks, retokenized = recorded_sides(pair, template, settings)
    elif isinstance(pair.chosen, str):
        texts, remarks = plain_sides(pair, template, settings.mask_turns)
        sides = [Side(ids, mask, weights, [len(ids)]) for ids, mask, weights in texts]
    elif not settings.mask_turns:
        sides = completion_sides(pair, template)
    else:
        sides, remarks = turn_sides(pair, template, settings)
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
    pieces = [(new, old) for side, uncut in zip(sides, whole, strict=True) for new, old in _masks(side, uncut)]
    return TokenizedPair(
        **fields,
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
