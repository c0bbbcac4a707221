"""Trajectories of a policy: python scripts/sample.py CHECKPOINT --recipe RECIPE.yaml --tasks TASKS.jsonl

CHECKPOINT is a full model or a LoRA adapter; recipe keys may follow as --key=value. --processes 4 samples on four GPUs;
--shard 0/4 to 3/4 are four parts, for as many machines. The model acts over several turns. Without --environment the
tasks are questions, {"question" or "prompt", "answer"} a line: Python blocks are run in a sandbox and their output
comes back, until an answer in \\boxed{}, which math-verify compares. --environment names a class with tools, as TRL's
GRPOTrainer takes it.
--save gets one trajectory a line as each ends; the same command continues with those that are missing.
Where the kernel has no namespaces, --allow_unisolated_code runs programs with access to your files and network.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import _clone  # noqa: F401
from rich.console import Console

from mdpo.config.recipe import load_recipe
from mdpo.console import say
from mdpo.errors import UserError
from mdpo.masking.dates import NAME as DAY
from mdpo.masking.dates import fix_day
from mdpo.masking.tokenizer import load_tokenizer
from mdpo.rollouts.load_policy import adapter_config
from mdpo.rollouts.options import SamplingOptions, add_options, read_options
from mdpo.rollouts.records import first_settings
from mdpo.rollouts.sampling import prepare, sample
from mdpo.rollouts.tables import rollout_figures, rollout_tables
from mdpo.runs.entrypoint import run


def main(argv: list[str]) -> None:
    args, options, overrides = parse(argv)
    recipe = load_recipe([args.recipe, "--report_to=none", f"--output_dir={tempfile.gettempdir()}", *overrides])
    adapter_config(args.checkpoint)  # raises where there is no checkpoint
    if recipe.training.world_size > 1:
        raise UserError("sample.py is started with python, as one process, and several GPUs with --processes.")
    tokenizer = load_tokenizer(recipe.model, recipe.data, recipe.training.trust_remote_code)
    if day := first_settings(options.save).get(DAY):  # begun on another day: its texts stay those of that day
        recipe.data.chat_template_kwargs = {DAY: day, **(recipe.data.chat_template_kwargs or {})}
    say(f"recipe {recipe.path}", *recipe.notes, *fix_day(recipe, tokenizer, args.checkpoint))
    prepared = prepare(args.tasks, options, recipe, tokenizer)
    figures = rollout_figures(sample(prepared, args.checkpoint, recipe))
    Console(highlight=False).print(*rollout_tables(figures), sep="\n")
    say(f"trajectories  {options.save}")


def parse(argv: list[str]) -> tuple[argparse.Namespace, SamplingOptions, list[str]]:
    """This script's options, and the recipe's keys. Raises UserError."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, exit_on_error=False, formatter_class=form)
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("--recipe", required=True, metavar="RECIPE.yaml")
    parser.add_argument("--tasks", required=True, metavar="TASKS.jsonl")
    add_options(parser)
    try:
        args, overrides = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error
    part = "-{}-of-{}".format(*args.shard) if args.shard else ""
    return args, read_options(args, Path(args.checkpoint, f"trajectories{part}.jsonl")), overrides


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
