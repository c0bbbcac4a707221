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
    "train_margin": (16, {2, 3}, {1, 2, 3}, {1, 2, 3}, 150),
    "heldout_margin": (8, {2}, {1, 2}, {1, 2}, 150),
    "train_weights": (16, {2, 3}, {1, 2, 3}, {1, 2}, 150),
}
FIELDS = {"train_margin": ["margin"], "heldout_margin": ["margin"]}  # beside those of every row
ROWS = {name: [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().splitlines()] for name in EXPECTED}
ATTEMPTS = [json.loads(line) for line in (DATA / "trajectories.jsonl").read_text().splitlines()]
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


def parting_message(row):
    same = [a == b for a, b in zip(row["chosen"], row["rejected"], strict=False)]
    return same.index(False)


def parting_turn(row):
    """Number of the first assistant turn in which the sides differ."""
    return parting_message(row) // 2 + 1


def test_making_them_again_gives_the_same_bytes(tmp_path):
    subprocess.run(
        [sys.executable, ROOT / "recipes/smollm2-135m/data/make_pairs.py", tmp_path], check=True, capture_output=True
    )
    files = [*EXPECTED, "trajectories"]
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(files)
    for name in files:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (DATA / f"{name}.jsonl").read_bytes(), name


LOOP = {"loop_sft": 160, "loop_tasks": 120, "loop_heldout": 300, "loop_known": 300}


def test_making_the_loop_s_questions_again_gives_the_same_bytes(tmp_path):
    script = ROOT / "recipes/smollm2-135m/data/make_tasks.py"
    subprocess.run([sys.executable, script, tmp_path], check=True, capture_output=True)
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(LOOP)
    asked = {question(row) for rows in ROWS.values() for row in rows}
    asked |= {row["messages"][0]["content"].partition("\n\n")[2] for row in ATTEMPTS}
    for name, n in LOOP.items():
        text = (DATA / f"{name}.jsonl").read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        assert text == (tmp_path / f"{name}.jsonl").read_text() and len(rows) == n, name
        own = {row["question"] if "question" in row else row["messages"][0]["content"].split("\n\n")[1] for row in rows}
        assert len(own) == n and not own & asked, name
        asked |= own
        numbers = [set(re.findall(r"\d+", row.get("question", ""))) for row in rows]
        assert all(row.get("answer") not in known for row, known in zip(rows, numbers, strict=True)), name
    sft = [json.loads(line) for line in (DATA / "loop_sft.jsonl").open()]
    for row in sft:
        assert str(boxed(row["messages"])) == blocks(row["messages"])[-1][1].strip(), row["key"]


def test_form():
    for row, messages in SIDES:
        name = row["id"].rpartition("-")[0]
        assert sorted(row) == sorted(["chosen", "id", "kind", "rejected", *FIELDS.get(name, [])])
        assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2), row["id"]
        assert row["chosen"][0] == row["rejected"][0], row["id"]
        assert "```" not in messages[-1]["content"] and boxed(messages) > 0, row["id"]
        for message in messages:
            weighted = name == "train_weights" and message["role"] == "assistant"
            assert sorted(message) == ["content", "role"] + ["weight"] * weighted
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


def test_margins_say_how_the_wrong_answer_came_about():
    """1 where code with a slip was run, 2 where the number that is stated is not what any code had printed."""
    rows = ROWS["train_margin"] + ROWS["heldout_margin"]
    for row in rows:
        printed = [output.strip() for _, output in blocks(row["rejected"])]
        assert row["margin"] == (1.0 if str(boxed(row["rejected"])) in printed else 2.0), row["id"]
    assert Counter(row["margin"] for row in rows) == {1.0: 48, 2.0: 48}


def test_weights_say_where_the_sides_part():
    """0 before, the same on both sides; 1 for the turn in which they part; a quarter for every turn behind it."""
    seen = Counter()
    for row in ROWS["train_weights"]:
        at = parting_message(row)
        for side in ("chosen", "rejected"):
            weights = [message["weight"] for message in row[side][1::2]]
            before, behind = at // 2, len(weights) - at // 2 - 1
            assert weights == [0.0] * before + [1.0] + [0.25] * behind, row["id"]
            seen.update(weights)
    assert min(seen[weight] for weight in (0.0, 0.25, 1.0)) >= 32


def test_trajectories_are_three_attempts_at_each_task():
    """One is right; calls and results pair up by id, and the results are what the code prints."""
    tasks = {}
    for row in ATTEMPTS:
        assert sorted(row) == ["messages", "reward", "task", "tools"]
        tasks.setdefault(row["task"], []).append(row)
    assert len(ATTEMPTS) == 48 and len(tasks) == 16
    assert not {row["messages"][0]["content"] for row in ATTEMPTS} & {side[0]["content"] for _, side in SIDES}
    for rows in tasks.values():
        assert [row["reward"] for row in rows] == [1.0, 0.0, 0.0]
        assert len({row["messages"][0]["content"] for row in rows}) == 1
        right, *wrong = (boxed(row["messages"]) for row in rows)
        assert right not in wrong
    calls = [call for row in ATTEMPTS for call in called(row["messages"])]
    assert len(calls) >= 48
    for code, printed in random.Random(0).sample(calls, 12):
        done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=20)
        assert (done.returncode, done.stdout.rstrip("\n")) == (0, printed), code


def called(messages):
    """[(code of a call, its result)] of a trajectory."""
    found = []
    for message, after in zip(messages, messages[1:], strict=False):
        if call := message.get("tool_calls"):
            assert message["role"] == "assistant" and message["content"] is None and len(call) == 1
            assert (after["role"], after["tool_call_id"]) == ("tool", call[0]["id"])
            found.append((json.loads(call[0]["function"]["arguments"])["code"], after["content"]))
    return found


def test_no_question_comes_twice_and_heldout_is_new():
    questions = {name: [question(row) for row in rows] for name, rows in ROWS.items()}
    everything = sum(questions.values(), [])
    assert len(everything) == len(set(everything)) == 560
    # What is left of a question without numbers and names is its template.
    seen, new = {}, {}
    for kept, names in (
        (seen, ("train_short", "train_long", "train_margin", "train_weights")),
        (new, ("heldout", "heldout_margin")),
    ):
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
