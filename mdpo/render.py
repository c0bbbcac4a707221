"""Pairs of messages → token ids and masks: which tokens the policy itself produced.

`mask[t] == 1` if and only if the policy samples token t at inference time in this trajectory: the text of an assistant
message after the prompt, tool calls included, and the end-of-turn token that closes it. Every mask is verified against
the rendered text before it leaves this module.
"""

from dataclasses import dataclass, field
from functools import lru_cache

from tokenizers import Tokenizer, processors

from mdpo.template import NOT_DERIVABLE, ChatTemplate, Rendered
from mdpo.types import DropPair, Pair, TokenizedPair, UserError, common_prefix

STRADDLE = "a token straddles a turn's boundary"
Side = tuple[list[int], list[int], list[float]]  # ids, mask, weights: a number a token each


@dataclass
class RenderSettings:
    """What decides ids and masks. With `mask_turns` False, TRL's rule: everything after the prompt is supervised."""

    max_length: int | None
    truncation_mode: str = "drop"  # drop: over-long pairs are dropped; keep_start: cut at the end, as TRL does
    mask_turns: bool = True
    template_kwargs: dict = field(default_factory=dict)
    different_prompts: bool = False  # also pairs whose sides have a prompt each


def tokenize_pair(pair: Pair, template: ChatTemplate, settings: RenderSettings) -> TokenizedPair:
    """Ids and masks of both sides, cut to `max_length` where the settings say so.
    Raises DropPair with the reason when this pair cannot be trained on."""
    if isinstance(pair.chosen, str) or not settings.mask_turns:
        sides = _completion_sides(pair, template)
    else:
        sides = _turn_sides(pair, template, settings)
    try:
        return _trained(sides, settings)
    except DropPair as reason:
        reason.longest = max(len(ids) for ids, *_ in sides)
        raise


def _trained(whole: list[Side], settings: RenderSettings) -> TokenizedPair:
    sides = _truncate(whole, settings)
    for _, mask, weights in sides:
        if not any(m and w for m, w in zip(mask, weights, strict=True)) and any(mask):
            raise DropPair("every turn of a side has weight 0")
    shared = common_prefix(*(list(zip(*side, strict=True)) for side in sides))
    (chosen_ids, chosen_mask, *_), (rejected_ids, rejected_mask, *_) = sides
    weights = ([] if set(weights) <= {1.0} else weights for *_, weights in sides)
    longest = max(len(ids) for ids, *_ in whole)
    masks = [(mask, uncut) for (_, mask, _), (_, uncut, _) in zip(sides, whole, strict=True)]
    cut = any(len(mask) < len(uncut) and mask[-1] and uncut[len(mask)] for mask, uncut in masks)
    return TokenizedPair(chosen_ids, chosen_mask, rejected_ids, rejected_mask, shared, *weights, longest, cut)


def special_tokens_in_context(pair: Pair, template: ChatTemplate) -> int:
    """How many special tokens stand as text inside user, tool and system messages of the chosen side. They become
    real tokens, as at inference; they never move a boundary. Counted so that the report can say so."""
    if isinstance(pair.chosen, str):
        return 0
    texts = (str(m.get("content") or "") for m in pair.chosen if m["role"] != "assistant")
    return sum(len(template.find_special(text)) for text in texts)


def _turn_sides(pair: Pair, template: ChatTemplate, settings: RenderSettings) -> list[Side]:
    both = (pair.chosen, pair.rejected)
    texts = [template.render(messages, pair.tools, **pair.template_kwargs) for messages in both]
    encoded = [tokenize(text, template.tokenizer) for text in texts]
    longest = max(len(ids) for ids, _ in encoded)
    if settings.truncation_mode == "drop" and settings.max_length is not None and longest > settings.max_length:
        reason = DropPair("over-long")  # before its turns are located: long conversations are the most work
        reason.longest = longest
        raise reason
    given = zip(both, pair.weights, texts, encoded, strict=True)
    return [_turn_side(*side, pair, template) for side in given]


def _turn_side(messages, turn_weights, text: str, encoded, pair: Pair, template: ChatTemplate) -> Side:
    rendered = template.locate(messages, pair.n_prompt, pair.tools, text, **pair.template_kwargs)
    if not rendered.spans:
        raise DropPair("no assistant turn")
    ids, ranges = encoded
    mask = span_mask(ranges, [(s.start, s.end) for s in rendered.spans])
    _verify(rendered, ids, ranges, template)
    weights = [1.0] * len(ids)
    for span in rendered.spans if turn_weights else ():
        for t, (start, end) in enumerate(ranges):
            if span.start <= start and end <= span.end:
                weights[t] = turn_weights[span.message]
    return ids, mask, weights


def refuse_slow(tokenizer) -> None:
    if not getattr(tokenizer, "is_fast", False):  # mistral-common's class does not know the word
        raise UserError(f"The tokenizer is a {type(tokenizer).__name__}, not a fast one: it cannot report positions.")


def tokenize(text: str, tokenizer) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of a rendered text and the characters [start, end) behind each token.

    Tokens tile the text: characters between two reported ranges belong to the later token.
    """
    refuse_slow(tokenizer)
    encoded = _untrimmed(tokenizer).encode(text, add_special_tokens=False)
    ranges, previous = [], 0
    for start, end in encoded.offsets:
        start = min(start, previous) if end > previous else start
        ranges.append((start, end))
        previous = max(previous, end)
    return encoded.ids, ranges


@lru_cache(maxsize=8)
def _untrimmed(tokenizer) -> Tokenizer:
    """The tokenizer's own engine, but reporting ranges with their white space: GPT-2's post-processor cuts it off."""
    engine = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    engine.no_truncation()
    engine.no_padding()
    engine.post_processor = processors.ByteLevel(trim_offsets=False)
    return engine


def span_mask(ranges: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[int]:
    """1 where a token lies inside a span; DropPair where one lies half inside.

    Example: ranges [(0, 4), (4, 6), (6, 9)] with the span (4, 9) -> [0, 1, 1].
    Both tokens of a character that is split in two carry that character's range.
    """
    mask, k = [], 0
    for start, end in ranges:
        while k < len(spans) and start >= spans[k][1]:
            k += 1
        a, b = spans[k] if k < len(spans) else (10**18, 10**18)
        if start >= a and end <= b:
            mask.append(1)
        elif end > a:
            raise DropPair(STRADDLE)
        else:
            mask.append(0)
    return mask


def _verify(rendered: Rendered, ids, ranges, template: ChatTemplate) -> None:
    """Each span's tokens decode to its text, the text is the message's own, and its last token is the end of turn."""
    for span in rendered.spans:
        inside = [t for t, (start, end) in zip(ids, ranges, strict=True) if span.start <= start and end <= span.end]
        expected = rendered.text[span.start : span.end]
        if not _same_text(expected, inside, template.tokenizer):
            raise DropPair(NOT_DERIVABLE)
        if span.stop and template.tokenizer.convert_ids_to_tokens(inside[-1]) != span.stop:
            raise DropPair("end-of-turn missing")
        if not span.stop and rendered.text[span.end :].strip():
            raise DropPair("end-of-turn missing")


def _same_text(expected: str, ids: list[int], tokenizer) -> bool:
    """Whether ids decode to the text, white space aside (Metaspace tokenizers lose a leading space). A tokenizer that
    rewrites text (NFKC, lower case) is asked what it makes of the expected text alone."""

    def squeeze(text):
        return "".join(text.split())

    def decode(tokens):
        return squeeze(tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    decoded = decode(ids)
    return decoded == squeeze(expected) or decoded == decode(tokenizer(expected, add_special_tokens=False)["input_ids"])


def _completion_sides(pair: Pair, template: ChatTemplate) -> list[Side]:
    """TRL 1.16's rule: ids of the whole text; supervised is what comes after the common token prefix of the prompt
    (with its generation prompt) and both sides. Plain strings end with EOS, conversations as their template writes."""
    tokenizer, n = template.tokenizer, pair.n_prompt

    def encode(text):
        return tokenizer(text, add_special_tokens=isinstance(pair.chosen, str), verbose=False)["input_ids"]

    if isinstance(pair.chosen, str):
        eos = tokenizer.eos_token
        if not eos:
            raise UserError("Plain texts end with the end-of-sequence token, and the tokenizer has none.")
        prompt, sides = pair.chosen[:n], [s if s.endswith(eos) else s + eos for s in (pair.chosen, pair.rejected)]
    else:
        prompt = template.render(pair.chosen[:n], pair.tools, generation=True, **pair.template_kwargs)
        sides = [template.render(side, pair.tools, **pair.template_kwargs) for side in (pair.chosen, pair.rejected)]
    prompt_ids, sides = encode(prompt), [encode(side) for side in sides]
    start = min(common_prefix(prompt_ids, ids) for ids in sides)
    return [(ids, [0] * start + [1] * (len(ids) - start), [1.0] * len(ids)) for ids in sides]


def _truncate(sides: list[Side], settings: RenderSettings) -> list[Side]:
    """Drops or cuts over-long pairs. Ours never trains a side without a supervised token, nor two equal sides;
    TRL's rule (mask_turns False) only drops pairs whose prompt alone fills `max_length`."""
    limit = settings.max_length
    too_long = limit is not None and max(len(ids) for ids, *_ in sides) > limit
    if too_long and settings.truncation_mode == "drop":
        raise DropPair("over-long")
    if too_long:
        if settings.mask_turns and any(_last_turn(mask) >= limit for _, mask, _ in sides):
            raise DropPair("last turn lost")
        sides = [tuple(part[:limit] for part in side) for side in sides]
    if any(sum(mask) == 0 for _, mask, _ in sides) and (settings.mask_turns or too_long):
        raise DropPair("last turn lost" if too_long else "no assistant turn")
    if settings.mask_turns and sides[0][:2] == sides[1][:2]:
        raise DropPair("equal after truncation" if too_long else "chosen equals rejected")
    said = [[t for t, m in zip(ids, mask, strict=True) if m] for ids, mask, _ in sides]
    if settings.mask_turns and said[0] == said[1]:
        raise DropPair("diverges only in user or tool text")
    return sides


def _last_turn(mask: list[int]) -> int:
    """Index at which the last run of supervised tokens begins; 0 where there is none."""
    last = max((t for t, m in enumerate(mask) if m), default=0)
    return last - next((n for n in range(last + 1) if not mask[last - n]), last + 1) + 1 if any(mask) else 0
