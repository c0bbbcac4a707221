"""Show which tokens a recipe trains on: python scripts/show_masks.py RECIPE.yaml [--key=value ...] [--first N]
[--json | --html FILE]

Tokenizes the training pairs as run_dpo.py does (same recipes, same keys), with the tokenizer alone: no weights, no
output folder. Pairs come in the order of the recipe's datasets and of their rows, without held-out and dropped ones.

Without --json the first N pairs (default 2) are printed in color, or without color (NO_COLOR, a pipe, a file) with
marks: «supervised text⟦end of turn⟧». ┊ is the end of the shared prefix. A side whose text is rewritten between its
turns is several sequences, each as the model saw it, with the reason why it begins. With --json stdout gets one object
a line for every training pair, and everything else goes to stderr:
    {"key", "chosen": {"ids", "tokens", "mask", "ends", "weights", "lengths", "shared", "breaks": a list each},
     "rejected": {the same}}

`tokens` join to the text that the chat template rendered, but for a character that is split between tokens (each part
shows as U+FFFD) and for the space some Metaspace tokenizers put after a special token. `ends`: end-of-turn positions.
`weights`: turn weights, a number a token; empty where all are 1. All of these have a side's sequences one behind the
other. `lengths`: the tokens of each sequence. `shared`: with how many of them another sequence of the pair begins as
well; where both sides are one sequence, their common prefix. `breaks`: why each sequence but the first begins.

With --html the mask page, which opens from disk, has the first N pairs (default 100), and some of each drop reason.
"""

import argparse
import contextlib
import json
import signal
import sys
from itertools import islice
from pathlib import Path

import _clone  # noqa: F401
from rich.console import Console
from rich.text import Text

from mdpo.console import say
from mdpo.errors import UserError
from mdpo.reporting.token_view import (
    COLORS,
    CONTEXT,
    END,
    SHARED,
    SUPERVISED,
    VISIBLE,
    SequenceView,
    recipe_and_tokenizer,
    sequence_views,
    training_pairs,
)
from mdpo.runs.entrypoint import run
from mdpo.types import SIDES, distinct_tokens, split


def main(argv: list[str]) -> None:
    args, overrides = parse(argv)
    if args.html:
        from mdpo.reporting.mask_page import write_page

        counts = write_page(args.html, *recipe_and_tokenizer(overrides), args.first or 100)
        return say(f"{args.html}: " + ", ".join(f"{n} {reason}" for reason, n in counts.items()))
    # The libraries write to stdout too, DeepSpeed's log already while it is imported.
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
        pairs = training_pairs(overrides)
    if not args.json:
        return show(islice(pairs, args.first or 2), Console())
    sys.stdout.writelines(json.dumps(pair) + "\n" for pair in pairs)


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """This script's options, and the recipe's arguments. Raises UserError."""
    parser = argparse.ArgumentParser(usage=__doc__, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--first", type=int, metavar="N", help="how many pairs to show")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="every training pair as JSON, one a line")
    form.add_argument("--html", type=Path, metavar="FILE", help="write a page that opens in a browser")
    try:
        args, overrides = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error
    if args.first is not None and (args.json or args.first < 1):
        reason = "has no effect with --json" if args.json else f"{args.first} is out of range; it has to be >= 1"
        raise UserError(f"argument --first: {reason}.")
    return args, overrides


def show(pairs, console: Console) -> None:
    plain = console.no_color or console.color_system is None
    sides = [style(kind, name, f" {name}: {kind} ") for name in SIDES for kind in (SUPERVISED, END)]
    legend = [f"«{SUPERVISED}⟦{END}⟧»"] if plain else [style(SHARED), style(CONTEXT), *sides]
    console.print(Text.assemble("\n", *legend, f"\n┊ end of the {SHARED}   ↵ line break"), soft_wrap=True)
    for pair in pairs:
        console.print(Text(f"\n{pair['key']}, {summary(pair)}", "bold"))
        for name in SIDES:
            mask, views = pair[name]["mask"], sequence_views(pair[name])
            several = f"{len(views)} sequences, " * (len(views) > 1)
            console.print(Text(f"\n{name}: {several}{len(mask)} tokens, {sum(mask)} supervised", "bold"))
            for view in views:
                text = sequence_text(view, name, plain)
                if several:
                    line = "\n" * (view.number > 1) + f"{name}, {view.title} ({view.counts})"
                    console.print(Text(line, "bold"), soft_wrap=True)
                console.print(text, soft_wrap=True, end="\n" if several and text.plain[-1:] != "\n" else "")
    console.print()


def summary(pair: dict) -> str:
    """What the sequences of a pair have in common."""
    sequences = [ids for name in SIDES for ids in split(pair[name]["ids"], pair[name]["lengths"])]
    if len(sequences) == len(SIDES):
        return f"{SHARED} of {pair['chosen']['shared'][0]} tokens"
    tokens = sum(map(len, sequences))
    return f"{tokens} tokens in {len(sequences)} sequences, {distinct_tokens(sequences)} distinct"


def style(kind: str, name: str = "", text: str | None = None, t: int = 0) -> tuple[str, str]:
    ink, *papers = COLORS[kind if kind in COLORS else (kind, name)]
    return f" {kind} " if text is None else text, f"{ink} on {papers[t % 2]}" + " bold" * (kind == END)


def sequence_text(view: SequenceView, name: str, plain: bool) -> Text:
    parts, bits = [], [0, *view.mask, 0]
    for t, kind in enumerate(view.kinds):
        text = view.tokens[t].translate(VISIBLE)
        if plain:
            text = f"⟦{text}⟧" if kind == END else text
            text = "«" * (bits[t] < bits[t + 1]) + text + "»" * (bits[t + 1] > bits[t + 2])
        parts += ["┊" * (t == view.shared), text if plain else style(kind, name, text, t)]
    return Text.assemble(*parts, "┊" * (view.shared == len(view.kinds)))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `... --json | head` ends quietly
    sys.exit(run(main, sys.argv[1:]))
