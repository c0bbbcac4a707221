"""mdpo/rollouts/records.py: trajectories on disk, and the sequences that were sampled."""

import json
from dataclasses import replace

import pytest
from errors import refused
from long_trajectories import check_peak, write_long

from mdpo.rollouts.records import BLOCK, Records, SampledTurn, Trajectory, read_trajectory, recorded_sequences
from mdpo.rollouts.tasks import Task

SETTINGS = {"temperature": 1.0, "turns": 6}


def trajectory(key: str, sample: int = 0, text: str = "hello") -> Trajectory:
    messages = [{"role": "user", "content": key}, {"role": "assistant", "content": text}]
    return Trajectory(key, sample, {"prompt": key}, messages, calls=[("python", "ok")], ended="done", turns=1)


def task(key: str) -> Task:
    return Task(key, {"prompt": key}, [])


def records(path, policy: str = "sha256:1", **settings) -> Records:
    return Records(path, policy, {**SETTINGS, **settings})


def test_what_was_written_is_read(tmp_path):
    path = tmp_path / "t.jsonl"
    first = records(path)
    odd = 'a\u2028b\x85c\n"d" \ud800 é'  # line ends of Unicode, and half a character: one line each all the same
    for one in (trajectory("a"), trajectory("a", 1, odd)):
        first.append(one)
    first.close()
    again = records(path)
    assert again.done == first.done and not again.torn
    lines = path.read_text(encoding="utf-8").split("\n")
    assert read_trajectory(lines[1], "t").messages[1]["content"] == odd
    assert again.done[0].policy == "sha256:1" and again.done[0].settings == SETTINGS
    assert again.missing([(task("a"), 0), (task("a"), 1), (task("b"), 0)]) == [(task("b"), 0)]


def test_a_long_file_is_read_in_little_memory(tmp_path):
    write_long(path := tmp_path / "t.jsonl", 120, SETTINGS)
    check_peak(path, lambda: records(path, "p"))
    done = records(path, "p").done
    assert len(done) == 120 and done[0].task is done[1].task and not done[0].messages


@pytest.mark.parametrize("cut", [1, 17, 300])
def test_a_line_that_a_kill_cut_is_removed(tmp_path, cut):
    path = tmp_path / "t.jsonl"
    first = records(path)
    first.append(trajectory("a"))
    whole = path.read_bytes()
    first.append(trajectory("b"))
    path.write_bytes((whole + path.read_bytes()[len(whole) :])[: len(whole) + cut])
    again = records(path)
    assert again.torn == cut and [t.key for t in again.done] == ["a"] and path.read_bytes() == whole
    again.append(trajectory("b"))
    assert [t.key for t in records(path).done] == ["a", "b"]


def test_records_of_other_settings_are_refused_by_name(tmp_path):
    path = tmp_path / "t.jsonl"
    records(path).append(trajectory("a"))
    for other in ({"policy": "sha256:2"}, {"temperature": 0.5}, {"turns": 3}):
        with refused("save", *other):
            records(path, **other)
    with refused("save", "'a'"):
        records(path).missing([(task("b"), 0)])
    path.write_text(path.read_text() * 2)
    with refused("save", "'a'"):
        records(path)


@pytest.mark.parametrize("text", ['{"prompt": "a"}\n{"prompt": "b"}', '[{"prompt": "a"}]', "{}", "\xff", "a\n\xff\n"])
def test_another_file_is_refused_and_left_as_it_is(tmp_path, text):
    path = tmp_path / "t.jsonl"
    path.write_bytes(text.encode("latin-1"))
    with refused("save" if text not in ('{"prompt": "a"}\n{"prompt": "b"}',) else "save", path):
        records(path)
    assert path.read_bytes() == text.encode("latin-1")


def test_a_changed_task_is_refused(tmp_path):
    path = tmp_path / "t.jsonl"
    records(path).append(trajectory("a"))
    with refused("save", "'a'"):
        records(path).missing([(Task("a", {"prompt": "another"}, []), 0)])


@pytest.mark.parametrize("line", ["{", "[]", "{}", json.dumps({"key": "a", "calls": [], "else": 1})])
def test_a_line_that_is_no_trajectory_is_named(tmp_path, line):
    path = tmp_path / "t.jsonl"
    records(path).append(trajectory("a"))
    path.write_text(path.read_text() + line + "\n")
    with refused("trajectory", ":2:"):
        records(path)


def test_where_a_file_is_no_text_and_what_a_line_lacks(tmp_path):
    """Bytes count from the begin of the file, also behind lines that are trajectories; blanks are no line end."""
    path = tmp_path / "t.jsonl"
    records(path).append(trajectory("é"))
    whole = path.read_bytes()
    for line, byte in ((b"ab\xff", 2), (b"\xc3", 0)):
        path.write_bytes(whole + line + b"\n" + whole)
        with refused("save", f"byte {len(whole) + byte}"):
            records(path)
    path.write_bytes(whole + b"\n")
    with refused("trajectory", ":2:", "line 1 column 1"):
        records(path)


def test_the_last_line_may_be_longer_than_a_block(tmp_path):
    path = tmp_path / "t.jsonl"
    records(path).append(trajectory("a", text="x" * 3 * BLOCK))
    whole = path.read_bytes()
    for kept, torn in ((whole, 0), (whole[:-1], len(whole) - 1), (whole * 0, 0)):
        path.write_bytes(kept)
        again = records(path)
        assert again.torn == torn and len(again.done) == (kept == whole)


def test_sequences_are_merged_while_the_next_prompt_begins_with_all_so_far():
    a, b = SampledTurn([1, 2], [3], [-0.5]), SampledTurn([1, 2, 3, 4], [5, 6], [-0.1, -0.2])
    assert recorded_sequences([a, b]) == [
        {
            "input_ids": [1, 2, 3, 4, 5, 6],
            "assistant_masks": [0, 0, 1, 0, 1, 1],
            "logprobs": [None, None, -0.5, None, -0.1, -0.2],
        }
    ]
    rewritten = SampledTurn([1, 2, 9], [7])  # the template has taken token 3 out: another context
    assert recorded_sequences([a, b, rewritten])[1:] == [{"input_ids": [1, 2, 9, 7], "assistant_masks": [0, 0, 0, 1]}]
    assert recorded_sequences([replace(a, logprobs=None), b])[0].keys() == {"input_ids", "assistant_masks"}
    assert recorded_sequences([]) == []


def test_a_prompt_that_the_history_begins_with_is_another_sequence():
    """Shorter than what was sampled so far: nothing of the earlier turn may be supervised in its context again."""
    found = recorded_sequences([SampledTurn([1, 2], [3, 4]), SampledTurn([1, 2, 3], [5])])
    assert [s["assistant_masks"] for s in found] == [[0, 0, 1, 1], [0, 0, 0, 1]]
