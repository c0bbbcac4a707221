"""The data report of a recipe, without weights or a GPU: python scripts/check_data.py RECIPE.yaml [--key=value ...]

Reads and tokenizes all rows as run_dpo.py does (same recipes, same keys) and prints what it would print: rows kept, and
dropped under each reason, lengths, what is supervised, warnings. `--report FOLDER` also writes FOLDER/data_report.json.
Exit code 1 where the data would stop the run, as with more bad rows than `max_bad_fraction`, or, with
`on_bad_rows: error`, with any: for CI, check_data.py RECIPE.yaml --on_bad_rows=error.
"""

import argparse
import sys
from pathlib import Path

import _clone  # noqa: F401

from mdpo.console import say
from mdpo.errors import UserError
from mdpo.runs.entrypoint import run


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(usage=__doc__, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="write data_report.json there")
    try:
        args, overrides = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error
    from mdpo.config.recipe import load_recipe
    from mdpo.data.prepare import prepare_pairs
    from mdpo.masking.tokenizer import load_tokenizer

    recipe = load_recipe(overrides)
    say(f"recipe {recipe.path}", *recipe.notes)
    try:
        if args.report:
            args.report.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--report: {args.report} cannot be made: {error.strerror}. Name a folder.") from error
    tokenizer = load_tokenizer(recipe.model, recipe.data, recipe.training.trust_remote_code)
    _, _, report = prepare_pairs(recipe, tokenizer, args.report)
    report.refuse_bad_rows(recipe.data.on_bad_rows, recipe.data.max_bad_fraction)
    say("The data can be trained on.")


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
