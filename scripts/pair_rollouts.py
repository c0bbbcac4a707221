"""Pairs from conversations: python scripts/pair_rollouts.py CONVERSATIONS.jsonl ... --out PAIRS.jsonl [--pairs 1]

Reads what scripts/evaluate.py --rollouts saved. Of each question, a conversation with the right answer is chosen and
one with a wrong answer, or none, is rejected: --pairs of them at most, drawn by --seed, no conversation twice. Left out
are conversations that a token limit ended, as the policy did not end their last turn, and questions whose answers are
all right or all wrong.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import _clone  # noqa: F401

from mdpo.console import say
from mdpo.errors import UserError
from mdpo.runs.entrypoint import run

UNFINISHED = ("cut", "too long")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(usage=__doc__, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("conversations", nargs="+", type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=42)
    try:
        args = parser.parse_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error
    if args.pairs < 1:
        raise UserError(f"--pairs: {args.pairs} is out of range; give a number >= 1.")
    if args.out.exists() or not args.out.parent.is_dir():
        raise UserError(f"--out: {args.out} {'is there already' if args.out.exists() else 'has no folder'}.")
    questions = by_question(args.conversations)
    rows = [row for key, sides in questions.items() for row in draw(key, *sides, args.pairs, args.seed)]
    if not rows:
        raise UserError(
            f"None of the {len(questions)} questions has both a right and a wrong conversation.", "questions"
        )
    args.out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    paired = len({row["id"].rpartition("-")[0] for row in rows})
    say(f"{args.out}: {len(rows)} pairs of {paired} of {len(questions)} questions")


def by_question(paths: list[Path]) -> dict[str, tuple[list, list]]:
    """key -> (right, wrong) conversations, each once, in the order of the files. Raises UserError."""
    questions: dict[str, tuple[list, list]] = {}
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}.") from error
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                key, messages, correct, ended = row["key"], row["messages"], row["correct"], row["ended"]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{path}:{number}: is no conversation of scripts/evaluate.py ({error}).", "conversation"
                ) from error
            sides = questions.setdefault(key, ([], []))
            if ended not in UNFINISHED and messages not in sides[not correct]:
                sides[not correct].append(messages)
    return questions


def draw(key: str, right: list, wrong: list, pairs: int, seed: int) -> list[dict]:
    """Rows of one question; what is drawn for it does not depend on the others."""
    rng = random.Random(f"{seed}/{key}")
    drawn = zip(rng.sample(right, len(right)), rng.sample(wrong, len(wrong)), strict=False)
    return [{"chosen": c, "rejected": r, "id": f"{key}-{n}"} for n, (c, r) in enumerate(drawn) if n < pairs]


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
