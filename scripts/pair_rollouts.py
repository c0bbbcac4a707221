"""Pairs from trajectories: python scripts/pair_rollouts.py TRAJECTORIES.jsonl ... --out PAIRS.jsonl

Reads what scripts/sample.py saved, and anybody's: {"messages", "reward" or "correct"} a line, with "key"
where several lines are of one task. Two of one task that differ in reward are a pair; by default each task makes one,
drawn at random. Left out are trajectories without a reward, those that a token limit or a broken environment ended,
and what is there twice. PAIRS.report.json beside the pairs counts both.
"""

import argparse
import json
import sys
from pathlib import Path

import _clone  # noqa: F401

from mdpo.console import say
from mdpo.errors import UserError
from mdpo.rollouts.pairing import Pairing, paired_rows, report_of
from mdpo.runs.entrypoint import run
from mdpo.storage import replace_text, replaced

RULES = {
    "best_worst": "the best with the worst",
    "all": "each two that differ, the widest gap first",
    "adjacent": "each reward with the next lower one",
    "random": "drawn at random, one a task unless --max_pairs_per_prompt says more",
    "branch": "two that went the same way for a turn or more, the longest way first",
}


def parse(argv: list[str]) -> argparse.Namespace:
    """Raises UserError."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, exit_on_error=False, formatter_class=form)
    parser.add_argument("trajectories", nargs="+", type=Path)
    parser.add_argument("--out", required=True, type=Path)
    rules = "; ".join(f"{name}: {what}" for name, what in RULES.items())
    parser.add_argument("--replace", action="store_true", help="a file that is there already")
    parser.add_argument("--pairs", choices=list(RULES), default="random", help=f"which two are compared. {rules}")
    parser.add_argument("--min_reward_gap", type=float, default=0.0)
    parser.add_argument("--max_pairs_per_prompt", type=int)
    parser.add_argument("--max_length", type=int, help="leave out what was sampled with a sequence of more tokens")
    parser.add_argument("--length_matched", action="store_true", help="the nearest in sampled tokens first")
    parser.add_argument("--seed", type=int, default=42, help="of --pairs random")
    try:
        args = parser.parse_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error
    for name in ("max_pairs_per_prompt", "max_length"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError(f"--{name}: {value} is out of range; give a number >= 1.")
    if not 0 <= args.min_reward_gap < float("inf"):
        raise UserError(f"--min_reward_gap: {args.min_reward_gap} is out of range; give a number >= 0.")
    if args.length_matched and args.pairs in ("adjacent", "random"):
        raise UserError(f"--length_matched: has no effect with --pairs {args.pairs}.")
    if (args.out.exists() and not args.replace) or not args.out.parent.is_dir():
        raise UserError(f"--out: {args.out} {'is there already' if args.out.exists() else 'has no folder'}.")
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    pairing = Pairing(args.pairs, args.min_reward_gap, args.max_pairs_per_prompt, args.length_matched, args.seed)
    rows, report = paired_rows(args.trajectories, pairing, args.max_length)
    with replaced(args.out) as draft:
        with draft.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        say(*report.lines())
        if not report.pairs:
            raise UserError(f"None of the {report.tasks} tasks has two trajectories to compare.", "tasks")
        replace_text(report_of(args.out), json.dumps({"pairs_by": args.pairs, **report.as_dict()}, indent=1))
    say(f"{args.out}: {report.pairs} pairs")


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
