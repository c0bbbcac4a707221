"""benchmarks/bench_dpo.py: its workloads have the pairs that they claim, the sides' losses are compared, and a tiny run
of branches and of thinking goes through. Nothing is timed here."""

import math
from dataclasses import replace
from functools import partial

import pytest
from datasets import Dataset
from repository import benchmark
from tiny import tiny_llama, tokenizer_for

from mdpo.data.tokenize import tokenize_dataset
from mdpo.masking.loss_mask import RenderSettings
from mdpo.types import SIDES, sequence_lengths, split


@pytest.fixture(scope="module")
def bench_dpo():
    with benchmark("bench_dpo") as module:
        yield module


@pytest.fixture
def workloads(bench_dpo):
    return bench_dpo.workloads


@pytest.fixture
def letters(workloads):
    """A token a letter and one a control token, so that tokens can be counted in the texts."""
    return tokenizer_for(workloads.WITHOUT_THOUGHTS, "letters", eos="<|im_end|>")


def tokenized(rows, tokenizer):
    return list(tokenize_dataset(Dataset.from_list(rows), tokenizer, RenderSettings(max_length=None), "train")[0])


def sequences(rows):
    return [ids for row in rows for side in SIDES for ids in split(row[f"{side}_ids"], sequence_lengths(row, side))]


def nodes(lists):
    """Nodes of the trie of lists: each beginning once."""
    return len({tuple(ids[: n + 1]) for ids in lists for n in range(len(ids))})


def test_branches_have_the_pairs_and_tokens_that_they_claim(workloads):
    """In words, which are a token each for a real tokenizer: a prompt of 392 with 8 tokens of headers, answers of 149
    on average and an end of turn are 16 · 2 · (400 + 150) = 17,600, and 400 + 8 · 150 = 1,600 distinct, less what
    answers begin with alike."""
    workload = workloads.WORKLOADS["branches"]
    rows = workload.rows(32)
    assert (workload.pairs, workload.together, workload.against, workload.fit) == (16, 16, "trl", True)
    for step in (rows[:16], rows[16:]):
        sides = [tuple(row[side][1]["content"].split()) for row in step for side in SIDES]
        [prompt] = {row[side][0]["content"] for row in step for side in SIDES}
        assert all(len(row[side]) == 2 for row in step for side in SIDES)
        right, wrong = set(sides[::2]), set(sides[1::2])
        assert len(right) == len(wrong) == 4 and not right & wrong
        assert all(sides.count(answer) == 4 for answer in right | wrong)
        assert 32 * (len(prompt.split()) + 8) + sum(len(side) + 1 for side in sides) == 17_600
        shared = nodes([*right, *wrong])
        assert 1_560 < 400 + shared + 8 <= 1_600
    assert rows[0]["chosen"][0] != rows[16]["chosen"][0]
    assert workload.rows(20) == rows[:20]


def test_branches_are_one_tree_a_step(workloads, letters):
    """`distinct` of a pair is the prompt and two answers, less what they begin with; of a whole step, 8 answers."""
    rows = tokenized(workloads.branch_rows(16, prompt=10, answer=12), letters)
    assert all(len(sequence_lengths(row, side)) == 1 for row in rows for side in SIDES)
    assert nodes(sequences(rows)) < sum(row["distinct"] for row in rows) / 3
    assert [row["distinct"] for row in rows] == [nodes(sequences([row])) for row in rows]
    first = rows[0]["chosen_mask"].index(1)
    assert letters.decode(rows[0]["chosen_ids"][:first]).endswith("<|im_end|><|im_start|>assistant\n")
    assert all(row[f"{side}_mask"] == [0] * first + [1] * (len(row[f"{side}_ids"]) - first)
               for row in rows for side in SIDES)  # fmt: skip


def test_thinking_is_four_sequences_a_side(workloads, letters):
    """By hand, in letters: `<|im_start|>user\\n` is 6 tokens, `<|im_start|>assistant\\n` 11, `<|im_end|>` and
    `</think>` 1. The prompt of turn k has the answers before it without their thoughts, and the messages between."""
    messages = workloads.thinking_rows(2)
    rows = tokenized(messages, letters)
    for texts, row in zip(messages, rows, strict=True):
        for side in SIDES:
            contents, lengths, sampled = [m["content"] for m in texts[side]], [], 0
            assert [m["role"] for m in texts[side]] == ["user", "assistant"] * 4
            prompt = 0
            for question, turn in zip(contents[::2], contents[1::2], strict=True):
                prompt += 6 + len(question) + 1 + 11
                thought, answer = turn.split("</think>\n\n")
                lengths.append(prompt + len(thought) + 3 + len(answer) + 1)
                sampled += len(thought) + 3 + len(answer) + 1
                prompt += len(answer) + 1
            assert row[f"{side}_lengths"] == lengths and sum(row[f"{side}_mask"]) == sampled
            assert row[f"{side}_breaks"] == ["earlier thoughts left out by the template"] * 3
        assert row["distinct"] == nodes(sequences([row])) < 0.55 * len(row["chosen_ids"] + row["rejected_ids"])
        assert texts["chosen"][0] == texts["rejected"][0] and texts["chosen"][1] != texts["rejected"][1]


def test_thoughts_that_the_history_keeps_are_one_sequence(workloads, letters):
    """The negative control: with a template that strips nothing, the same rows have one sequence a side."""
    kept = workloads.WITHOUT_THOUGHTS.replace("or loop.last", "or true")
    assert kept != workloads.WITHOUT_THOUGHTS
    for row in tokenized(workloads.thinking_rows(1), tokenizer_for(kept, "letters", eos="<|im_end|>")):
        assert [len(sequence_lengths(row, side)) for side in SIDES] == [1, 1]


def test_pairs_of_one_prompt_stay_together_when_rows_are_shuffled(bench_dpo, workloads):
    rows = workloads.branch_rows(16 * 5, prompt=6, answer=8)
    order = bench_dpo.ordered(rows, 16, together=16)
    prompts = [row["chosen"][0]["content"] for row in order]
    assert [len(set(prompts[i : i + 16])) for i in range(0, 80, 16)] == [1] * 5 and len(set(prompts)) == 5
    assert sorted(map(str, order)) == sorted(map(str, rows))
    alone = [row["chosen"][0]["content"] for row in bench_dpo.ordered(rows, 16)]
    assert len(set(alone[:16])) > 1  # row by row they would not


TRUE = {"num_tokens": [10, 30], "losses": [0.6931, 0.52]}


@pytest.mark.parametrize(
    ("other", "alike", "wanted"),
    [
        (TRUE, True, ""),
        ({**TRUE, "losses": [0.6931, 0.5208]}, True, ""),
        ({**TRUE, "losses": [0.6931, 0.53]}, True, "losses of step 2"),
        ({**TRUE, "losses": [0.6931, 0.53]}, False, ""),
        ({**TRUE, "losses": [0.70, 0.52]}, False, "losses of step 1"),
        ({**TRUE, "losses": [float("nan"), 0.52]}, False, "losses of step 1"),
        ({**TRUE, "num_tokens": [10, 31]}, False, "same rows"),
    ],
)
def test_sides_that_disagree_are_told(bench_dpo, other, alike, wanted):
    for results in ({"trl": TRUE, "ours": other}, {"trl": other, "ours": TRUE}):
        problem = bench_dpo.disagreement(results, alike, bench_dpo.TOLERANCE[False])
        assert wanted in problem and bool(problem) == bool(wanted)
    assert bench_dpo.disagreement({"ours": other}, alike, tolerance=1e-3) == ""  # one side alone


def test_largest_micro_batch_by_hand(bench_dpo):
    """1 pair takes 8, 2 take 11: 4 take 17, 8 take 29, 16 take 53. Of 6 pairs 3, which take 14, divide the step."""
    peaks = {1: 8.0, 2: 11.0}
    wanted = {7.9: 0, 8: 1, 10.9: 1, 11: 2, 16.9: 2, 17: 4, 28.9: 4, 29: 8, 52.9: 8, 53: 16, 1000: 16}
    assert {room: bench_dpo.largest_micro_batch(peaks, 16, room) for room in wanted} == wanted
    assert bench_dpo.largest_micro_batch(peaks, 6, 17) == 3
    assert bench_dpo.largest_micro_batch({1: 8.0, 2: 8.0}, 16, 8) == 16


def test_the_micro_batch_is_found_beside_our_own_peak(bench_dpo, workloads, monkeypatch):
    """Free: 40. Ours takes 8.5, so that 0.95 · 40 - 8.5 = 29.5 are left: 8 pairs by the line above, whose probes are
    runs of two micro-batches a step."""
    probes = []

    def peak(name, rows, pairs, options, sides):
        [side] = sides
        probes.append((side, len(rows), pairs, options["micro"][side], options["steps"]))
        return {side: {"memory": {"ours": 8.5, "trl": 5.0 + 3 * options["micro"][side]}[side]}}

    monkeypatch.setattr(bench_dpo, "compare", peak)
    monkeypatch.setattr(bench_dpo, "free_memory", lambda: 40)
    workload = workloads.WORKLOADS["branches"]
    rows = workloads.branch_rows(48, prompt=6, answer=8)
    assert bench_dpo.fitted("branches", workload, rows, {}) == 8
    assert probes == [("ours", 32, 16, 16, 0), ("trl", 4, 2, 1, 0), ("trl", 8, 4, 2, 0)]
    monkeypatch.setattr(bench_dpo, "free_memory", lambda: 16)
    with pytest.raises(SystemExit, match=r"^branches: "):
        bench_dpo.fitted("branches", workload, rows, {})


@pytest.mark.parametrize("arguments", ["", "--only branches", "--only thinking", "--only=no sharing", "--grow"])
def test_a_micro_batch_that_would_do_nothing_is_refused(arguments, bench_dpo, monkeypatch, capsys):
    """3 divides neither 16 pairs nor 2, and the other workloads take a step in one micro-batch."""
    argv = [arguments] if "=" in arguments else arguments.split()
    monkeypatch.setattr("sys.argv", ["bench_dpo.py", *argv, "--micro-batch", "3"])
    monkeypatch.setattr(bench_dpo, "matmul_rate", None)
    with pytest.raises(SystemExit) as stopped:
        bench_dpo.main()
    assert stopped.value.code == 2 and "--micro-batch: needs" in capsys.readouterr().err


SHORT = {
    "branches": {"prompt": 12, "answer": 14},
    "thinking": {"prompt": 8, "thought": 6, "answer": 4, "output": 4},
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "micro"), [("branches", 4), ("thinking", 1)])
def test_a_tiny_run(name, micro, bench_dpo, workloads, letters, tmp_path, monkeypatch, capsys):
    """Both sides in processes of their own, the other one with accumulated gradients. At this learning rate losses move
    from ln 2, so that agreement says something. Each step's distinct tokens are those of the trie of its pairs."""
    model = str(tmp_path / "model")
    tiny_llama(letters).save_pretrained(model)
    letters.save_pretrained(model)
    workload = workloads.WORKLOADS[name]
    workload = replace(workload, rows=partial(workload.rows, **SHORT[name]))
    monkeypatch.setitem(workloads.WORKLOADS, name, workload)
    options = {"model": model, "dtype": "float32", "steps": 1, "threads": 1, "learning_rate": 1e-4}
    result = bench_dpo.measured(name, options, micro=micro)
    other = workload.against
    pairs = bench_dpo.ordered(workload.rows(3 * workload.pairs), workload.pairs, workload.together)
    steps = [tokenized(pairs[i : i + workload.pairs], letters) for i in range(0, len(pairs), workload.pairs)]
    assert result["ours"]["tokens"] == [nodes(sequences(step)) for step in steps]
    assert result["ours"]["both"] == [sum(map(len, sequences(step))) for step in steps]
    assert result["micro"] == {other: micro} and set(result["seconds"]) == {other, "ours"}
    for side in (other, "ours"):
        first, *later = result[side]["losses"]
        assert first == pytest.approx(math.log(2), abs=1e-5)
        assert len(later) == 2 and max(abs(loss - math.log(2)) for loss in later) > 5 * bench_dpo.TOLERANCE[False]
        assert result[side]["memory"] > 1e8  # bytes
    assert result["ours"]["losses"] == pytest.approx(result[other]["losses"], abs=2e-4)
    bench_dpo.show([result], [1e9])
    [line] = [line for line in capsys.readouterr().out.splitlines() if f"│ {name} " in line]
    assert other in line and f"{workload.pairs} ({workload.pairs // micro} × {micro})" in line
