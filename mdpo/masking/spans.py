"""A rendered text and the characters that the policy sampled in it → token ids and which of them are supervised."""

import json
from bisect import bisect_left
from functools import lru_cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors

from mdpo.errors import DropPair, UserError

STRADDLE = "a token straddles a turn's boundary"
APART = "a turn tokenized apart from its header"
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


def supervised(text: str, spans: list[Range], encoded: tuple[list[int], list[Range]], tokenizer):
    """(ids, ranges, mask, whether a turn was tokenized apart) of a text with the characters `spans` sampled; `encoded`
    is what `tokenize` made of it, and stays as it is where no token lies across a span's edge.

    An added token at a span's end that takes the white space behind it (`rstrip`) is sampled whole: its range then
    ends with the span. Any other token across an edge was never seen so by a policy: a prompt is tokenized before there
    is an answer. What is before the edge and what is behind it are tokenized apart then. DropPair where
    that does not give the same text."""
    ids, ranges = encoded
    try:
        return ids, ranges, span_mask(ranges, spans), False
    except DropPair:
        ids, ranges = list(ids), list(ranges)
    stripping, ends = {i: token for i, token in _added(tokenizer).items() if token.rstrip}, {end for _, end in spans}
    for t in [t for t, i in enumerate(ids) if i in stripping]:
        own = _own(text, ranges[t], stripping[ids[t]])
        if own[1] < ranges[t][1] and own[1] in ends:
            ranges[t] = (ranges[t][0], own[1])
    apart = [_cut(text, edge, ids, ranges, tokenizer) for span in spans for edge in span]
    return ids, ranges, span_mask(ranges, spans), any(apart)


@lru_cache(maxsize=8)
def _added(tokenizer) -> dict[int, AddedToken]:
    return dict(tokenizer.added_tokens_decoder)


def _own(text: str, within: Range, token: AddedToken) -> Range:
    """Where an added token's own characters are in its range."""
    start = text.find(token.content, *within)
    return (start, start + len(token.content)) if start >= 0 else within


def _cut(text: str, edge: int, ids: list[int], ranges: list[Range], tokenizer) -> bool:
    """Whether a token lies across `edge`; then the tokens between the added tokens around it are replaced by those
    of the two parts. Those beyond are not touched: no merge goes across an added token."""
    across = bisect_left(ranges, edge, key=lambda place: place[0]) - 1
    if across < 0 or ranges[across][1] <= edge:
        return False

    def own(t: int) -> int:
        """Where token t begins if it is an added one, else nowhere near."""
        token = _added(tokenizer).get(ids[t])
        return -1 if token is None else _own(text, ranges[t], token)[0]

    first = next((t for t in range(across, -1, -1) if 0 <= own(t) < edge), 0)
    last = next((t for t in range(across + 1, len(ids)) if own(t) >= edge), len(ids))
    begin, end = ranges[first][0] if first else 0, ranges[last][0] if last < len(ids) else len(text)
    retokenized: list[tuple[int, Range]] = []
    for start, stop in ((begin, edge), (edge, end)):
        piece, places = tokenize(text[start:stop], tokenizer, goes_on=start == edge)
        if not _same(text[start:stop], piece, tokenizer):
            raise DropPair(STRADDLE)
        retokenized += zip(piece, ((a + start, b + start) for a, b in places), strict=True)
    ids[first:last], ranges[first:last] = [i for i, _ in retokenized], [place for _, place in retokenized]
    return True


def _same(expected: str, ids: list[int], tokenizer) -> bool:
    """As `same_text`, white space included, but for that which added tokens take along, and one space at the start,
    which Metaspace loses."""
    decoded = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    stripping = any(token.rstrip or token.lstrip for i in ids if (token := _added(tokenizer).get(i)))
    exact = decoded in (expected, expected.removeprefix(" "))
    return exact or ((stripping or _rewrites(tokenizer)) and same_text(expected, ids, tokenizer))


def _rewrites(tokenizer) -> bool:
    return tokenizer.backend_tokenizer.normalizer is not None


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
