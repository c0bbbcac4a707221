"""Evaluates a checkpoint: python scripts/evaluate.py CHECKPOINT --recipe RECIPE.yaml [--rollouts QUESTIONS.jsonl]

CHECKPOINT is a full model or a LoRA adapter; recipe keys may follow as --key=value. Scores the recipe's held-out pairs
against its reference, as run_dpo.py does: reward accuracy, margin and loss by number of turns. One process, one device.
With --rollouts the model answers questions, {"question" or "prompt", "answer"} a line, over several turns: its Python
blocks are run in a sandbox, and their output comes back, until an answer in \\boxed{}, which math-verify compares.
Where the kernel has no namespaces, --allow_unisolated_code runs them with access to your files and network.
--save gets one conversation a line: key, sample, messages, gold, answer, correct, ended, turns, code.
"""

import argparse
import gc
import sys
import tempfile
from pathlib import Path

import _clone  # noqa: F401
import torch
from rich.console import Console
from transformers import set_seed

from dpo_trainer import DPOTrainer
from mdpo.config.recipe import load_recipe
from mdpo.console import say
from mdpo.data.prepare import prepare_pairs
from mdpo.errors import UserError
from mdpo.loss.metrics import deduplicate
from mdpo.masking.chat_template import ChatTemplate
from mdpo.masking.dates import fix_day
from mdpo.masking.tokenizer import load_tokenizer
from mdpo.rollouts.answers import refuse_missing_verifier
from mdpo.rollouts.generate import Generator, refuse_hidden_tool_role
from mdpo.rollouts.load_policy import adapter_config, load_adapter_weights, load_policy, scoring_arguments
from mdpo.rollouts.loop import RolloutConfig, read_questions, roll_out, save_all
from mdpo.rollouts.sandbox import Limits, Sandbox
from mdpo.rollouts.tables import by_turns, count_turns, held_out_table, rollout_figures, rollout_tables
from mdpo.runs.entrypoint import run

ROLLOUTS = {  # option: (type, default, least value, help)
    "save": (Path, None, None, "file for conversations (default CHECKPOINT/trajectories.jsonl)"),
    "instruction": (str, "", None, "text in front of each question, with an empty line between"),
    "max_turns": (int, 6, 1, "turns of the model in a conversation, at most"),
    "max_new_tokens": (int, 512, 1, "tokens in a turn, at most"),
    "batch_size": (int, 8, 1, "conversations at a time"),
    "temperature": (float, 0.0, 0, "0 takes the most likely token"),
    "samples": (int, 1, 1, "conversations for each question; needs a temperature"),
    "seed": (int, 42, 0, "seed of sampling"),
    "tool_role": (str, "user", None, "role of the turns with output; M-DPO's data has user"),
    "code_seconds": (float, 10.0, 0.1, "time limit of a program"),
}


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
    prepared = prepare_rollouts(args, recipe, tokenizer) if args.rollouts else None
    console = Console(highlight=False)
    if (figures := held_out(args.checkpoint, recipe, tokenizer)) is not None:
        console.print(held_out_table(figures))
    elif prepared is None:
        raise UserError("The recipe has no held-out pairs: set eval_dataset_mixer or test_split_size, or --rollouts.")
    if prepared:
        gc.collect()
        torch.cuda.empty_cache()
        console.print(*rollout_tables(rollout(args, recipe, tokenizer, *prepared)), sep="\n")
        say(f"conversations  {args.save}")


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """This script's options, and the recipe's keys. Raises UserError, also for options that would have no effect."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, exit_on_error=False, formatter_class=form)
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("--recipe", required=True, metavar="RECIPE.yaml")
    parser.add_argument("--rollouts", metavar="QUESTIONS.jsonl")
    parser.add_argument("--allow_unisolated_code", action="store_true", default=None, help="see above")
    for key, (kind, default, _, text) in ROLLOUTS.items():
        text += f" (default {default})" if default else ""
        parser.add_argument(f"--{key}", type=kind, help=text, choices=("user", "tool") if key == "tool_role" else None)
    try:
        args, overrides = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error
    options = [name for name in [*ROLLOUTS, "allow_unisolated_code"] if getattr(args, name) is not None]
    if options and not args.rollouts:
        raise UserError(f"--{options[0]}: has no effect without --rollouts.")
    if not args.temperature and (unused := [name for name in ("samples", "seed") if name in options]):
        raise UserError(f"--{unused[0]}: has no effect at temperature 0; set --temperature.")
    for name, (_, default, least, _) in ROLLOUTS.items():
        if name not in options:
            setattr(args, name, default)
        if least is not None and not least <= (value := getattr(args, name)) < float("inf"):
            raise UserError(f"--{name}: {value} is out of range; give a number >= {least}.")
    args.save = args.save or Path(args.checkpoint, "trajectories.jsonl")
    return args, overrides


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


def prepare_rollouts(args: argparse.Namespace, recipe, tokenizer) -> tuple:
    """(questions, template, sandbox): all that can fail before weights are loaded. Raises UserError."""
    refuse_missing_verifier()
    questions = read_questions(args.rollouts, args.instruction)
    template = ChatTemplate(tokenizer, recipe.data.chat_template_kwargs)
    refuse_hidden_tool_role(template, args.tool_role)
    if args.save.exists() or not args.save.parent.is_dir():
        raise UserError(f"--save: {args.save} {'is there already' if args.save.exists() else 'has no folder'}.")
    if args.allow_unisolated_code:
        say("allow_unisolated_code: the model's programs run with access to this user's files and network.")
    return questions, template, Sandbox(Limits(args.code_seconds), namespaces=not args.allow_unisolated_code)


def rollout(args: argparse.Namespace, recipe, tokenizer, questions, template, sandbox) -> dict:
    """Metrics of the rollouts, whose conversations go to args.save."""
    model = load_policy(args.checkpoint, recipe)
    generate = Generator(model, tokenizer, template, args.max_new_tokens, args.temperature)
    set_seed(args.seed)
    config = RolloutConfig(args.max_turns, args.batch_size, args.samples, args.tool_role)
    rows = save_all(roll_out(questions, generate, sandbox.run, config), args.save, len(questions) * args.samples)
    return rollout_figures(rows)


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
