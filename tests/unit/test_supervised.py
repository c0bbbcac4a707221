"""mdpo/rollouts/supervised.py: what SFT learns of a trajectory, by hand and by TRL's own labels."""

import json
import os
from types import SimpleNamespace

import pytest
import sft_rows as sft_script
from errors import refused
from long_trajectories import FIRST, SAMPLES, check_peak, write_long
from tiny import CHATML, tiny_llama, tokenizer_for, trl_template

from mdpo.masking.chat_template import ChatTemplate
from mdpo.rollouts.pairing import HALF
from mdpo.rollouts.supervised import sft_rows

TURNS = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "x"},
    {"role": "user", "content": "r"},
    {"role": "assistant", "content": "y"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_for(CHATML, "byte", eos="<|im_end|>")


def rows_of(tmp_path, tokenizer, *rows: dict, max_length: int | None = None, **options):
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows, report = sft_rows([path], ChatTemplate(tokenizer), max_length, **options)
    return list(rows), report


def learned(tokenizer, row: dict) -> str:
    """The text of the row, with what is learned in brackets."""
    text = ""
    for token, mask in zip(row["input_ids"], row["assistant_masks"], strict=True):
        text += ("[{}]" if mask else "{}").format(tokenizer.decode([token]))
    return text.replace("][", "")


def test_the_turns_are_learned_and_their_stops(tmp_path, tokenizer):
    (row,), report = rows_of(tmp_path, tokenizer, {"messages": TURNS})
    assert learned(tokenizer, row) == (
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n[x<|im_end|>]\n"
        "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n[y<|im_end|>]\n"
    )
    assert report.lines() == [f"1 of 1 trajectories, 1 sequences: {len(row['input_ids'])} tokens, 4 of them learned"]
    (row,), _ = rows_of(tmp_path, tokenizer, {"messages": TURNS, "prompt_messages": 3})
    assert learned(tokenizer, row).endswith("assistant\n[y<|im_end|>]\n") and learned(tokenizer, row).count("[") == 1


def test_what_was_sampled_is_taken_as_it_was(tmp_path, tokenizer):
    sequences = [{"input_ids": [5, 6, 7], "assistant_masks": [0, 1, 1], "logprobs": [None, -1, -2]},
                 {"input_ids": [5, 8], "assistant_masks": [0, 1]}]  # fmt: skip
    rows, report = rows_of(tmp_path, tokenizer, {"messages": TURNS, "sequences": sequences, "reward": 1})
    assert rows == [{k: s[k] for k in ("input_ids", "assistant_masks")} for s in sequences]
    assert (report.sequences, report.tokens, report.learned) == (2, 5, 3)


def test_what_is_left_out_is_counted(tmp_path, tokenizer):
    beyond = [{"input_ids": [5, 10**6], "assistant_masks": [0, 1]}]
    rows, report = rows_of(
        tmp_path, tokenizer,
        {"messages": TURNS, "reward": 0.5}, {"messages": TURNS, "correct": False}, {"messages": TURNS, "reward": None},
        {"messages": TURNS, "reward": 1, "ended": "cut"}, {"messages": TURNS[:1]}, {"no": 1},
        {"messages": [{"role": "user", "content": "\ud83d"}, *TURNS[1:]]}, {"messages": TURNS, "sequences": beyond},
        {"messages": [*TURNS, *TURNS]}, {"messages": TURNS, "reward": 2},
        max_length=40,
    )  # fmt: skip
    left = dict(report.left_out)
    assert len(rows) == report.taken == 1 and report.trajectories == 10 == sum(left.values()) + 1
    assert left["of a reward below 1"] == 2 and left["longer than max_length 40"] == 1
    assert left[HALF] == 1
    assert left["without a reward"] == left["not ended by the policy"] == left["no assistant turn"] == 1
    assert rows_of(tmp_path, tokenizer, {"messages": TURNS, "reward": 0.5}, min_reward=0.5)[1].taken == 1


def test_a_reward_that_is_no_number_is_named(tmp_path, tokenizer):
    for bad in ("good", float("nan")):
        with refused("reward", "t.jsonl:2", repr(bad)):
            rows_of(tmp_path, tokenizer, {"messages": TURNS}, {"messages": TURNS, "reward": bad})


@pytest.fixture
def script(tmp_path, monkeypatch):
    """A function: tokenizer -> the script's command on t.jsonl."""

    def command(tokenizer) -> list[str]:
        training = SimpleNamespace(max_length=None, trust_remote_code=False)
        data = SimpleNamespace(chat_template_kwargs={})
        recipe = SimpleNamespace(path="r.yaml", notes=[], model=None, data=data, training=training)
        for name, value in {"load_recipe": recipe, "load_tokenizer": tokenizer, "fix_day": []}.items():
            monkeypatch.setattr(sft_script, name, lambda *_, value=value: value)
        return [str(tmp_path / "t.jsonl"), "--recipe=r.yaml", f"--out={tmp_path}/rows"]

    return command


def test_a_long_file_is_read_in_little_memory(tmp_path, tokenizer, script):
    """By the script, which writes the rows as they are made; without any it makes no folder."""
    write_long(path := tmp_path / "t.jsonl", 120)
    command = script(tokenizer)
    with refused("trajectories"):
        sft_script.main([*command, "--min_reward=2"])
    assert os.listdir(tmp_path) == ["t.jsonl"]
    check_peak(path, lambda: sft_script.main(command))
    assert os.listdir(tmp_path / "rows") == ["train.jsonl"]
    rows = [json.loads(line) for line in (tmp_path / "rows/train.jsonl").open()]
    assert [row["input_ids"][0] for row in rows] == [FIRST + n for n in range(120) if n % SAMPLES < SAMPLES - 1]


def test_tools_are_read_as_those_of_pairs(tmp_path):
    """JSON text and bare functions give the prompt that wrapped ones give."""
    tokenizer = tokenizer_for(trl_template("qwen2_5"), "byte", eos="<|im_end|>")
    bare = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}
    wrapped = [{"type": "function", "function": bare}]
    forms = [rows_of(tmp_path, tokenizer, {"messages": TURNS, "tools": tools})[0] for tools in (
        wrapped, [bare], json.dumps(wrapped))]  # fmt: skip
    assert forms[0] == forms[1] == forms[2] != rows_of(tmp_path, tokenizer, {"messages": TURNS})[0]


def test_trl_learns_these_tokens_and_no_others(tmp_path, tokenizer):
    """Its labels are the ids where the mask is 1, else -100."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows, _ = rows_of(tmp_path, tokenizer, {"messages": TURNS}, {"messages": TURNS[:2]})
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=100)
    trainer = SFTTrainer(tiny_llama(tokenizer), args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    batch = trainer.data_collator([trainer.train_dataset[n] for n in range(2)])
    for row, labels in zip(rows, batch["labels"].tolist(), strict=True):
        expected = [i if m else -100 for i, m in zip(row["input_ids"], row["assistant_masks"], strict=True)]
        assert labels == expected + [-100] * (len(labels) - len(expected))


@pytest.mark.parametrize("tags", ["<tool_call>", "<call>"])
def test_tools_that_sampling_would_describe_otherwise_are_said(tmp_path, script, capsys, tags):
    source = trl_template("qwen2_5").replace("<tool_call>", tags)
    tools = [{"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}]
    (tmp_path / "t.jsonl").write_text(json.dumps({"messages": TURNS, "tools": tools}))
    sft_script.main(script(tokenizer_for(source, "byte", eos="<|im_end|>")))
    assert ("in other words" in capsys.readouterr().out) == (tags == "<call>")
