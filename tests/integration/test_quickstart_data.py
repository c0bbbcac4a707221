"""The shipped preference pairs of recipes/smollm2-135m are what data/make_pairs.py there makes, and are right."""

import json
import random
import re
import subprocess
import sys
from collections import Counter

import pytest
from repository import ROOT

DATA = ROOT / "recipes" / "smollm2-135m" / "data"
TOKENIZER = ROOT / "models" / "smollm2-135m-instruct" / "tokenizer.json"
KINDS = ["ignores_output", "no_check", "wrong_operator", "wrong_quantity"]
# file: (pairs of each kind, assistant turns in chosen, in rejected, turns at which the sides part, most tokens a side)
EXPECTED = {
    "train_short": (24, {2, 3}, {1, 2, 3}, {1, 2, 3}, 150),
    "train_long": (60, {2, 3, 4}, {1, 2, 3, 4}, {1, 2, 3, 4}, 450),
    "heldout": (16, {2}, {1, 2}, {1, 2}, 150),
}
ROWS = {name: [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().splitlines()] for name in EXPECTED}
SIDES = [(row, row[side]) for rows in ROWS.values() for row in rows for side in ("chosen", "rejected")]


def question(row):
    return row["chosen"][0]["content"].split("\n\n", 1)[1]


def boxed(messages):
    (answer,) = re.findall(r"\\boxed\{(\d+)\}", messages[-1]["content"])
    return int(answer)


def blocks(messages):
    """[(code, what the following message says it printed)] of one side."""
    found = []
    for said, heard in zip(messages[1::2], messages[2::2], strict=False):
        (code,) = re.findall(r"```python\n(.*?)```", said["content"], re.DOTALL)
        found.append((code, re.fullmatch(r"```output\n(.*)```", heard["content"], re.DOTALL)[1]))
    return found


def parting_turn(row):
    """Number of the first assistant turn in which the sides differ."""
    same = [a == b for a, b in zip(row["chosen"], row["rejected"], strict=False)]
    return same.index(False) // 2 + 1


def test_making_them_again_gives_the_same_bytes(tmp_path):
    subprocess.run(
        [sys.executable, ROOT / "recipes/smollm2-135m/data/make_pairs.py", tmp_path], check=True, capture_output=True
    )
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(EXPECTED)
    for name in EXPECTED:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (DATA / f"{name}.jsonl").read_bytes(), name


def test_form():
    for row, messages in SIDES:
        assert sorted(row) == ["chosen", "id", "kind", "rejected"]
        assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2), row["id"]
        assert row["chosen"][0] == row["rejected"][0], row["id"]
        assert "```" not in messages[-1]["content"] and boxed(messages) > 0, row["id"]
        for message in messages:
            assert sorted(message) == ["content", "role"]
            assert message["content"].isascii() and not re.search(r"[ \t]\n|\s$", message["content"]), row["id"]
    for name, rows in ROWS.items():
        assert [row["id"] for row in rows] == [f"{name}-{index:03d}" for index in range(len(rows))]


def test_chosen_is_right_and_rejected_is_wrong_in_the_way_its_kind_says():
    for row in (row for rows in ROWS.values() for row in rows):
        right, wrong, kind = blocks(row["chosen"]), blocks(row["rejected"]), row["kind"]
        truth, claim = boxed(row["chosen"]), boxed(row["rejected"])
        assert truth == int(right[-1][1]) and claim != truth, row["id"]
        if kind == "ignores_output":
            assert wrong == right and row["chosen"][:-1] == row["rejected"][:-1], row["id"]
        elif kind == "no_check":
            assert wrong == right[: len(wrong)] and len(wrong) < len(right), row["id"]
        else:
            assert claim == int(wrong[-1][1]) and len(wrong) == len(right), row["id"]
            # The first code that differs: an operator at one place, or a number that the question does not have.
            good, bad = next((a.split(), b.split()) for (a, _), (b, _) in zip(right, wrong, strict=True) if a != b)
            (before, after), *more = [(a, b) for a, b in zip(good, bad, strict=True) if a != b]
            assert not more, row["id"]
            if kind == "wrong_operator":
                assert before in ("-", "*", "//", "%") and after == "+", row["id"]
            else:
                assert re.sub(r"\d+", "", before) == re.sub(r"\d+", "", after), row["id"]
                (number,) = set(re.findall(r"\d+", after)) - set(re.findall(r"\d+", before))
                assert number not in re.findall(r"\d+", question(row)), row["id"]


@pytest.mark.parametrize("name", EXPECTED)
def test_kinds_and_turns_are_all_there_and_as_the_readme_says(name):
    of_each, chosen_turns, rejected_turns, parting, _ = EXPECTED[name]
    rows = ROWS[name]
    assert Counter(row["kind"] for row in rows) == dict.fromkeys(KINDS, of_each)
    chosen, rejected = (Counter(len(row[side]) // 2 for row in rows) for side in ("chosen", "rejected"))
    assert set(chosen) == chosen_turns and set(rejected) == rejected_turns
    assert {parting_turn(row) for row in rows} == parting
    counts = [str(counter[turns]) for counter in (chosen, rejected) for turns in (1, 2, 3, 4)]
    line = " | ".join([f"| `{name}.jsonl`", str(len(rows)), str(of_each), *counts]) + " |"
    assert line in (DATA / "README.md").read_text(), line


def test_no_question_comes_twice_and_heldout_is_new():
    questions = {name: [question(row) for row in rows] for name, rows in ROWS.items()}
    everything = sum(questions.values(), [])
    assert len(everything) == len(set(everything)) == 400
    # What is left of a question without numbers and names is its template.
    seen, new = {}, {}
    for kept, names in ((seen, ("train_short", "train_long")), (new, ("heldout",))):
        text = [asked for name in names for asked in questions[name]]
        kept["numbers"] = {number for asked in text for number in re.findall(r"\d+", asked)}
        kept["words"] = [re.findall(r"\b[a-z]{2,}\b", asked) for asked in text]
        kept["templates"] = {" ".join(words) for words in kept["words"]}
    assert not seen["numbers"] & new["numbers"]
    assert not seen["templates"] & new["templates"]
    assert len(seen["templates"]) == 27 and len(new["templates"]) == 12


def test_a_sample_of_the_code_prints_what_the_output_blocks_say():
    found = [block for _, messages in SIDES for block in blocks(messages)]
    assert len(found) > 1000
    for code, printed in random.Random(0).sample(found, 40):
        done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=20)
        assert (done.returncode, done.stdout) == (0, printed), code


@pytest.mark.skipif(not TOKENIZER.exists(), reason="needs models/smollm2-135m-instruct: scripts/prepare_quickstart.py")
@pytest.mark.parametrize("name", EXPECTED)
def test_no_side_is_longer_than_its_file_allows(name):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    system = {"role": "system", "content": "You are a helpful AI assistant named SmolLM, trained by Hugging Face"}
    for row in ROWS[name]:
        for side in ("chosen", "rejected"):
            turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in [system, *row[side]]]
            assert len(tokenizer.encode("".join(turns)).ids) <= EXPECTED[name][-1], row["id"]
