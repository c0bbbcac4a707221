"""mdpo/rollouts/pairing.py: which trajectories of a task are compared, by hand."""

import gzip
import json
import os

import pair_rollouts
import pytest
from errors import refused
from long_trajectories import FIRST, check_peak, write_long

from mdpo.data.rows import row_to_pair
from mdpo.errors import UserError
from mdpo.rollouts.pairing import HALF, Pairing, Report, read_scored
from mdpo.rollouts.pairing import paired_rows as lazy_rows
from mdpo.rollouts.scored import Scored, same_turns
from mdpo.rollouts.scored import scored as kept


def said(*turns: str) -> list[dict]:
    """A question, then turns of the policy with the environment's between them."""
    messages = [{"role": "user", "content": "q"}]
    for n, turn in enumerate(turns):
        messages += [{"role": "user", "content": f"r{n}"}] * bool(n) + [{"role": "assistant", "content": turn}]
    return messages


def scored(reward: float, *turns: str, tokens: int = 0) -> Scored:
    sequence = {"input_ids": [9] * (tokens + 1), "assistant_masks": [0] + [1] * tokens}
    return kept(said(*turns), reward, [sequence] if tokens else [])


def paired_rows(*arguments, **options) -> tuple[list[dict], Report]:
    rows, report = lazy_rows(*arguments, **options)
    return list(rows), report


A, B, C, D = scored(1, "x", "y"), scored(0, "x", "z"), scored(0.5, "w", "y"), scored(0, "x", "y", "v")
RULES = {
    "best_worst": [(A, B)],
    "all": [(A, B), (A, D), (A, C), (C, B), (C, D)],
    "adjacent": [(A, C), (C, B)],
    "branch": [(A, B), (A, D)],
}


@pytest.mark.parametrize("rule", RULES)
def test_which_two_are_compared(rule):
    assert Pairing(rule).pairs([A, B, C, D], "k") == RULES[rule]
    assert Pairing(rule, max_pairs_per_prompt=1).pairs([A, B, C, D], "k") == RULES[rule][:1]
    wide = [(a, b) for a, b in RULES[rule] if a.reward - b.reward >= 0.75]
    assert Pairing(rule, min_reward_gap=0.75).pairs([A, B, C, D], "k") == wide
    assert Pairing(rule).pairs([A, A], "k") == []


def test_random_pairs_are_drawn_by_seed_and_task():
    drawn = {Pairing("random", seed=n).pairs([A, B, C, D], "k")[0][0].digest for n in range(20)}
    assert len(drawn) > 1 and len(Pairing("random").pairs([A, B, C, D], "k")) == 1
    assert Pairing("random", seed=3).pairs([A, B, C, D], "k") == Pairing("random", seed=3).pairs([A, B, C, D], "k")


def test_a_branch_begins_where_the_way_is_no_longer_the_same():
    """The last message of a trajectory is not on the way: after it nothing went on."""
    assert same_turns(A, B) == 1 and same_turns(A, C) == 0
    assert same_turns(scored(1, "x", "y", "v"), scored(0, "x", "y", "u")) == 2
    assert same_turns(scored(1, "x"), scored(0, "y")) == 0
    other_result = said("x", "z")
    other_result[2] = {"role": "user", "content": "another"}
    assert same_turns(A, kept(other_result, 0, [])) == 1  # one turn was the same; the environment answered otherwise
    history = [{"role": "user", "content": "h"}, {"role": "assistant", "content": "i"}]
    with_history = [kept([*history, *said(*turns)], 0, [], n_prompt=3) for turns in (("x", "y"), ("w", "y"))]
    assert same_turns(*with_history) == 0  # the prompt's own turns are none of the policy's
    two = [scored(1, "x", "y", "v"), scored(0, "x", "u", "t"), scored(0, "x", "y", "w")]
    assert Pairing("branch").pairs(two, "k") == [(two[0], two[2]), (two[0], two[1])]


def test_the_nearest_in_sampled_tokens_come_first():
    good, short, long = scored(1, "a", tokens=10), scored(0, "b", tokens=3), scored(0, "c", tokens=12)
    assert Pairing("all", length_matched=True).pairs([good, short, long], "k") == [(good, long), (good, short)]
    assert Pairing("best_worst", length_matched=True).pairs([good, short, long], "k") == [(good, long)]
    middle = scored(0.5, "d", tokens=10)  # nearest of all, and not the worst
    assert Pairing("best_worst", length_matched=True).pairs([good, short, long, middle], "k") == [(good, long)]


def test_rows_keep_what_was_sampled(tmp_path):
    rows = [
        {"key": "a", "messages": said("x"), "reward": 1.0, "ended": "done", "tools": [{"type": "function"}],
         "sequences": [{"input_ids": [1, 2, 3], "assistant_masks": [0, 0, 1]}]},
        {"key": "a", "messages": said("y"), "reward": 0.0, "ended": "max turns",
         "sequences": [{"input_ids": [1, 2, 4, 5], "assistant_masks": [0, 0, 1, 1]}]},
        {"key": "a", "messages": said("z"), "reward": None, "ended": "environment error"},
        {"messages": said("z"), "correct": True}, {"messages": said("w"), "correct": False},
        {"messages": said("z"), "correct": True}, {"messages": said("u"), "correct": False, "ended": "cut"},
        {"messages": [{"role": "user", "content": "q"}], "correct": False},
        {"key": "b", "messages": said("x"), "reward": 1},
    ]  # fmt: skip
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs, report = paired_rows([tmp_path / "t.jsonl"], Pairing("best_worst"))
    assert pairs[0]["chosen"] == {"messages": said("x"), "sequences": rows[0]["sequences"]} and pairs[0]["tools"]
    assert pairs[0]["id"] == "a-0" and pairs[1]["chosen"] == said("z") and pairs[1]["rejected"] == said("w")
    pair = row_to_pair({**pairs[0], "tools": None})
    assert [side.sequences for side in pair.recorded] == [[([1, 2, 3], [0, 0, 1])], [([1, 2, 4, 5], [0, 0, 1, 1])]]
    assert (report.trajectories, report.tasks, report.paired, report.pairs, report.longer) == (9, 3, 2, 2, 0)
    assert dict(report.left_out) == {
        "without a reward": 1, "the same as an earlier one": 1, "not ended by the policy": 2
    }  # fmt: skip
    assert dict(report.unpaired) == {"fewer than two left": 1}


def test_what_training_would_drop_is_not_drawn(tmp_path):
    """A recorded sequence of more tokens than max_length; one of as many stays, and texts without ids do."""
    rows = [
        {"key": "a", "messages": said(text), "reward": reward,
         "sequences": [{"input_ids": [1] * n, "assistant_masks": [0] * (n - 1) + [1]}]}
        for text, reward, n in (("x", 1, 9), ("y", 0, 8), ("z", 1, 5))
    ]  # fmt: skip
    rows += [{"key": "b", "messages": said(text), "reward": reward} for text, reward in (("x" * 99, 1), ("y", 0))]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs, report = paired_rows([tmp_path / "t.jsonl"], Pairing("all"), max_length=8)
    assert [pair["id"] for pair in pairs] == ["a-0", "b-0"] and pairs[0]["chosen"]["messages"] == said("z")
    assert dict(report.left_out) == {"longer than max_length 8": 1}


def test_why_a_task_has_no_pair(tmp_path):
    """With every rule that looks at rewards, nothing left of a task included."""
    half = {"key": "half", "messages": said("\ud83d"), "reward": 1}
    rows = [
        *({"key": "cut", "messages": said(text), "reward": 0, "ended": "cut"} for text in "xy"),
        *({"key": "alike", "messages": said(text), "reward": 1} for text in "xy"),
        *({"key": "near", "messages": said(text), "reward": n / 4} for n, text in enumerate("xy")),
        *({"key": "half", "messages": said(text), "reward": 0} for text in "xy"), half,
    ]  # fmt: skip
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for rule in ("best_worst", "all", "branch"):
        for length_matched in (False, True):
            pairs, report = paired_rows([tmp_path / "t.jsonl"], Pairing(rule, 0.5, length_matched=length_matched))
            assert not pairs and dict(report.unpaired) == {
                "fewer than two left": 1, "no two differ in reward": 2, "no two differ by min_reward_gap 0.5": 1
            }  # fmt: skip
            assert report.left_out[HALF] == 1
    branch = paired_rows([tmp_path / "t.jsonl"], Pairing("branch"))[1].unpaired
    assert branch["no two went the same way for a turn"] == 1


def test_a_long_file_is_paired_in_little_memory(tmp_path):
    """By the script, which writes the pairs as they are made; without any it leaves no file."""
    write_long(path := tmp_path / "t.jsonl", 120)
    out = tmp_path / "pairs.jsonl"
    command = [str(path), f"--out={out}"]
    with refused("tasks"):
        pair_rollouts.main([*command, "--pairs=branch"])
    assert os.listdir(tmp_path) == ["t.jsonl"]
    check_peak(path, lambda: pair_rollouts.main(command))
    rows = [json.loads(line) for line in out.open()]
    assert [row["id"] for row in rows] == [f"task {n}-0" for n in range(30)]
    for n, row in enumerate(rows):
        assert row["chosen"]["sequences"][0]["input_ids"][0] - FIRST in range(4 * n, 4 * n + 3)
        assert row["rejected"]["messages"][1]["content"].startswith(f"{4 * n + 3} xxx")


def test_files_that_cannot_be_read_from_their_middle(tmp_path):
    """Packed ones, arrays, and lines that begin with a mark of UTF-8, are blank, or end as on Windows."""
    texts = [json.dumps({"messages": said(text), "correct": text == "é"}, ensure_ascii=False) for text in "xéz"]
    lines = "".join(text + "\r\n\r\n" for text in texts).encode()
    forms = {"a.jsonl.gz": gzip.compress(lines), "a.json": f"[{','.join(texts)}]".encode(), "b.json": lines,
             "a.jsonl": b"\xef\xbb\xbf" + lines, "b.jsonl": b"\n" + lines[:-4]}  # fmt: skip
    for name, data in forms.items():
        (tmp_path / name).write_bytes(data)
        rows, report = paired_rows([tmp_path / name], Pairing("all"))
        assert [(row["chosen"], row["rejected"]) for row in rows] == [(said("é"), said("x")), (said("é"), said("z"))]
        assert report.trajectories == 3 and not report.left_out
    rows, report = paired_rows([tmp_path / name for name in forms], Pairing("all"))
    assert len(rows) == 2 and dict(report.left_out) == {"the same as an earlier one": 12}


def test_a_file_that_changes_meanwhile_is_named(tmp_path):
    rows = [{"key": key, "messages": said(text), "correct": text == "x"} for key in "ab" for text in "xy"]
    path = tmp_path / "t.jsonl"
    for other in ("b", "[1]", json.dumps({**rows[3], "correct": True})):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        pairs, _ = lazy_rows([path], Pairing())
        assert next(pairs)["id"] == "a-0"
        path.write_text(path.read_text().replace(json.dumps(rows[3]), other))
        with pytest.raises(UserError, match=r"t\.jsonl"):
            next(pairs)


def test_numbers_that_are_equal_make_the_same_message(tmp_path):
    """As Python's == of messages has it: 1, 1.0 and True; the order of keys is none. -1 and -2 differ."""
    calls = [[{"function": {"name": "f", "arguments": {"x": x, "y": "é"}}}] for x in (1, 1.0, True, -1, -2, -1.0, 0.5)]
    messages = [[*said("a")[:1], {"role": "assistant", "tool_calls": call}] for call in calls]
    messages.append([dict(reversed(message.items())) for message in messages[0]])
    digests = [kept(one, 0, []).digest for one in messages]
    for n, one in enumerate(messages):
        assert [one == other for other in messages] == [digests[n] == other for other in digests]


@pytest.mark.parametrize(
    "row", [{}, {"messages": said("x")}, {"messages": "x", "reward": 1}, {"messages": [5], "reward": 1},
            {"messages": [{"role": "assistant", "content": "x"}], "reward": 1}],
)  # fmt: skip
def test_rows_that_are_no_trajectories_are_named(row):
    with refused("trajectory", "f.jsonl:3"):
        read_scored(row, "f.jsonl:3", Report())
    for bad in ("good", float("nan"), float("-inf")):
        with refused("reward", "f.jsonl:3", repr(bad)):
            read_scored({"messages": said("x"), "reward": bad}, "f.jsonl:3", Report())
    with refused("sequences", "f.jsonl:3", "assistant_masks"):
        read_scored({"messages": said("x"), "reward": 1, "sequences": [{"input_ids": [1]}]}, "f.jsonl:3", Report())
