"""Rows with several answers to one prompt: which of them are compared, by hand; what is a tie; what has no effect."""

import json
import random

import pytest
from datasets import Dataset, IterableDataset
from errors import dropped, refused
from tiny import CHATML, tokenizer_for

from mdpo.data.groups import SEVERAL, TIE, AnswerPairs, conversations_in, rows_of_two
from mdpo.data.tokenize import tokenize_dataset, tokenize_row, tokenize_stream
from mdpo.masking.chat_template import ChatTemplate
from mdpo.masking.loss_mask import RenderSettings

ASK = [{"role": "user", "content": "Which river runs through Lyon?"}]
REWARDS = [1.0, 0.0, 0.5, 0.0]
TEXTS = ["The Rhone.", "The Danube.", "The Rhone, or so.", "The Elbe."]


def answer(text):
    return [{"role": "assistant", "content": text}]


def sampled(**more):
    return {"key": "a.jsonl:3", "prompt": ASK, "responses": TEXTS, "rewards": REWARDS, **more}


@pytest.mark.parametrize(
    ("settings", "pairs"),
    [
        ({}, [(0, 1)]),
        ({"pairs": "all"}, [(0, 1), (0, 3), (0, 2), (2, 1), (2, 3)]),
        ({"pairs": "all", "max_pairs_per_prompt": 3}, [(0, 1), (0, 3), (0, 2)]),
        ({"pairs": "all", "min_reward_gap": 0.6}, [(0, 1), (0, 3)]),
        ({"pairs": "adjacent"}, [(0, 2), (2, 1)]),
        ({"pairs": "adjacent", "max_pairs_per_prompt": 1}, [(0, 2)]),
        ({"pairs": "adjacent", "min_reward_gap": 0.6}, []),
        ({"min_reward_gap": 1.0}, [(0, 1)]),
        ({"min_reward_gap": 1.1}, []),
    ],
)
def test_which_answers_are_compared(settings, pairs):
    assert AnswerPairs(**settings).of_rewards(REWARDS, "a") == pairs


def test_an_answer_without_a_reward_is_compared_with_none():
    assert AnswerPairs("all").of_rewards([None, 2.0, None, 1.0], "a") == [(1, 3)]
    assert AnswerPairs("all").of_rewards([None, 2.0], "a") == AnswerPairs().of_rewards([], "a") == []


def test_random_ones_are_the_same_in_each_run_and_others_elsewhere():
    every = AnswerPairs("all").of_rewards(REWARDS, "a")
    one, three = AnswerPairs("random"), AnswerPairs("random", max_pairs_per_prompt=3)
    assert one.of_rewards(REWARDS, "a") == one.of_rewards(REWARDS, "a") == [random.Random("a").sample(every, 5)[0]]
    drawn = three.of_rewards(REWARDS, "a")
    assert len(set(drawn)) == 3 and set(drawn) < set(every)
    assert {tuple(one.of_rewards(REWARDS, f"row {n}")) for n in range(60)} == {(pair,) for pair in every}


def test_each_pair_is_a_row_of_its_own_form():
    """The columns keep two answers each, so that prompt, margin and form are read as for any row."""
    rows, several = rows_of_two(sampled(source="web"), AnswerPairs("adjacent"))
    assert several and rows == [
        {**sampled(source="web"), "responses": [TEXTS[i], TEXTS[j]], "rewards": [REWARDS[i], REWARDS[j]],
         "key": f"a.jsonl:3 (answers {i + 1} and {j + 1})"} for i, j in ((0, 2), (2, 1))
    ]  # fmt: skip
    (only,), _ = rows_of_two(sampled(), AnswerPairs())
    assert only["key"] == "a.jsonl:3"
    ranked = [{"rank": rank, "completion": text} for rank, text in zip((2, 0, 1), TEXTS, strict=False)]
    rows, _ = rows_of_two({"key": "k", "prompt": ASK, "completions": ranked}, AnswerPairs("adjacent"))
    assert [[c["rank"] for c in row["completions"]] for row in rows] == [[0, 1], [1, 2]]
    rated = {"key": "k", "input": "Which?", "generations": TEXTS, "ratings": [1, None, 3, 3]}
    rows, _ = rows_of_two(rated, AnswerPairs("all"))
    assert [row["ratings"] for row in rows] == [[3, 1], [3, 1]] and rows[1]["generations"] == [TEXTS[3], TEXTS[0]]


@pytest.mark.parametrize("wrap", [list, lambda m: {"messages": m}, json.dumps], ids=["lists", "objects", "JSON"])
def test_sides_that_are_lists_of_conversations(wrap):
    good, bad = [[*ASK, *answer(text)] for text in TEXTS[:2]], [[*ASK, *answer(text)] for text in TEXTS[2:]]
    row = {"key": "k", "chosen": good[0], "rejected": [wrap(side) for side in bad]}
    rows, several = rows_of_two(row, AnswerPairs())
    assert several and [r["chosen"] for r in rows] == [good[0]] * 2
    assert [r["key"] for r in rows] == ["k (answers 1 and 1)", "k (answers 1 and 2)"]
    both, _ = rows_of_two({**row, "chosen": [wrap(side) for side in good]}, AnswerPairs(max_pairs_per_prompt=3))
    template = ChatTemplate(tokenizer_for(CHATML, "byte", eos="<|im_end|>"))
    words = [
        [template.tokenizer.decode([t for t, m in zip(out[f"{side}_ids"], out[f"{side}_mask"], strict=True) if m])
         for side in ("chosen", "rejected")]
        for out in (tokenize_row(r, 0, template, RenderSettings(None)) for r in both)
    ]  # fmt: skip
    assert words == [[f"{TEXTS[i]}<|im_end|>", f"{TEXTS[j]}<|im_end|>"] for i, j in ((0, 2), (0, 3), (1, 2))]


def test_one_conversation_is_not_several():
    for side in ("text", answer("x"), ASK + answer("x"), {"messages": answer("x")}, [], None, [{"from": "gpt"}], [1]):
        assert conversations_in(side) is None, side
    row = {"chosen": ASK + answer("x"), "rejected": ASK + answer("y")}
    assert rows_of_two(row, AnswerPairs("all")) == ([row], False)
    turns = {"response_a": ["x", "y"], "response_b": ["z", "w"], "winner": "model_a"}  # lists of turns elsewhere
    assert rows_of_two(turns, AnswerPairs("all")) == ([turns], False)


def test_rows_without_a_difference_are_dropped_by_name():
    for rewards, settings in (([1, 1, 1, 1], {}), (REWARDS, {"min_reward_gap": 2.0, "pairs": "all"})):
        with dropped("a tie"):
            rows_of_two(sampled(rewards=rewards), AnswerPairs(**settings))
    with dropped("fewer than two completions with a score"):
        rows_of_two(sampled(rewards=[None, 1.0, None, None]), AnswerPairs())
    with dropped("responses and rewards"):
        rows_of_two(sampled(rewards=[1.0]), AnswerPairs())
    for place, odd, kind in ((0, "1", "a text"), (2, float("nan"), "NaN"), (3, -float("inf"), "infinite")):
        rewards = [odd if n == place else reward for n, reward in enumerate(REWARDS)]
        with dropped("rewards", f"entry {place + 1}", f"{kind}, not a finite number"):
            rows_of_two(sampled(rewards=rewards), AnswerPairs())
    with dropped("rewards", "too large"):
        rows_of_two(sampled(rewards=[10**400, 0, 0, 0]), AnswerPairs())
    with dropped("rejected_tools beside several answers", "tools"):
        rows_of_two(sampled(rejected_tools=[]), AnswerPairs())


def test_a_dataset_counts_them():
    """Three rows: one of four answers, one tie, one of two sides."""
    rows = [
        sampled(),
        {**sampled(rewards=[0, 0, 0, 0]), "key": "a.jsonl:4"},
        {"key": "a.jsonl:5", "prompt": ASK, "chosen": answer("yes"), "rejected": answer("no")},
    ]
    rows = [{"row as JSON": json.dumps({k: v for k, v in r.items() if k != "key"}), "key": r["key"]} for r in rows]
    tokenizer = tokenizer_for(CHATML, "byte", eos="<|im_end|>")
    kept, counts = tokenize_dataset(
        Dataset.from_list(rows), tokenizer, RenderSettings(None), "a", answers=AnswerPairs("all")
    )
    assert kept["margin"] == [1.0, 1.0, 0.5, 0.5, 0.5, None] and len(set(kept["prompt_key"])) == 1
    assert counts.kept_with[SEVERAL] == [f"a.jsonl:3 (answers {i} and {j})" for i, j in
                                         ((1, 2), (1, 4), (1, 3), (3, 2), (3, 4))]  # fmt: skip
    assert counts.reasons == {TIE: ["a.jsonl:4"]} and (counts.read, counts.kept) == (7, 6)
    stream, counts = tokenize_stream(
        IterableDataset.from_generator(lambda: iter(rows)), tokenizer, RenderSettings(None), "a"
    )
    assert [row["margin"] for row in stream] == [1.0, None] and counts.reasons == {TIE: ["a.jsonl:4"]}


def test_a_recipe_of_several_answers(tmp_path):
    """All three keys; they are refused where no row has several answers; the mask page shows each pair."""
    from mdpo.config.recipe import load_recipe
    from mdpo.data.prepare import prepare_pairs
    from mdpo.reporting.mask_page import write_page

    pair = {"prompt": ASK, "chosen": answer("yes"), "rejected": answer("no")}
    (tmp_path / "two.jsonl").write_text(json.dumps(pair) + "\n")
    group = {name: value for name, value in sampled().items() if name != "key"}
    (tmp_path / "several.jsonl").write_text(json.dumps(group) + "\n")
    (tmp_path / "r.yaml").write_text(f"model_name_or_path: x\noutput_dir: {tmp_path}/out\nbf16: false\nuse_cpu: true\n")
    tokenizer = tokenizer_for(CHATML, "byte", eos="<|im_end|>")

    def recipe(file, *flags):
        return load_recipe([str(tmp_path / "r.yaml"), f"--dataset_mixer={{{tmp_path}/{file}: 1.0}}", *flags])

    def prepared(file, *flags):
        return prepare_pairs(recipe(file, *flags), tokenizer)[0]

    assert len(prepared("several.jsonl", "--pairs=all", "--max_pairs_per_prompt=4")) == 4
    for flag in ("--pairs=adjacent", "--min_reward_gap=0.5", "--max_pairs_per_prompt=2"):
        assert len(prepared("several.jsonl", flag)) >= 1
        with refused(flag[2:].partition("=")[0], "no effect"):
            prepared("two.jsonl", flag)
    for flag, pairs in (("--pairs=adjacent", 2), ("--pairs=best_worst", 1)):  # the mask page shows each of them
        assert write_page(tmp_path / "page.html", recipe("several.jsonl", flag), tokenizer, 100) == {"kept": pairs}
    page = (tmp_path / "page.html").read_text()
    assert f"{tmp_path}/several.jsonl:1" in page and "(answers" not in page
