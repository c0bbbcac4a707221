"""What all packages stand on: turns in a mask, an error in one line, files that are replaced at once."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from mdpo.console import first_line
from mdpo.storage import read_cache, replace_text, write_cache
from mdpo.types import turn_begins


@pytest.mark.parametrize(
    ("mask", "rows", "places"),
    [
        ([], (), []),
        ([0, 0], (), []),
        ([1], (), [0]),
        ([0, 1, 1, 0, 1], (), [1, 4]),
        ([1, 1, 0, 1], (), [0, 3]),
        ([1, 1, 1, 1], (0, 2), [0, 2]),  # two masks, [1, 1] each
        ([0, 1, 1, 0, 1], (0, 2), [1, 2, 4]),
        ([0, 1, 0, 1, 1], (0, 2), [1, 3]),  # the second mask begins with a zero
    ],
)
def test_turns_begin_where_runs_of_ones_do(mask, rows, places):
    for given in (mask, np.asarray(mask, np.int64), np.asarray(mask, bool)):
        begins = turn_begins(given, rows)
        assert begins.dtype == bool and begins.shape == (len(mask),)
        assert np.flatnonzero(begins).tolist() == places


def raised(outer: Exception, inner: Exception) -> Exception:
    outer.__cause__ = inner
    return outer


@pytest.mark.parametrize(
    ("error", "innermost", "outer"),
    [
        (ValueError("  no room.  \nmore"), "no room", "no room"),
        (ValueError(""), "ValueError", "ValueError"),
        (ValueError("roles must alternate user/assistant/..."), *["roles must alternate user/assistant/..."] * 2),
        (raised(OSError("cannot load."), ConnectionError("refused.")), "refused", "cannot load"),
        (raised(OSError("a"), raised(OSError("b"), KeyError())), "KeyError", "a"),
    ],
)
def test_an_error_in_one_line(error, innermost, outer):
    assert first_line(error) == innermost
    assert first_line(error, innermost=False) == outer


def test_a_cache_gives_back_what_was_left(tmp_path):
    path = tmp_path / "new" / "known.json"
    assert read_cache(path) is None
    write_cache(path, {"weights": [3, 4, "é"]})
    assert read_cache(path) == {"weights": [3, 4, "é"]}
    assert os.listdir(path.parent) == ["known.json"]
    path.write_text(path.read_text()[:-2])
    assert read_cache(path) is None


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path):
    (tmp_path / "file").write_text("")
    write_cache(tmp_path / "file" / "known.json", [1])
    assert read_cache(tmp_path / "file" / "known.json") is None


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    """A reader that opened it before has the old text to its end; where writing fails the old one stays, alone."""
    path = tmp_path / "page.html"
    replace_text(path, "old")
    with open(path, encoding="utf-8") as reader:
        replace_text(path, "new and longer")
        assert reader.read() == "old"
    assert path.read_text(encoding="utf-8") == "new and longer"

    def full(self, text, **kwargs):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        replace_text(path, "never")
    assert os.listdir(tmp_path) == ["page.html"] and path.read_bytes() == b"new and longer"
    write_cache(path, json.loads("[1]"))
    assert path.read_bytes() == b"new and longer"
