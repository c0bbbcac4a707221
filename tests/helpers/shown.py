"""A side's sequences as texts in which what is supervised stands between « and »."""

from itertools import groupby

from mdpo.types import TokenizedPair, sequence_lengths, split


def shown(tokenizer, ids, mask) -> str:
    """Decoded by runs of equal bits. Example: «b» of "ab" with the mask [0, 1]."""
    text = ""
    for supervised, run in groupby(zip(ids, mask, strict=True), key=lambda token: token[1]):
        piece = tokenizer.decode([i for i, _ in run])
        text += f"«{piece}»" if supervised else piece
    return text


def sequences_of(pair: TokenizedPair, side: str = "chosen", *columns: str) -> list[tuple]:
    """(ids, mask) of each sequence, and more columns where named."""
    row = vars(pair)
    lengths = sequence_lengths(row, side)
    return list(zip(*(split(row[f"{side}_{x}"], lengths) for x in ("ids", "mask", *columns)), strict=True))


def shown_side(tokenizer, pair: TokenizedPair, side: str = "chosen") -> list[str]:
    return [shown(tokenizer, ids, mask) for ids, mask in sequences_of(pair, side)]
