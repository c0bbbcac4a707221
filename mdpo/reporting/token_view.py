"""The token view: text, kind (supervised, context, ...) and color of each token, on a terminal, in SVG and in HTML.

What needs the tokenizer's libraries is imported late: they write to stdout, which a script may want for itself.
"""

from collections.abc import Container
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, islice, pairwise
from typing import Any

from mdpo.console import say
from mdpo.types import SIDES, common_prefix, sequence_lengths, split, turn_begins

SHARED, CONTEXT, SUPERVISED, END = "shared prefix", "context", "supervised", "end of turn"
COLORS = {  # text, two backgrounds that alternate from token to token (close in the 256-color palette too)
    SHARED: ("#d0d7de", "#3d444d", "#4d5660"),
    CONTEXT: ("#8b949e", "default", "default"),
    (SUPERVISED, "chosen"): ("#03251b", "#87d7af", "#5fd7af"),
    (SUPERVISED, "rejected"): ("#3b1700", "#ffd7af", "#ffd787"),
    (END, "chosen"): ("#ffffff", "#00664b", "#00664b"),
    (END, "rejected"): ("#ffffff", "#a84300", "#a84300"),
}
LOOKED_AT = 200  # pairs among which those for the HTML report are chosen
VISIBLE = {i: chr(0x2400 + i) for i in range(32)} | dict.fromkeys(range(0x7F, 0xA0), "\ufffd") | {0x0A: "↵\n"}


def recipe_and_tokenizer(argv: list[str]):
    from mdpo.config.recipe import load_recipe
    from mdpo.masking.tokenizer import load_tokenizer

    recipe = load_recipe(argv)
    say(f"recipe {recipe.path}", *recipe.notes)
    return recipe, load_tokenizer(recipe.model, recipe.data, recipe.training.trust_remote_code)


def training_pairs(argv: list[str]):
    """An iterator over the training pairs of a command line, as --json prints them. Raises UserError."""
    from mdpo.data.prepare import prepare_pairs
    from mdpo.data.whole_columns import whole_numbers
    from mdpo.masking.tokenizer import token_text

    recipe, tokenizer = recipe_and_tokenizer(argv)
    rows, _, _ = prepare_pairs(recipe, tokenizer)
    order = sorted(range(len(rows)), key=whole_numbers(rows, "place").tolist().__getitem__)
    show = partial(to_json, text_of=token_text(tokenizer), specials=special_ids(tokenizer))
    return map(show, rows.select(order))


def special_ids(tokenizer) -> set[int]:
    """Ids of all added tokens: one that is not special may end a turn too."""
    return {i for i, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}


def to_json(row: dict, text_of, specials: set[int]) -> dict:
    """One tokenized pair as --json prints it: `ends` are the positions at which special tokens close a supervised span,
    `breaks` why each sequence but the first begins; the other lists of a side have a value a token, or a sequence."""
    sequences = {name: split(row[f"{name}_ids"], sequence_lengths(row, name)) for name in SIDES}
    shared = iter(shared_tokens([ids for name in SIDES for ids in sequences[name]]))
    out: dict[str, Any] = {"key": row["key"]}
    for name, of_side in sequences.items():
        mask, lengths = row[f"{name}_mask"], list(map(len, of_side))
        begins = accumulate([0, *lengths[:-1]])
        out[name] = {
            "ids": row[f"{name}_ids"],
            "tokens": [text for ids in of_side for text in token_texts(ids, text_of)],
            "mask": mask,
            "ends": [
                begin + t
                for begin, ids, bits in zip(begins, of_side, split(mask, lengths), strict=True)
                for t in turn_ends(ids, bits, specials)
            ],
            "weights": row[f"{name}_weights"],
            "lengths": lengths,
            "shared": list(islice(shared, len(lengths))),
            "breaks": row.get(f"{name}_breaks") or [],
        }
    return out


def shared_tokens(sequences: list[list[int]]) -> list[int]:
    """Of each sequence of a pair how many of its first tokens some other one begins with as well. In lexical order the
    ones beside it share the most. Example: [[5, 6, 7], [5, 6, 8], [5, 9], [4]] -> [2, 2, 1, 0]."""
    order = sorted(range(len(sequences)), key=sequences.__getitem__)
    shared = [0] * len(sequences)
    for a, b in pairwise(order):
        n = common_prefix(sequences[a], sequences[b])
        shared[a], shared[b] = max(shared[a], n), n
    return shared


def token_texts(ids: list[int], text_of) -> list[str]:
    """The text of each token of a sequence."""
    return [text_of(tuple(ids[max(t - 1, 0) : t]), token) for t, token in enumerate(ids)]


def turn_ends(ids: list[int], mask: list[int], specials: set[int]) -> list[int]:
    """Where special tokens close a supervised span of a sequence."""
    return [t for t, token in enumerate(ids) if mask[t : t + 2] in ([1], [1, 0]) and token in specials]


def token_kinds(mask: list[int], ends: Container[int], shared: int) -> list[str]:
    """SUPERVISED, END, SHARED or CONTEXT for each token of a sequence; a supervised one may be among the `shared` first
    tokens as well."""
    unsupervised = [SHARED if t < shared else CONTEXT for t in range(len(mask))]
    return [END if t in ends else SUPERVISED if bit else unsupervised[t] for t, bit in enumerate(mask)]


@dataclass
class SequenceView:
    """One sequence of a side to be shown: `ids`, `tokens` (texts), `mask` and `kinds` have a value a token; the first
    `shared` tokens are in another sequence of the pair too. `number` counts from 1, `of` is how many the side has."""

    number: int
    of: int
    why: str
    ids: list[int]
    tokens: list[str]
    mask: list[int]
    kinds: list[str]
    shared: int

    @property
    def title(self) -> str:
        return sequence_title(self.number, self.of, self.why)

    @property
    def counts(self) -> str:
        return f"{len(self.ids)} tokens, {sum(self.mask)} supervised, {self.shared} shared"


def sequence_title(number: int, of: int, why: str) -> str:
    return f"sequence {number} of {of}" + f": {why}" * bool(why)


def sequence_views(side: dict) -> list[SequenceView]:
    """A side of `to_json` by its sequences."""
    lengths, begin, views = side["lengths"], 0, []
    reasons = ["", *side["breaks"], *[""] * len(lengths)]
    for i, length in enumerate(lengths):
        ids, tokens, mask = (side[name][begin : begin + length] for name in ("ids", "tokens", "mask"))
        kinds = token_kinds(mask, {t - begin for t in side["ends"]}, side["shared"][i])
        views.append(SequenceView(i + 1, len(lengths), reasons[i], ids, tokens, mask, kinds, side["shared"][i]))
        begin += length
    return views


def sample_pairs(rows, tokenizer) -> list[dict]:
    """Two pairs of a tokenized dataset as in `to_json`. Among the first LOOKED_AT those with several supervised turns
    on both sides come first, and among equals those with several sequences on a side."""
    from mdpo.masking.tokenizer import token_text

    text_of, specials = token_text(tokenizer), special_ids(tokenizer)
    return [to_json(row, text_of, specials) for row in rows.select(_places(rows))]


def _places(rows) -> list[int]:
    looked = rows.select(range(min(LOOKED_AT, len(rows))))
    fields = [f"{name}_{field}" for name in SIDES for field in ("ids", "mask", "lengths")]

    def rank(row: dict) -> tuple[bool, bool]:
        """Sorts a pair of several turns, then one of several sequences, before the others."""
        masks = [split(row[f"{name}_mask"], sequence_lengths(row, name)) for name in SIDES]
        several_turns = all(sum(turn_begins(mask).sum() for mask in of_side) > 1 for of_side in masks)
        return not several_turns, all(len(of_side) == 1 for of_side in masks)

    ranks = [rank(row) for row in looked.select_columns([c for c in fields if c in rows.column_names])]
    return sorted(range(len(ranks)), key=ranks.__getitem__)[:2]
