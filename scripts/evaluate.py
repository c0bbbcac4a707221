"""Evaluates a checkpoint: python scripts/evaluate.py CHECKPOINT --recipe RECIPE.yaml

CHECKPOINT is a full model or a LoRA adapter; recipe keys may follow as --key=value. Scores the recipe's held-out pairs
against its reference, as run_dpo.py does: reward accuracy, margin and loss by number of turns. One process, one device.
Whether the model answers right is what scripts/sample.py measures.
"""

import argparse
import sys
import tempfile

import _clone  # noqa: F401
from rich.console import Console

from dpo_trainer import DPOTrainer
from mdpo.config.recipe import load_recipe
from mdpo.console import say
from mdpo.data.prepare import prepare_pairs
from mdpo.errors import UserError
from mdpo.loss.metrics import deduplicate
from mdpo.masking.dates import fix_day
from mdpo.masking.tokenizer import load_tokenizer
from mdpo.rollouts.load_policy import adapter_config, load_adapter_weights, scoring_arguments
from mdpo.rollouts.tables import by_turns, count_turns, held_out_table
from mdpo.runs.entrypoint import run


class Scorer(DPOTrainer):
    """Keeps the per-pair metrics of its evaluation, see mdpo.loss.metrics."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.pair_tables = [*getattr(self, "pair_tables", []), self.tables.eval[-1].cpu()]
        return loss


def main(argv: list[str]) -> None:
    args, overrides = parse(argv)
    recipe = load_recipe([args.recipe, "--report_to=none", f"--output_dir={tempfile.gettempdir()}", *overrides])
    adapter_config(args.checkpoint)  # raises where there is no checkpoint
    if recipe.training.world_size > 1 or recipe.training.n_gpu > 1:
        raise UserError("evaluate.py runs in one process on one device. Choose one with CUDA_VISIBLE_DEVICES=0.")
    tokenizer = load_tokenizer(recipe.model, recipe.data, recipe.training.trust_remote_code)
    say(f"recipe {recipe.path}", *recipe.notes, *fix_day(recipe, tokenizer, args.checkpoint))
    figures = held_out(args.checkpoint, recipe, tokenizer)
    if figures is None:
        raise UserError("The recipe has no held-out pairs: set eval_dataset_mixer or test_split_size.")
    Console(highlight=False).print(held_out_table(figures))


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """This script's options, and the recipe's keys. Raises UserError."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, exit_on_error=False, formatter_class=form)
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("--recipe", required=True, metavar="RECIPE.yaml")
    try:
        return parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error


def held_out(checkpoint: str, recipe, tokenizer) -> dict | None:
    """Metrics of the held-out pairs by number of turns; None where the recipe has none. Raises UserError."""
    _, pairs, report = prepare_pairs(recipe, tokenizer)
    report.refuse_bad_rows(recipe.data.on_bad_rows, recipe.data.max_bad_fraction)
    if pairs is None:
        return None
    model_args, args = scoring_arguments(checkpoint, recipe), recipe.training
    scorer = Scorer(args=args, train_dataset=pairs, eval_dataset=pairs, processing_class=tokenizer, **model_args)
    if "peft_config" in model_args:  # the trainer has initialized a new one, as for training
        load_adapter_weights(scorer.model, checkpoint)
    scorer.evaluate()
    return by_turns(deduplicate(scorer.pair_tables), [count_turns(mask) for mask in pairs["chosen_mask"]])


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
