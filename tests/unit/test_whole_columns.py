"""Whole columns by Arrow: the same values, in the same order, as `datasets` gives row by row."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, concatenate_datasets

from mdpo.data.counts import DropCounts
from mdpo.data.sequence_counts import arrow_lists, counts_by_row
from mdpo.data.tokenize import COUNTED
from mdpo.data.whole_columns import column, contiguous, numbered, texts, whole_numbers, with_numbers

ROWS = Dataset.from_dict({
    "n": [5, 3, 8, 1, 9, 2], "text": ["b", "a", "", "b", None, "ä"], "margin": [0.5, None, -1.0, None, 2.0, 0.0],
    "ids": [[1], [2, 3], [], [4, 5, 6], [7], [8]],
})  # fmt: skip
ORDERS = {
    "as they are": lambda rows: rows,
    "a part": lambda rows: rows.select(range(2, 5)),
    "some": lambda rows: rows.select([4, 0, 0, 3]),
    "none": lambda rows: rows.select([]),
    "shuffled": lambda rows: rows.shuffle(seed=1),
    "shuffled, then a part": lambda rows: rows.shuffle(seed=1).select(range(1, 4)),
    "two parts": lambda rows: concatenate_datasets([rows.select([5, 2]), rows]).shuffle(seed=2),
    "two parts in order": lambda rows: concatenate_datasets([rows, rows]),
}


@pytest.mark.parametrize("name", ORDERS)
def test_columns_are_those_of_the_rows(name):
    rows = ORDERS[name](ROWS)
    assert column(rows, "n").to_pylist() == list(rows["n"])
    assert column(rows, "margin").to_pylist() == list(rows["margin"])
    assert texts(rows, "text") == list(rows["text"])
    found = whole_numbers(rows, "n")
    assert found.dtype == np.int64 and found.tolist() == list(rows["n"])


def test_another_order_would_be_seen():
    rows = ROWS.select([4, 0, 0, 3])
    assert rows.data.column("n").to_pylist()[:4] != list(rows["n"]) == [9, 5, 5, 1]


@pytest.mark.parametrize("name", ORDERS)
def test_a_contiguous_copy_has_the_same_rows(name):
    rows = ORDERS[name](ROWS)
    copy = contiguous(rows)
    assert copy._indices is None and copy.features == rows.features and copy.format == rows.format
    assert list(copy) == list(rows) == list(rows.flatten_indices())
    again = contiguous(copy.with_format("numpy"))
    assert again.format["type"] == "numpy"


def test_rows_that_are_on_the_disk_are_copied_once(tmp_path):
    ROWS.save_to_disk(tmp_path / "rows")
    first, second = (contiguous(Dataset.load_from_disk(tmp_path / "rows").shuffle(seed=3)) for _ in range(2))
    assert first.cache_files == second.cache_files and "cache-" in first.cache_files[0]["filename"]
    assert list(first) == list(second) == list(ROWS.shuffle(seed=3))


def test_rows_are_counted_in_their_order():
    rows = with_numbers(ROWS.select([4, 0, 3]), "place", 10)
    assert list(rows["place"]) == [10, 11, 12] and list(rows["n"]) == [9, 5, 1]
    assert rows.features["place"].dtype == "int64"
    assert with_numbers(ROWS, "place")["place"][:] == [0, 1, 2, 3, 4, 5]


def test_values_are_numbered_as_they_first_occur():
    """By hand: b, a | b, null, c | a, with chunks of their own."""
    chunks = pa.chunked_array([["b", "a"], ["b", None, "c"], ["a"]])
    assert numbered(chunks).tolist() == [0, 1, 0, 2, 3, 1]
    assert numbered(pa.chunked_array([], pa.string())).tolist() == []
    assert numbered(column(ROWS.select([2, 0, 3, 2]), "text")).tolist() == [0, 1, 1, 0]


def counted_rows() -> list[dict]:
    plain = {"drop_reason": "", "margin": None, "special_in_context": 0, "remarks": [], "unread": [], "cut": False,
             "retokenized": []}  # fmt: skip
    changes = [{}, {"drop_reason": "too long"}, {"margin": -1.0}, {"margin": 1.0}, {"special_in_context": 2}, {},
               {"remarks": ["r", "s"]}, {"unread": ["id"]}, {"cut": True, "remarks": ["r"]}, {"retokenized": [3, 0]},
               {"drop_reason": "too long", "unread": ["id"], "remarks": ["r"]}, {"margin": 0.0}]  # fmt: skip
    return [{**plain, **change, "key": f"k{i}"} for i, change in enumerate(changes)]


def test_a_table_is_counted_as_its_rows():
    by_row, by_table = DropCounts("a"), DropCounts("a")
    rows = counted_rows()
    for row in rows:
        by_row.add(row)
    data = Dataset.from_list(rows).select_columns(COUNTED).with_format("arrow")
    for table in data.iter(batch_size=5):
        by_table.add_table(table)
    assert by_table.as_dict() == by_row.as_dict()
    assert by_table.reasons == {"too long": ["k1", "k10"]} and by_table.unread == Counter(id=2)
    assert (by_table.read, by_table.kept) == (12, 10)
    assert by_table.kept_with == {
        "a margin below 0": ["k2"], "special tokens inside user or tool text": ["k4"], "r": ["k6", "k8"], "s": ["k6"],
        "a turn cut in its middle": ["k8"],
    }  # fmt: skip


def test_only_rows_of_which_there_is_more_to_say_are_looked_at_one_by_one(monkeypatch):
    seen = []
    monkeypatch.setattr(DropCounts, "add", lambda self, row: seen.append(row["key"]))
    DropCounts("a").add_table(Dataset.from_list(counted_rows()).with_format("arrow")[:])
    assert seen == ["k1", "k2", "k4", "k6", "k7", "k8", "k9", "k10"]


def test_turns_of_a_slice_are_those_of_its_rows():
    """Masks 01 | 0110 1 | 1: the second and the third row are 2 runs of 3 ones in 5 tokens, and 1 of 1."""
    lists = arrow_lists(pa.table({"mask": [[0, 1], [0, 1, 1, 0, 1], [1]]}), "mask")
    turns, tokens, supervised, sequences = counts_by_row(lists.slice(1))
    assert (turns.tolist(), tokens.tolist(), supervised.tolist()) == ([2, 1], [5, 1], [3, 1])
    assert sequences.tolist() == [1, 1]
