"""Greedy answers to a few held-out pairs, before training and after it: pairs are not the policy.

The policy continues the first `show_answers` held-out pairs turn by turn, each turn in the context of the chosen side,
so no tool is run.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from mdpo.console import say
from mdpo.errors import DropPair, UserError
from mdpo.masking.chat_template import ChatTemplate
from mdpo.masking.stops import any_of
from mdpo.reporting.greedy import Answer, Turn, answers, text_of
from mdpo.runs.checkpoints import writing
from mdpo.runs.output_dir import ANSWERS
from mdpo.sequences import sequence_lengths, split
from mdpo.storage import replace_text


class ShownAnswers(TrainerCallback):
    """Generates at the beginning and at the end of training, all ranks together. Those of the beginning are kept in
    output_dir, for a start that resumes."""

    def __init__(self, trainer, tokenizer, held_out, page):
        self.trainer, self.tokenizer, self.page = trainer, tokenizer, page
        self.turns = turns_of(held_out.select(range(min(trainer.args.show_answers, len(held_out)))), tokenizer)
        self.before: dict[str, Answer] = {}
        self.after: dict[str, Answer] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        file = Path(args.output_dir, ANSWERS)
        if state.global_step:
            self.before = _read(file)
            if not self.before:
                say(f"show_answers: those before training are missing: this start resumes, and {file} is not there.")
        else:
            self.before = answers(self.trainer, self.turns, self.tokenizer)
            if state.is_world_process_zero:
                with writing(file):
                    replace_text(file, json.dumps({name: asdict(answer) for name, answer in self.before.items()}))
        self.page.answers = self.rows()

    def on_train_end(self, args, state, control, **kwargs):
        self.after = answers(self.trainer, self.turns, self.tokenizer)
        self.page.answers = self.rows()

    def rows(self) -> list[dict[str, Any]]:
        """{"key", "turn", "asked", "chosen", "before", "after"} of each turn; an answer is {"text", "cut",
        "as_chosen"}, None where it is missing."""
        found = []
        for turn in self.turns:
            both = {name: getattr(self, name).get(turn.name) for name in ("before", "after")}
            row = {
                "key": turn.key,
                "turn": turn.number,
                "asked": turn.asked,
                "chosen": text_of(turn.ids, self.tokenizer),
            }
            found.append(row | {name: answer and asdict(answer) for name, answer in both.items()})
        return found


def show_answers(trainer, tokenizer, held_out, page) -> None:
    """Has the trainer show answers on `page`, a RunPage, where its recipe asks for any."""
    if trainer.args.show_answers:
        trainer.add_callback(ShownAnswers(trainer, tokenizer, held_out, page))


def turns_of(pairs, tokenizer) -> list[Turn]:
    """The chosen turns of tokenized pairs, in order."""
    asked_in, found = _Asked(tokenizer), []
    for i, row in enumerate(pairs):
        lengths, number, key = sequence_lengths(row, "chosen"), 0, str(row.get("key") or f"pair {i}")
        for ids, mask in zip(split(row["chosen_ids"], lengths), split(row["chosen_mask"], lengths), strict=True):
            end = 0
            for begin, stop in _runs(mask):
                number += 1
                if begin:  # nothing asks for what a sequence begins with
                    found.append(Turn(i, key, number, asked_in(ids[end:begin]), ids[:begin], ids[begin:stop]))
                end = stop
    return found


def _runs(mask: list[int]) -> Iterator[tuple[int, int]]:
    """(begin, end) of each run of ones. Example: [0, 1, 1, 0, 1] -> (1, 3), (4, 5)."""
    edges = [t for t, (a, b) in enumerate(zip([0, *mask], [*mask, 0], strict=True)) if a != b]
    return zip(edges[::2], edges[1::2], strict=True)


class _Asked:
    """The last message in the ids between two turns, as text, with its role where the template writes one before it."""

    def __init__(self, tokenizer):
        self.tokenizer, self.special, self.opening = tokenizer, any_of(tokenizer.all_special_tokens), ""
        try:
            template = ChatTemplate(tokenizer, locates=False)
            self.opening = template.render([{"role": "user", "content": "Qz0"}], generation=True).partition("Qz0")[2]
        except (UserError, DropPair):  # plain strings, or a template that wants more than a user's message
            pass

    def __call__(self, ids: list[int]) -> str:
        text = self.tokenizer.decode(ids).removesuffix(self.opening)
        return next((part.strip() for part in reversed(self.special.split(text)) if part.strip()), text.strip())


def _read(file: Path) -> dict[str, Answer]:
    """Of an earlier start; {} where there is none, or another program has written it."""
    try:
        return {name: Answer(**answer) for name, answer in json.loads(file.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
