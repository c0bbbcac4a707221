"""Rows for TRL's SFT: python scripts/sft_rows.py TRAJECTORIES.jsonl ... --recipe RECIPE.yaml --out FOLDER

Each trajectory, {"messages"} a line, becomes token ids and masks (FOLDER/train.jsonl), by the recipe's tokenizer and
chat template: learned are the assistant's turns, each in the context in which preference learning would score it. What
scripts/sample.py saved is taken as it was sampled. With a "reward" or "correct", only those of --min_reward.

    trl sft --config SFT.yaml --dataset_name FOLDER --max_length N

N is the recipe's max_length: longer trajectories are left out here, and TRL would cut them.
"""

import argparse
import json
import sys
import tempfile
from itertools import chain
from pathlib import Path

import _clone  # noqa: F401

from mdpo.config.recipe import load_recipe
from mdpo.console import say
from mdpo.errors import UserError
from mdpo.masking.chat_template import ChatTemplate
from mdpo.masking.dates import fix_day
from mdpo.masking.tokenizer import load_tokenizer
from mdpo.rollouts.calls import call_form
from mdpo.rollouts.options import SamplingOptions
from mdpo.rollouts.supervised import sft_rows
from mdpo.runs.entrypoint import run
from mdpo.storage import replaced


def main(argv: list[str]) -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, exit_on_error=False, formatter_class=form)
    parser.add_argument("trajectories", nargs="+", type=Path)
    parser.add_argument("--recipe", required=True, metavar="RECIPE.yaml")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--min_reward", type=float, default=1.0, help="default 1; without a reward a row is taken")
    try:
        args, overrides = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error
    recipe = load_recipe([args.recipe, "--report_to=none", f"--output_dir={tempfile.gettempdir()}", *overrides])
    tokenizer = load_tokenizer(recipe.model, recipe.data, recipe.training.trust_remote_code)
    say(f"recipe {recipe.path}", *recipe.notes, *fix_day(recipe, tokenizer))
    template = ChatTemplate(tokenizer, recipe.data.chat_template_kwargs)
    rows, report = sft_rows(args.trajectories, template, recipe.training.max_length, args.min_reward)
    first = next(rows, None)
    if first is None:
        say(*report.lines())
        raise UserError("None of the trajectories can be learned.", "trajectories")
    args.out.mkdir(parents=True, exist_ok=True)
    with replaced(args.out / "train.jsonl") as draft, draft.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in chain([first], rows))
    say(*report.lines())
    if report.tools:
        try:
            call_form("template", report.tools, template, SamplingOptions.tool_role)
        except UserError as why:
            say(f"tools: sampling would describe them in other words than these rows have: {why}")
    say(f"{args.out}/train.jsonl: {report.sequences} rows")


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
