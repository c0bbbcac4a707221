"""Recipe keys about data and tokens: what each of them changes in the pairs that a run would train on."""

from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from errors import refused
from tiny import CHATML, tokenizer_for

from mdpo.config.recipe import load_recipe
from mdpo.data.prepare import prepare_pairs
from mdpo.data.sequence_counts import rank_imbalance
from mdpo.masking.tokenizer import load_tokenizer

BASE = "model_name_or_path: model\ndataset_mixer: {a.jsonl: 1.0}\noutput_dir: out\nbf16: false\nuse_cpu: true\n"
FIRST_TEXT = "<|im_start|>user\nAsk 0<|im_end|>\n<|im_start|>assistant\na000<|im_end|>\n"  # chosen side of row 1


def pairs(n: int, letter: str = "a") -> Dataset:
    """Rows of 5 characters to ask, 4 chosen (row 2: 5) and 2 rejected; rows 1 and 2 share a prompt, 3 and 4 the next,
    and so on. No row of one letter is another's."""

    def side(i, text):
        return [{"role": "user", "content": f"Ask {i // 2 % 10}"}, {"role": "assistant", "content": text}]

    rows = [{"chosen": side(i, f"{letter}{i:03d}" + "+" * (i == 1)), "rejected": side(i, "no")} for i in range(n)]
    return Dataset.from_list(rows)


def numbered(name: str, last: int) -> list[str]:
    return sorted(f"{name}:{n}" for n in range(1, last + 1))


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """flags -> (training pairs, held-out pairs or None) of a recipe whose tokenizer has a token for each byte."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    tokenizer_for(CHATML, "letters", eos="<|im_end|>").save_pretrained("model")
    pairs(8).to_json("a.jsonl")
    pairs(4, "b").to_json("b.jsonl")
    Path("recipe.yaml").write_text(BASE)

    def run(*flags):
        recipe = load_recipe(["recipe.yaml", *flags])
        return prepare_pairs(recipe, load_tokenizer(recipe.model, recipe.data))[:2]

    return run


def test_dataset_splits(prepare):
    sizes = {"train_prefs": 3, "test_prefs": 2, "train_sft": 5, "test_sft": 1}
    DatasetDict({split: pairs(n) for split, n in sizes.items()}).save_to_disk("saved")
    for kind in ("prefs", "sft"):
        train, held_out = prepare("--dataset_mixer={saved: 1.0}", f"--dataset_splits=[train_{kind}, test_{kind}]")
        assert sorted(train["key"]) == numbered(f"saved[train_{kind}]", sizes[f"train_{kind}"])
        assert sorted(held_out["key"]) == numbered(f"saved[test_{kind}]", sizes[f"test_{kind}"])


@pytest.mark.parametrize(("config", "rows"), [("small", 2), ("large", 6)])
def test_dataset_configs(prepare, config, rows):
    pairs(2).to_json("set/small.jsonl")
    pairs(6).to_json("set/large.jsonl")
    configs = [f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("small", "large")]
    Path("set/README.md").write_text(f"---\nconfigs:\n{''.join(configs)}---\n")
    train, _ = prepare("--dataset_mixer={set: 1.0}", f"--dataset_configs=[{config}]")
    assert sorted(train["key"]) == numbered(f"set/{config}.jsonl", rows)


def test_fractions_of_dataset_mixer_take_the_first_rows_of_each_set(prepare):
    train, _ = prepare("--dataset_mixer={a.jsonl: 0.25, b.jsonl: 0.75}")
    assert sorted(train["key"]) == numbered("a.jsonl", 2) + numbered("b.jsonl", 3)


def test_eval_dataset_mixer(prepare):
    train, held_out = prepare("--eval_dataset_mixer={b.jsonl: 1.0}")
    assert sorted(train["key"]) == numbered("a.jsonl", 8) and sorted(held_out["key"]) == numbered("b.jsonl", 4)
    assert sorted(prepare("--eval_dataset_mixer={b.jsonl: 0.5}")[1]["key"]) == numbered("b.jsonl", 2)
    pairs(3).to_json("set/train.jsonl")
    pairs(2, "b").to_json("set/test.jsonl")
    held_out = prepare("--eval_dataset_mixer=[set]")[1]
    assert sorted(held_out["key"]) == numbered("set/test.jsonl", 2) + numbered("set/train.jsonl", 3)


def test_share_of_a_test_split_in_eval_dataset_mixer(prepare):
    pairs(4).to_json("set/test.jsonl")
    assert sorted(prepare("--eval_dataset_mixer={set: 0.5}")[1]["key"]) == numbered("set/test.jsonl", 2)


def test_max_training_samples_and_max_eval_samples(prepare):
    def run(*flags):
        return [list(rows["key"]) for rows in prepare("--eval_dataset_mixer={b.jsonl: 1.0}", *flags)]

    train, held_out = run()
    assert (len(train), len(held_out)) == (8, 4)
    assert run("--max_training_samples=3") == [train[:3], held_out]
    assert run("--max_eval_samples=3") == [train, held_out[:3]]


@pytest.mark.parametrize(("size", "held"), [("1", 2), ("3", 4), ("0.25", 2), ("0.75", 6)])
def test_split_size_holds_out_whole_prompts(prepare, size, held):
    """Rows 1 and 2 have one prompt, 3 and 4 the next: an odd number of rows is rounded up to whole prompts."""
    assert prepare()[1] is None
    train, held_out = prepare(f"--test_split_size={size}")
    assert len(held_out) == held and sorted([*train["key"], *held_out["key"]]) == numbered("a.jsonl", 8)
    prompts = [{(int(key[-1]) - 1) // 2 for key in side["key"]} for side in (train, held_out)]
    assert not prompts[0] & prompts[1]


def chosen_of_row_1(rows) -> list[int]:
    return next(row["chosen_ids"] for row in rows if row["key"] == "a.jsonl:1")


def test_tokenizer_name_or_path(prepare):
    other = tokenizer_for(CHATML, "byte", eos="<|im_end|>")  # with merges, so that the text has fewer tokens
    other.save_pretrained("other")
    expected = other(FIRST_TEXT, add_special_tokens=False)["input_ids"]
    assert chosen_of_row_1(prepare("--tokenizer_name_or_path=other")[0]) == expected
    assert len(expected) < len(chosen_of_row_1(prepare()[0])) == 30  # 8 + 5 for the question, 13 + 4 for the answer


def test_chat_template_and_its_kwargs(prepare):
    Path("short.jinja").write_text(
        "{{ tone | default('') }}{% for m in messages %}{{ '<|im_start|>' + m.role[0] + m.content + '<|im_end|>' }}"
        "{% endfor %}{{ '<|im_start|>a' if add_generation_prompt }}"
    )
    short = "<|im_start|>uAsk 0<|im_end|><|im_start|>aa000<|im_end|>"
    runs = {(): FIRST_TEXT, ("--chat_template=short.jinja",): short}
    runs["--chat_template=short.jinja", "--chat_template_kwargs={tone: calm}"] = f"calm{short}"
    for flags, text in runs.items():
        assert tokenizer_for(CHATML, "letters", eos="<|im_end|>").decode(chosen_of_row_1(prepare(*flags)[0])) == text


def test_sanity_check_takes_the_first_pairs_of_each_set(prepare):
    for name, rows in (("a", 33), ("b", 40), ("c", 9), ("d", 10)):
        pairs(rows, name).to_json(f"{name}.jsonl")
    sets = "--dataset_mixer=[a.jsonl, b.jsonl]", "--eval_dataset_mixer=[c.jsonl, d.jsonl]"
    assert [len(rows) for rows in prepare(*sets)] == [73, 19]
    train, held_out = prepare(*sets, "--sanity_check")
    assert sorted(train["key"]) == numbered("a.jsonl", 32) + numbered("b.jsonl", 32)
    assert sorted(held_out["key"]) == numbered("c.jsonl", 8) + numbered("d.jsonl", 8)


def test_max_length_and_truncation_mode(prepare):
    """Chosen sides have 30 tokens, 31 in row 2; the answer begins behind 24, the rejected side has 28."""
    a, without_row_2 = numbered("a.jsonl", 8), ["a.jsonl:1", *numbered("a.jsonl", 8)[2:]]
    for limit, kept in ((31, a), (30, without_row_2)):
        assert sorted(prepare(f"--max_length={limit}", "--truncation_mode=drop")[0]["key"]) == kept
    train = prepare("--max_length=28", "--truncation_mode=keep_start")[0]
    assert sorted(train["key"]) == a
    assert {(len(row["chosen_ids"]), sum(row["chosen_mask"])) for row in train} == {(28, 4)}


def test_seed_decides_the_order_and_what_is_held_out(prepare):
    orders = [list(prepare(f"--seed={seed}")[0]["key"]) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == sorted(orders[2])
    held_out = [prepare(f"--seed={seed}", "--test_split_size=2")[1] for seed in range(1, 6)]
    assert len({frozenset(rows["key"]) for rows in held_out}) > 1


def test_a_share_is_not_rounded_down_by_float_error(prepare):
    pairs(100).to_json("hundred.jsonl")
    assert len(prepare("--dataset_mixer={hundred.jsonl: 0.29}")[0]) == 29


def test_every_split_of_an_evaluation_set_is_taken(prepare):
    DatasetDict({"test_prefs": pairs(3), "train_prefs": pairs(2, "b")}).save_to_disk("saved")
    held_out = prepare("--eval_dataset_mixer={saved: 1.0}")[1]
    assert sorted(held_out["key"]) == numbered("saved[test_prefs]", 3) + numbered("saved[train_prefs]", 2)


def test_a_configuration_for_what_has_none_is_refused(prepare):
    with refused("dataset_configs", "a.jsonl", '""'):
        prepare("--dataset_configs=[small]")
    assert len(prepare("--dataset_configs=['']")[0]) == 8


def test_imbalance_of_ranks_by_hand():
    """Of 4 distinct tokens a pair; one pair of 12 among 8 ranks: 12 over (7 · 4 + 12) / 8 = 5."""

    def row(n):
        return {"chosen_ids": [0] * (n - 1), "rejected_ids": [0] * 2, "distinct": n}

    assert rank_imbalance(Dataset.from_list([row(4)] * 16), 2) == 1.0
    assert rank_imbalance(Dataset.from_list([row(4)] * 7 + [row(12)]), 1) == pytest.approx(12 / 5)
    assert rank_imbalance(Dataset.from_list([row(4)] * 15), 2) is None
