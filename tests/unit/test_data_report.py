"""The data report: what became of every row under which name, statistics by hand, the limits that end a run."""

import json
import random
from pathlib import Path

import check_data
import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, Features
from errors import refused
from tiny import CHATML, agent_rows, tokenizer_for

from mdpo.config.recipe import load_recipe
from mdpo.data.prepare import prepare_pairs, without_repeated
from mdpo.data.report import DataReport, describe, quantities, sequence_lines
from mdpo.data.sequence_counts import UNKNOWN, counts_by_row
from mdpo.data.tokenize import DropCounts
from mdpo.masking.tokenizer import load_tokenizer
from mdpo.runs.entrypoint import run
from mdpo.types import split

U, TOOL = {"role": "user", "content": "Two?"}, {"role": "user", "content": "```output\n2\n```"}
OTHER_TOOL = {"role": "user", "content": "```output\n3\n```"}


def says(*texts):
    return [{"role": "assistant", "content": text} for text in texts]


MISMATCH = "prompt mismatch: message 1 of the sides differs; allow_different_prompts: true keeps both"
# A row for each way to be dropped, and the name that it is dropped under; max_length is 64, a token is a byte.
BAD = [
    ({"chosen": [U, *says("4")], "rejected": None}, "not a pair: rejected is null"),
    (
        {"chosen": [{"role": "robot", "content": "x"}, *says("4")], "rejected": [U, *says("5")]},
        "chosen, message 1: unknown role: robot",
    ),
    ({"chosen": [U, *says(" ")], "rejected": [U, *says("5")]}, "chosen, message 2: an empty assistant turn"),
    ({"chosen": [{"role": "user", "content": "?"}, *says("4")], "rejected": [U, *says("5")]}, MISMATCH),
    ({"prompt": [U, *says("4")], "chosen": [U, *says("4")], "rejected": [U, *says("4")]}, "no assistant turn"),
    ({"chosen": [U], "rejected": [U, *says("5")]}, "last turn not from the assistant"),
    ({"chosen": [U, *says("4")], "rejected": [U, *says("4")]}, "chosen equals rejected"),
    ({"chosen": [U, *says("4" * 99)], "rejected": [U, *says("5")]}, "over-long"),
    (
        {"chosen": [U, *says("4"), TOOL, *says("5")], "rejected": [U, *says("4"), OTHER_TOOL, *says("5")]},
        "diverges only in user or tool text",
    ),
    ({"chosen": [U, *says("good")], "rejected": [U, *says("bad")]}, "duplicate"),
]
GOOD = {"chosen": [U, *says("good")], "rejected": [U, *says("bad")]}
MARKED = {
    "chosen": [{"role": "user", "content": "Is <|im_end|> here?"}, *says("y")],
    "rejected": [{"role": "user", "content": "Is <|im_end|> here?"}, *says("no")],
}


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """flags -> a recipe in a folder of its own, whose tokenizer has a token for each byte."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    tokenizer_for(CHATML, "letters", eos="<|im_end|>").save_pretrained("model")
    Path("recipe.yaml").write_text(
        "model_name_or_path: model\ndataset_mixer: {a.jsonl: 1.0}\noutput_dir: out\nbf16: false\nuse_cpu: true\n"
        "max_length: 120\n"
    )
    write("a.jsonl", [GOOD, MARKED, *(row for row, _ in BAD)])
    return lambda *flags: load_recipe(["recipe.yaml", *flags])


def write(name: str, rows: list[dict]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def prepared(recipe, folder=None):
    return prepare_pairs(recipe, load_tokenizer(recipe.model, recipe.data), folder)


def test_every_dropped_row_is_named_and_counted(recipe, tmp_path):
    train, _, report = prepared(recipe(), tmp_path)
    assert sorted(train["key"]) == ["a.jsonl:1", "a.jsonl:2"]
    [counts] = report.counts.values()
    assert {reason: keys for reason, keys in counts.reasons.items()} == {
        reason: [f"a.jsonl:{n}"] for n, (_, reason) in enumerate(BAD, start=3)
    }
    assert counts.kept_with == {"special tokens inside user or tool text": ["a.jsonl:2"]}
    written = json.loads((tmp_path / "data_report.json").read_text())["sets"]["a.jsonl (train)"]
    assert (written["read"], written["kept"]) == (12, 2)
    assert written["dropped"]["over-long"] == {"rows": 1, "first": ["a.jsonl:10"]}
    assert sum(what["rows"] for what in written["dropped"].values()) == 10


def test_statistics_by_hand():
    """Two pairs. Chosen masks: 0110 01 (two turns, 3 of 6) and 011; rejected: 01 and 00111 (one turn, 3 of 5). Of their
    8 tokens each 7 and 6 are distinct: 1 and 2 are shared."""
    rows = Dataset.from_list([
        {"chosen_mask": [0, 1, 1, 0, 0, 1], "rejected_mask": [0, 1], "distinct": 7},
        {"chosen_mask": [0, 1, 1], "rejected_mask": [0, 0, 1, 1, 1], "distinct": 6},
    ])  # fmt: skip
    found = describe(rows)
    assert found["pairs"] == 2
    assert found["turns"]["chosen"] == {"mean": 1.5, "p50": 1.5, "p95": 1.95, "max": 2}
    assert found["turns"]["rejected"] == {"mean": 1.0, "p50": 1.0, "p95": 1.0, "max": 1}
    assert found["tokens"]["chosen"]["mean"] == 4.5 and found["tokens"]["rejected"]["max"] == 5
    assert found["supervised"]["chosen"]["mean"] == 2.5 and found["supervised"]["rejected"]["mean"] == 2.0
    assert found["context"]["chosen"]["mean"] == 2.0 and found["context"]["rejected"]["mean"] == 1.5
    assert (
        found["shared"]["chosen"]
        == found["shared"]["rejected"]
        == pytest.approx({"mean": 1.5, "p50": 1.5, "p95": 1.95, "max": 2})
    )
    assert found["share_supervised"] == (3 + 1 + 2 + 3) / (6 + 2 + 3 + 5)
    assert (found["longer_is_chosen"], found["longer_wins"]) == (0.5, 0.5)
    assert (found["all_tokens"], found["distinct_tokens"]) == (16, 13)
    assert found["several_sequences"] == {"sides": 0, "reasons": {}}
    assert found["sequences"]["rejected"] == {"mean": 1.0, "p50": 1.0, "p95": 1.0, "max": 1}
    labels = ["turns", "tokens", "supervised", "context", "shared"]  # as before there were sequences
    assert list(quantities(found).items()) == list(zip(labels, labels, strict=True))
    assert sequence_lines(found) == ["16 tokens in all sequences, 13 distinct: 0.81"]


SEVERAL = [  # three sequences 01 | 11 | 1 and one; two 1 | 1 and two 01 | 01
    {"chosen_mask": [0, 1, 1, 1, 1], "chosen_lengths": [2, 2, 1], "chosen_breaks": ["text rewritten at message 3"] * 2,
     "rejected_mask": [0, 1], "rejected_lengths": [], "rejected_breaks": [], "distinct": 6},
    {"chosen_mask": [1, 1], "chosen_lengths": [1, 1], "chosen_breaks": ["text rewritten at message 12"],
     "rejected_mask": [0, 1, 0, 1], "rejected_lengths": [2, 2], "rejected_breaks": ["system message moved"],
     "distinct": 4},
]  # fmt: skip


def test_statistics_of_several_sequences_by_hand():
    """Turns end where sequences do: three and two on chosen sides, though their ones are without a gap."""
    found = describe(Dataset.from_list(SEVERAL))
    stats = {name: [found[name][side][stat] for side in ("chosen", "rejected") for stat in ("mean", "max")]
             for name in ("sequences", "turns", "tokens", "supervised", "shared")}  # fmt: skip
    assert stats == {
        "sequences": [2.5, 3, 1.5, 2],
        "turns": [2.5, 3, 1.5, 2],
        "tokens": [3.5, 5, 3.0, 4],
        "supervised": [3.0, 4, 1.5, 2],
        "shared": [1.5, 2, 1.5, 2],  # 7 − 6 and 6 − 4
    }
    assert (found["all_tokens"], found["distinct_tokens"]) == (13, 10)
    assert found["several_sequences"] == {"sides": 3, "reasons": {
        "text rewritten at message N": {"sides": 2, "sequences": 3},
        "system message moved": {"sides": 1, "sequences": 1},
    }}  # fmt: skip
    assert list(quantities(found)) == ["sequences", "turns", "tokens", "supervised", "context", "shared"]
    assert [line.split()[:2] for line in sequence_lines(found)] == [["13", "tokens"], ["3", "of"], ["3", "sequences"],
                                                                     ["1", "sequences"]]  # fmt: skip


@pytest.mark.parametrize("breaks", [None, [], "absent"])
def test_sequences_without_a_reason_are_counted(breaks):
    rows = [{k: v for k, v in row.items() if "breaks" not in k} for row in SEVERAL]
    rows = [row | ({} if breaks == "absent" else {"chosen_breaks": breaks, "rejected_breaks": breaks}) for row in rows]
    features = Dataset.from_list(SEVERAL).features
    features = {name: kind for name, kind in features.items() if breaks != "absent" or "breaks" not in name}
    found = describe(Dataset.from_list(rows, features=Features(features)))["several_sequences"]
    assert found == {"sides": 3, "reasons": {UNKNOWN: {"sides": 3, "sequences": 4}}}


def test_counts_by_row_are_those_of_each_row_alone():
    """Random rows, some without lengths, against a loop over each sequence; in slices, as batches of a table are."""
    draw, masks, lengths = random.Random(0), [], []
    for _ in range(300):
        of_row = [draw.randrange(1, 5) for _ in range(draw.randrange(1, 5))]
        masks.append([draw.randrange(2) for _ in range(sum(of_row))])
        lengths.append(of_row if len(of_row) > 1 else draw.choice([[], None, of_row]))
    for part in (slice(0, 300), slice(7, 90), slice(299, 300)):
        arrays = (pa.array(masks)[part], pa.array(lengths, pa.list_(pa.int32()))[part])
        found = [column.tolist() for column in counts_by_row(*arrays)]
        each = [split(mask, of_row or [len(mask)]) for mask, of_row in zip(masks[part], lengths[part], strict=True)]
        runs = [sum(len("".join(map(str, own)).replace("0", " ").split()) for own in row) for row in each]
        tokens, ones = ([sum(map(f, row)) for row in each] for f in (len, sum))
        assert found == [runs, tokens, ones, [len(row) for row in each]]
    over_edges = counts_by_row(pa.array(masks))[0].tolist()  # without lengths runs go on from sequence to sequence
    assert over_edges != counts_by_row(pa.array(masks), pa.array(lengths, pa.list_(pa.int32())))[0].tolist()


def test_statistics_do_not_run_from_row_to_row():
    """A row that ends supervised before one that begins so: two turns, not one; and in slices and shuffled sets."""
    rows = Dataset.from_list([{"chosen_mask": [0, 1], "rejected_mask": [1], "distinct": 3}] * 3)
    for part in (rows, rows.select([1, 2]), rows.shuffle(seed=0), rows.select([2, 0])):
        assert describe(part)["turns"]["rejected"] == {"mean": 1.0, "p50": 1.0, "p95": 1.0, "max": 1}
        assert describe(part)["supervised"]["chosen"]["max"] == 1
    assert describe(rows)["longer_wins"] == 0.5  # ties count one half
    assert describe(rows)["longer_is_chosen"] == 0.0


@pytest.mark.parametrize(("wins", "words"), [(0.71, "longer side is a shortcut"), (0.29, "shorter side is a shortcut"),
                                             (0.7, None), (0.3, None)])  # fmt: skip
def test_length_alone_is_warned_about(wins, words):
    warnings = DataReport({}, None, training={"longer_wins": wins}).warnings()
    assert (words is None and not warnings) or words in warnings[0]


def test_a_penalty_on_length_is_advised_where_longer_sides_win_alone():
    """a = length_penalty · (|y_w| − |y_l|) is added to x: with a shorter chosen side it asks for more margin still."""
    for wins, advised in ((0.9, True), (0.1, False)):
        (line,) = DataReport({}, None, training={"longer_wins": wins}).warnings()
        assert ("length_penalty" in line) == advised and "sigmoid_norm" in line


def test_rows_that_max_length_costs_count_the_dropped_ones(recipe):
    """Sides of 24 tokens and the answer, 28 and 27 in the good row; limits of 60, 120 and 240."""
    _, _, report = prepared(recipe("--max_length=120"))
    counts = next(iter(report.counts.values()))
    long = next(n for n in counts.longest if n > 120)
    assert 120 < long <= 240
    assert report.costs() == {60: int((counts.longest > 60).sum()), 120: 1, 240: 0}
    counts.longest = np.array([10, 61, 120, 121, 240, 241])
    assert report.costs() == {60: 5, 120: 3, 240: 1}
    report.max_length = None
    assert report.costs() == {}


def test_a_turn_cut_in_its_middle_is_counted(recipe):
    write("a.jsonl", [{"chosen": [U, *says("4" * 99)], "rejected": [U, *says("5" * 99)]}, GOOD])
    train, _, report = prepared(recipe("--truncation_mode=keep_start", "--max_length=64"))
    [counts] = report.counts.values()
    assert counts.kept_with == {"a turn cut in its middle": ["a.jsonl:1"]}
    assert [max(map(len, (row["chosen_ids"], row["rejected_ids"]))) for row in train].count(64) == 1


def test_duplicates_are_those_of_ids_and_masks_over_all_sets():
    seen, parts = set(), []
    for name, digests in (("a", "xyx"), ("b", "yz")):
        rows = Dataset.from_dict({"digest": list(digests), "key": [f"{name}:{n}" for n in range(len(digests))]})
        counts = DropCounts(name, read=len(digests), kept=len(digests))
        parts.append((without_repeated(rows, counts, seen)["key"][:], counts))
    assert [keys for keys, _ in parts] == [["a:0", "a:1"], ["b:1"]]
    assert [counts.reasons for _, counts in parts] == [{"duplicate": ["a:2"]}, {"duplicate": ["b:0"]}]
    assert [counts.kept for _, counts in parts] == [2, 1]


def test_margins_below_zero_and_unused_columns_are_named(recipe):
    write("a.jsonl", [{**GOOD, "score_chosen": 1, "score_rejected": 3, "id": 7}, MARKED])
    _, _, report = prepared(recipe())
    [counts] = report.counts.values()
    assert counts.kept_with["a margin below 0"] == ["a.jsonl:1"]
    assert report.as_dict()["columns_not_used"] == {"a.jsonl (train)": ["id"]}


def test_prompts_that_differ_are_kept_where_the_recipe_allows_it(recipe):
    row = {"chosen": [{"role": "user", "content": "Three?"}, *says("4")], "rejected": [U, *says("5")]}
    write("a.jsonl", [GOOD, row])
    assert len(prepared(recipe())[0]) == 1
    train = prepared(recipe("--allow_different_prompts"))[0]
    [found] = [row for row in train if row["key"] == "a.jsonl:2"]
    assert (sum(found["chosen_mask"]), sum(found["rejected_mask"])) == (2, 2)  # an answer and its end of turn


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ([], 1, "max_bad_fraction: 10 of 12 rows are dropped (83%), more than 20%"),
        (["--max_bad_fraction=0.83"], 1, "more than 83%"),
        (["--max_bad_fraction=0.84"], 0, "The data can be trained on."),
        (["--max_bad_fraction=1", "--on_bad_rows=error"], 1, "on_bad_rows: error, and there are bad rows"),
    ],
)
def test_check_data_ends_as_the_run_would(recipe, flags, code, words, capsys, tmp_path):
    assert run(check_data.main, ["recipe.yaml", "--report", "found", *flags]) == code
    out, err = capsys.readouterr()
    assert words in out + err
    assert json.loads(Path("found/data_report.json").read_text())["training"]["pairs"] == 2
    assert not Path("out").exists() and not list(Path("model").glob("*.safetensors"))


def test_a_report_in_the_place_of_a_file_is_refused(recipe, capsys):
    Path("found").write_text("kept")
    assert run(check_data.main, ["recipe.yaml", "--report=found"]) == 1
    assert "--report: found" in capsys.readouterr().err and Path("found").read_text() == "kept"


def test_good_data_pass_with_any_bad_row_refused(recipe, capsys):
    write("a.jsonl", agent_rows(4))
    assert run(check_data.main, ["recipe.yaml", "--on_bad_rows=error", "--max_length=500"]) == 0


def test_one_broken_set_of_a_mix_is_noticed(recipe):
    """Limits are of each set: 3 of 4 rows of b are bad, 3 of 44 together."""
    write("a.jsonl", agent_rows(40))
    write("b.jsonl", [GOOD, *(row for row, _ in BAD[:3])])
    _, _, report = prepared(recipe("--dataset_mixer=[a.jsonl, b.jsonl]", "--max_length=500"))
    with refused("max_bad_fraction", "3 of 4 rows", "b.jsonl"):
        report.refuse_bad_rows("drop", 0.2)


def test_the_table_shows_names_with_brackets_and_all_reasons(recipe, capsys):
    """`[train]` is no markup of rich's."""
    counts = DropCounts("saved[train] (train)", read=1234, kept=1233, reasons={"not a pair": ["saved[train]:7"]})
    DataReport({counts.name: counts}, None).show()
    out = capsys.readouterr().out
    assert "│ saved[train] (train) │ 1,234 │ 1,233 │       1 │" in out
    assert "  dropped 1: not a pair (saved[train]:7)" in out


def test_a_flood_of_reasons_is_counted_in_one_line():
    reasons = {f"unknown role: {i}": [f"a:{i}"] * (1 + (i == 3)) for i in range(25)}
    lines = DropCounts("a", read=26, reasons=reasons).lines()
    assert lines[1] == "  dropped 2: unknown role: 3 (a:3, a:3)"
    assert len(lines) == 1 + 20 + 1 and lines[-1] == "  dropped 5: 5 further reasons"
