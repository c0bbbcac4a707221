"""A rendered text and the characters that the policy sampled in it → token ids and which of them are supervised."""

import json
from bisect import bisect_left
from functools import lru_cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors

from mdpo.errors import DropPair, UserError
from mdpo.sequences import common_prefix

STRADDLE = "a token straddles a turn's boundary"
Range = tuple[int, int]  # characters [start, end)


def refuse_slow(tokenizer) -> None:
    if not getattr(tokenizer, "is_fast", False):  # mistral-common's class does not know the word
        raise UserError(f"The tokenizer is a {type(tokenizer).__name__}, not a fast one: it cannot report positions.")


def tokenize(text: str, tokenizer, goes_on: bool = False) -> tuple[list[int], list[Range]]:
    """Ids of a rendered text and the characters [start, end) behind each token. With `goes_on` the text continues
    tokens before it: no space is put before its first word.

    Tokens tile the text: characters between two reported ranges belong to the later token.
    """
    refuse_slow(tokenizer)
    engine = _continuing(tokenizer) if goes_on else _untrimmed(tokenizer)
    encoded = engine.encode(text, add_special_tokens=False)
    ranges, previous = [], 0
    for start, end in encoded.offsets:
        start = min(start, previous) if end > previous else start
        ranges.append((start, end))
        previous = max(previous, end)
    return encoded.ids, ranges


def token_ids(text: str, tokenizer) -> list[int]:
    """The ids that `tokenize` gives, in two thirds of the time; other threads run meanwhile, as of the engine's methods
    those for batches alone let go of the interpreter."""
    refuse_slow(tokenizer)
    return _untrimmed(tokenizer).encode_batch_fast([text], add_special_tokens=False)[0].ids


@lru_cache(maxsize=8)
def _untrimmed(tokenizer) -> Tokenizer:
    """The tokenizer's own engine, but reporting ranges with their white space: GPT-2's post-processor cuts it off."""
    return _engine(tokenizer.backend_tokenizer.to_str())


@lru_cache(maxsize=8)
def _continuing(tokenizer) -> Tokenizer:
    """As `_untrimmed`, but no space goes before the first word, as Metaspace, Llama's normalizer and ByteLevel do."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for part in ("normalizer", "pre_tokenizer"):
        state[part] = _without_space(state[part])
    return _engine(json.dumps(state))


def _engine(state: str) -> Tokenizer:
    engine = Tokenizer.from_str(state)
    engine.no_truncation()
    engine.no_padding()
    engine.post_processor = processors.ByteLevel(trim_offsets=False)
    return engine


def _without_space(part: Any) -> Any:
    if not part or part["type"] == "Prepend":
        return None
    switches: dict[str, dict[str, Any]] = {
        "Metaspace": {"prepend_scheme": "never"},
        "ByteLevel": {"add_prefix_space": False},
    }
    switch = switches.get(part["type"], {})
    nested = {
        name: [inner for p in part[name] if (inner := _without_space(p))]
        for name in ("normalizers", "pretokenizers")
        if name in part
    }
    return {**part, **(switch if set(switch) <= set(part) else {}), **nested}


def mask_of(text: str, ids: list[int], ranges: list[Range], spans: list[Range], tokenizer):
    """(ranges, mask) of a text with the characters `spans` sampled; DropPair where a token lies across an edge of one.

    An added token at a span's end that takes the white space behind it (`rstrip`) is sampled whole: its range then
    ends with the span."""
    try:
        return ranges, span_mask(ranges, spans)
    except DropPair:
        ranges = list(ranges)
    stripping, ends = {i: token for i, token in _added(tokenizer).items() if token.rstrip}, {end for _, end in spans}
    for t in [t for t, i in enumerate(ids) if i in stripping]:
        own = _own(text, ranges[t], stripping[ids[t]])
        if own[1] < ranges[t][1] and own[1] in ends:
            ranges[t] = (ranges[t][0], own[1])
    return ranges, span_mask(ranges, spans)


class PromptTokens:
    """Token ids of texts that mostly continue each other, as `tokenize` gives them, in time linear in what is new: no
    merge goes across an added token, so that what is before the last one that two texts share stays as it is.

    The first CHECKED texts are tokenized as a whole too; where that gives others, so are all that follow."""

    checked = 0
    CHECKED = 50

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self._text, self._ids, self._ranges = "", [], []
        added = _added(tokenizer).items()
        self._bounds = {i: t.content for i, t in added if t.special and not (t.lstrip or t.rstrip or t.single_word)}
        self._whole = False

    def of(self, text: str) -> tuple[list[int], list[Range]]:
        same = 0 if self._whole else common_prefix(self._text, text)
        keep, begin = self._shared(text, same)
        ids, ranges = tokenize(text[begin:], self.tokenizer)
        ids, ranges = [*self._ids[:keep], *ids], [*self._ranges[:keep], *((a + begin, b + begin) for a, b in ranges)]
        if keep and PromptTokens.checked < self.CHECKED:
            PromptTokens.checked += 1
            whole = tokenize(text, self.tokenizer)
            self._whole, (ids, ranges) = whole != (ids, ranges), whole
        self._text, self._ids, self._ranges = text, ids, ranges
        return ids, ranges

    def _shared(self, text: str, same: int) -> tuple[int, int]:
        """How many tokens of the text before stay, and the character that the next one begins at: an added token, so
        that what follows it is tokenized as behind one."""
        t = bisect_left(self._ranges, same, key=lambda place: place[1] - 1) - 1
        while t > 0:
            (start, end), content = self._ranges[t], self._bounds.get(self._ids[t])
            if content is not None and end <= same and text[start:end] == content:
                return t, start
            t -= 1
        return 0, 0


@lru_cache(maxsize=8)
def _added(tokenizer) -> dict[int, AddedToken]:
    return dict(tokenizer.added_tokens_decoder)


def _own(text: str, within: Range, token: AddedToken) -> Range:
    """Where an added token's own characters are in its range."""
    start = text.find(token.content, *within)
    return (start, start + len(token.content)) if start >= 0 else within


def same_text(expected: str, ids: list[int], tokenizer) -> bool:
    """Whether ids decode to the text, white space aside (Metaspace tokenizers lose a leading space). A tokenizer that
    rewrites text (NFKC, lower case) is asked what it makes of the expected text alone."""

    def squeeze(text):
        return "".join(text.split())

    def decode(tokens):
        return squeeze(tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    decoded = decode(ids)
    return decoded == squeeze(expected) or decoded == decode(tokenizer(expected, add_special_tokens=False)["input_ids"])


def span_mask(ranges: list[Range], spans: list[Range]) -> list[int]:
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
