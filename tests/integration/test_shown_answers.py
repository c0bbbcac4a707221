"""Greedy answers before and after training: which turns, what the policy writes, and that training is as without."""

import json
from types import SimpleNamespace

import pytest
import torch
from tiny import CHATML, agent_rows, tokenizer_for
from trainers import mdpo_trainer
from transformers import TrainerCallback

from mdpo.reporting.answer_lines import lines_of, short
from mdpo.reporting.greedy import LEAST, MOST, Turn, text_of
from mdpo.reporting.shown_answers import show_answers, turns_of
from mdpo.runs.output_dir import ANSWERS

TOKENIZER = tokenizer_for(CHATML, "byte", eos="<|im_end|>")


def trained(folder, shown=2, callbacks=(), resume=None, **options):
    """(trainer, its page) after two steps; with checkpoints of both."""
    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1} | options
    trainer, page = mdpo_trainer(folder, TOKENIZER, show_answers=shown, **options), SimpleNamespace(answers=[])
    show_answers(trainer, TOKENIZER, trainer.eval_dataset, page)
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, page


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("run"))


def test_turns_of_a_pair(run):
    """Two turns: the question, then what the program printed."""
    trainer, _ = run
    first, second, *others = turns_of(trainer.eval_dataset.select([0, 1]), TOKENIZER)
    row, messages = trainer.eval_dataset[0], agent_rows(8)[0]["chosen"]
    assert (first.pair, first.number, second.number, others[0].pair, others[0].number) == (0, 1, 2, 1, 1)
    assert first.asked == f"user\n{messages[0]['content']}" and messages[2]["content"] in second.asked
    assert TOKENIZER.decode(first.ids) == f"{messages[1]['content']}<|im_end|>"
    assert second.prompt + second.ids == row["chosen_ids"][: len(second.prompt + second.ids)]
    assert first.limit == max(LEAST, 2 * len(first.ids)) and Turn(0, "", 1, "", [1], [2] * 900).limit == MOST


def test_a_weight_0_or_several_sequences_change_nothing_in_the_turns():
    row = {"chosen_ids": [1, 2, 3, 1, 4], "chosen_mask": [0, 1, 0, 0, 1], "chosen_lengths": [3, 2], "key": "a"}
    assert [(t.prompt, t.ids) for t in turns_of([row], TOKENIZER)] == [([1], [2]), ([1], [4])]
    assert turns_of([{**row, "chosen_mask": [1, 0, 0, 0, 0]}], TOKENIZER) == []  # nothing asks for it


def test_answers_are_the_policy_s_own_greedy_ones(run):
    trainer, page = run
    turns = turns_of(trainer.eval_dataset.select([0, 1]), TOKENIZER)
    assert [row["turn"] for row in page.answers] == [1, 2, 1, 2] and len(turns) == 4
    for turn, row in zip(turns, page.answers, strict=True):
        ids = list(turn.prompt)
        with torch.no_grad():
            while len(ids) < len(turn.prompt) + turn.limit and (
                ids[-1:] != [TOKENIZER.eos_token_id] or ids == turn.prompt
            ):
                ids.append(trainer.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
        new = ids[len(turn.prompt) :]
        assert row["after"] == {
            "text": text_of(new, TOKENIZER),
            "cut": new[-1] != TOKENIZER.eos_token_id,
            "as_chosen": new == turn.ids,
        }
        assert row["before"] is not None and row["chosen"] in TOKENIZER.decode(turn.ids)


class States(TrainerCallback):
    """The generator's state and the model's mode at each step."""

    def __init__(self):
        self.seen = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.seen.append((torch.get_rng_state().tolist(), model.training, model.generation_config.to_dict()))


@pytest.mark.parametrize("options", [{}, {"disable_dropout": False, "shared_prefix": False}])
def test_training_is_bit_for_bit_as_without(options, tmp_path):
    logs, states = [], []
    for shown in (0, 3):
        states.append(States())
        trainer, page = trained(tmp_path / str(shown), shown, [states[-1]], **options)
        assert len(page.answers) == 2 * shown
        of_time = ("runtime", "second", "num_", "memory")
        logs.append(
            [{k: v for k, v in log.items() if not any(w in k for w in of_time)} for log in trainer.state.log_history]
        )
    assert logs[0] == logs[1]
    assert states[0].seen == states[1].seen


def test_a_resumed_run_has_those_of_before_training(run, tmp_path, capsys):
    trainer, page = run
    checkpoint = f"{trainer.args.output_dir}/checkpoint-1"
    again, resumed = trained(tmp_path, resume=checkpoint)
    assert "those before training are missing" in capsys.readouterr().out
    assert [row["before"] for row in resumed.answers] == [None] * 4
    assert [row["after"] for row in resumed.answers] == [row["after"] for row in page.answers]
    stored = (tmp_path / again.args.output_dir) / ANSWERS
    for text in ("{", "[]", '{"a": 1}'):
        stored.write_text(text)
        assert trained(tmp_path, resume=checkpoint)[1].answers[0]["before"] is None
    stored.write_text(json.dumps({"0 row:1 turn 1": {}}))
    source = f"{trainer.args.output_dir}/{ANSWERS}"
    stored.write_text(open(source, encoding="utf-8").read())
    assert trained(tmp_path, resume=checkpoint)[1].answers == page.answers


def test_off_by_default(tmp_path):
    trainer, page = trained(tmp_path, shown=0)
    assert page.answers == [] and not (tmp_path / trainer.args.output_dir / ANSWERS).exists()


def answer(text, cut=False, as_chosen=False):
    return {"text": text, "cut": cut, "as_chosen": as_chosen}


def test_lines_for_a_terminal():
    rows = [
        {"key": "a", "turn": 1, "asked": "x" * 60 + "How many?", "chosen": "```\n1\n```", "before": answer("no", True),
         "after": answer("```\n1\n```", as_chosen=True)},
        {"key": "a", "turn": 2, "asked": "1", "chosen": "one", "before": answer("two"), "after": None},
    ]  # fmt: skip
    assert lines_of(rows, width=40, most=1) == [
        "Greedy answers to 2 chosen turns of held-out pairs, in their context:",
        "  before  0 as chosen, 1 without an end",
        "  after   1 as chosen, 0 without an end",
        "a turn 1: xxxxxxxxx…xxxxxxxxxxxHow many?",
        "  chosen  ```↵1↵```",
        "  before  (no end) no",
        "  after   as chosen",
        "1 more turns are in run_report.html.",
    ]
    assert lines_of(rows[1:])[2:] == [
        "  after   missing",
        "a turn 2: 1",
        "  chosen  one",
        "  before  two",
        "  after   missing",
    ]
    assert short("abcdef", 4) == "abc…" and short("abc\n", 4) == "abc"


def test_a_policy_cannot_move_the_cursor():
    ids = TOKENIZER("a\x1b[2Jb\tc\nd")["input_ids"]
    assert text_of(ids, TOKENIZER) == "a\u241b[2Jb\tc\nd"
