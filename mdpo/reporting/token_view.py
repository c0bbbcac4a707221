"""The token view: text, kind (supervised, context, ...) and color of each token, on a terminal, in SVG and in HTML.

What needs the tokenizer's libraries is imported late: they write to stdout, which a script may want for itself.
"""

from functools import partial

from mdpo.console import say
from mdpo.types import SIDES, turn_begins

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
    from mdpo.masking.tokenizer import token_text

    recipe, tokenizer = recipe_and_tokenizer(argv)
    rows, _, _ = prepare_pairs(recipe, tokenizer)
    order = sorted(range(len(rows)), key=list(rows["place"]).__getitem__)
    show = partial(to_json, text_of=token_text(tokenizer), specials=special_ids(tokenizer))
    return map(show, rows.select(order))


def special_ids(tokenizer) -> set[int]:
    """Ids of all added tokens: one that is not special may end a turn too."""
    return {i for i, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}


def to_json(row: dict, text_of, specials: set[int]) -> dict:
    """One tokenized pair as --json prints it. `ends`: where special tokens close a supervised span."""
    out = {"key": row["key"], "shared_len": row["shared_len"]}
    for name in SIDES:
        ids, mask = row[f"{name}_ids"], row[f"{name}_mask"]
        tokens = [text_of(tuple(ids[max(t - 1, 0) : t]), token) for t, token in enumerate(ids)]
        ends = [t for t, token in enumerate(ids) if mask[t : t + 2] in ([1], [1, 0]) and token in specials]
        out[name] = {"ids": ids, "tokens": tokens, "mask": mask, "ends": ends, "weights": row[f"{name}_weights"]}
    return out


def token_kinds(side: dict, shared_len: int) -> list[str]:
    """SUPERVISED, END, SHARED or CONTEXT for each token; a supervised one may be in the shared prefix as well."""
    unsupervised = [SHARED if t < shared_len else CONTEXT for t in range(len(side["mask"]))]
    return [END if t in side["ends"] else SUPERVISED if bit else unsupervised[t] for t, bit in enumerate(side["mask"])]


def sample_pairs(rows, tokenizer) -> list[dict]:
    """Two pairs of a tokenized dataset as in `to_json`, with `kinds` on each side: the first with several supervised
    turns on both sides among the first LOOKED_AT, filled up with the first ones."""
    from mdpo.masking.tokenizer import token_text

    first = [to_json(row, token_text(tokenizer), special_ids(tokenizer)) for row in rows.select(_places(rows))]
    for pair in first:
        for name in SIDES:
            pair[name]["kinds"] = token_kinds(pair[name], pair["shared_len"])
    return first


def _places(rows) -> list[int]:
    looked = rows.select(range(min(LOOKED_AT, len(rows)))).select_columns([f"{name}_mask" for name in SIDES])
    several = [i for i, row in enumerate(looked) if all(turn_begins(row[f"{name}_mask"]).sum() > 1 for name in SIDES)]
    return (several + [i for i in range(len(looked)) if i not in several])[:2]
