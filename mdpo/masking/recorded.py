"""Recorded sequences: ids and masks as a sampling server wrote them, trained on without a template. Their messages,
where a row has them, are only compared."""

import re
from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate, zip_longest
from typing import Protocol

from mdpo.errors import DropPair
from mdpo.types import RecordedSide, common_prefix

RETOKENIZED = "recorded tokens that the messages beside them are not rendered to (re-tokenized otherwise)"
REPEATED = "recorded tokens that two sequences of a side supervise in the same context: they count twice"
OTHER_MASK = "recorded masks that differ from those of the messages"
NOT_COMPARED = "recorded sequences not compared with their messages"
AS_RECORDED = "as recorded"  # why a sequence begins
BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # a token of one byte, in vocabularies of characters


class Sequences(Protocol):
    """`Side` of `mdpo.masking.loss_mask`."""

    @property
    def sequences(self) -> list[tuple[list[int], list[int], list[float]]]: ...


def recorded_fields(side: RecordedSide) -> tuple[list[int], list[int], list[float], list[int], list[str]]:
    """Ids, mask and weights of all sequences one behind the other, tokens of each, why each but the first begins."""
    ids, mask = ([t for sequence in side.sequences for t in sequence[part]] for part in (0, 1))
    lengths = [len(ids) for ids, _ in side.sequences]
    return ids, mask, [1.0] * len(ids), lengths, [AS_RECORDED] * (len(lengths) - 1)


def repeated(side: RecordedSide) -> bool:
    """Whether two sequences that begin alike supervise the same token of what they share, as where each has all turns
    so far supervised. In lexical order, `seen` is what those that share the present one's beginning supervise of it.

    Example: ids [1, 2, 3] and [1, 2, 3, 4, 5], masks [0, 0, 1] and [0, 0, 1, 0, 1] -> True; with [0, 0, 0, 0, 1] not.
    """
    before, seen = list[int](), list[int]()
    for ids, mask in sorted(side.sequences):
        n = common_prefix(before, ids)
        if any(a and b for a, b in zip(seen[:n], mask, strict=False)):
            return True
        before, seen = ids, [*(a or b for a, b in zip(seen[:n], mask, strict=False)), *mask[n:]]
    return False


def refuse_unknown_ids(side: RecordedSide, name: str, tokenizer) -> None:
    """Raises DropPair for an id that the tokenizer does not have."""
    size = _vocabulary(tokenizer, len(tokenizer))
    for number, (ids, _) in enumerate(side.sequences, 1):
        if min(ids) < 0 or max(ids) >= size:
            t = next(t for t, i in enumerate(ids) if not 0 <= i < size)
            raise DropPair(
                f"{name}, sequence {number}: input_ids: token {t + 1} is {ids[t]}, outside the vocabulary of {size}"
            )


@lru_cache(maxsize=8)
def _vocabulary(tokenizer, tokens: int) -> int:
    """One more than the highest id: ids may have gaps. `tokens` tells a tokenizer that has grown."""
    return max(tokenizer.get_vocab().values()) + 1


def refuse_other_prompts(sides: list) -> None:
    """The sides have to begin with the same tokens up to the first supervised one. Raises DropPair."""
    first = [side.sequences[0] for side in sides]
    prompts = [ids[: mask.index(1)] if 1 in mask else ids for ids, mask, _ in first]
    if prompts[0] != prompts[1]:
        t = common_prefix(*prompts) + 1
        raise DropPair(
            f"prompt mismatch: of the tokens before the first supervised one, token {t} differs; "
            "allow_different_prompts: true keeps both"
        )


def compared(own: RecordedSide, render: Callable[[], tuple[Sequences, list[str]]], tokenizer) -> tuple[list[str], int]:
    """(remarks, how many tokens differ) of a recorded side beside its messages as `render` has them."""
    try:
        rendered = [(ids, mask) for ids, mask, _ in render()[0].sequences]
    except DropPair as reason:
        return [f"{NOT_COMPARED}: {reason.key}"], 0
    nothing: tuple[list[int], list[int]] = ([], [])
    pairs = [_to_the_end(a, b) for a, b in zip_longest(own.sequences, rendered, fillvalue=nothing)]
    tokens = sum(differing(a[0], b[0], tokenizer) for a, b in pairs)
    if tokens:
        return [RETOKENIZED], tokens
    return [OTHER_MASK] * any(a[1] != b[1] for a, b in pairs), 0


def _to_the_end(*both: tuple[list[int], list[int]]) -> list[tuple[list[int], list[int]]]:
    """Two sequences up to the last token that is supervised in either: a template's line break behind it, or a turn of
    the environment, is in one of them only."""
    end = max(len(mask) - mask[::-1].index(1) if 1 in mask else 0 for _, mask in both)
    return [(ids[:end], mask[:end]) for ids, mask in both]


def differing(a: list[int], b: list[int], tokenizer) -> int:
    """How many tokens of one sequence the other does not have at the same place in the text, counted from its beginning
    or from its end; of both sequences the higher number.

    Example: "ab" "c" "d" and "a" "bc" "d": "d" ends both, the other two differ.
    """
    if a == b:
        return 0
    places = [_places(ids, tokenizer) for ids in (a, b)]
    missing = (
        sum(front not in others[0] and back not in others[1] for front, back in zip(*own, strict=True))
        for own, others in (places, places[::-1])
    )
    return max(*missing, abs(len(a) - len(b)))


def _places(ids: list[int], tokenizer) -> tuple[dict[tuple[int, int], None], dict[tuple[int, int], None]]:
    """(bytes before a token, its id) and (bytes from it on, its id), in order."""
    texts = [text or "" for text in tokenizer.convert_ids_to_tokens(ids)]
    widths = [1 if BYTE.fullmatch(text) else len(text.encode("utf-8", "replace")) for text in texts]
    ends = list(accumulate(widths, initial=0))
    front = dict.fromkeys(zip(ends, ids, strict=False))
    back = dict.fromkeys((ends[-1] - start, i) for start, i in zip(ends, ids, strict=False))
    return front, back
