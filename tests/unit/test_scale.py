"""benchmarks/scale.py: its generated pairs, exponents and expected work, and that what is missing is measured alone.
Nothing is timed here."""

import json
import math

import pytest
from repository import benchmark


@pytest.fixture(scope="module")
def scale():
    with benchmark("scale") as module:
        yield module


@pytest.fixture
def results(scale, tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "RESULTS", tmp_path)
    return tmp_path


def test_generated_pairs_are_the_same_in_every_set(scale):
    rows = list(scale.scale_inputs.rows(1001))
    assert rows[:10] == list(scale.scale_inputs.rows(10)) and rows[:2] != list(scale.scale_inputs.rows(2, seed=1))
    assert len({json.dumps(row) for row in rows}) == 1001
    alike = [i for i, row in enumerate(rows) if row["chosen"] == row["rejected"]]
    assert alike == [499, 999]  # to be dropped
    prompts = [row["prompt"][0]["content"] for row in rows]
    assert prompts[::2][:500] == prompts[1::2] and len(set(prompts)) == 501  # two pairs of each
    turns = [sum(message["role"] == "assistant" for message in row["chosen"]) for row in rows[::2]]
    assert turns == [3 if i % 3 == 0 else 2 for i in range(501)]
    for row in rows:
        for side in ("chosen", "rejected"):
            assert [m["role"] for m in row[side]] == ["assistant", "user", "assistant", "user", "assistant"][
                : len(row[side])
            ]


def test_rows_are_written_once(scale, tmp_path):
    path = tmp_path / "data/pairs.jsonl"
    scale.scale_inputs.write_rows(path, 3)
    assert [json.loads(line) for line in path.read_text().splitlines()] == list(scale.scale_inputs.rows(3))
    scale.scale_inputs.write_rows(path, 5)
    assert len(path.read_text().splitlines()) == 3 and [p.name for p in path.parent.iterdir()] == ["pairs.jsonl"]


def test_exponents_by_hand(scale):
    """Twice the work in twice, four times and the same time; a tenfold in 10^1.5."""
    assert scale.scale_tables.slopes([1, 2, 4, 8], [3, 6, 24, 24]) == [None, 1, 2, 0]
    assert scale.scale_tables.slopes([10, 100], [1, 10**1.5]) == [None, pytest.approx(1.5)]
    assert scale.scale_tables.slopes([1, 2, 4], [0.0, 1.0, 2.0]) == [None, None, 1]
    assert scale.scale_tables.slopes([5], [1]) == [None] and scale.scale_tables.slopes([], []) == []


def test_expected_work_of_a_step_by_hand(scale):
    """2 layers of hidden size 128: 4 · 128² + 3 · 128 · 384 weights each, 2 FLOPs a weight and token; attention 4 · 128
    FLOPs for each of T²/2 pairs of tokens; the head 2 · 128 · 49,152 for each second token."""
    attention, whole = scale.scale_tables.step_flops(1000)
    assert attention == 2 * 4 * 128 * 1000**2 / 2
    assert whole - attention == 1000 * (2 * 2 * (4 * 128**2 + 3 * 128 * 384) + 128 * 49_152)
    shares = [a / w for a, w in map(scale.scale_tables.step_flops, (512, 32_768))]
    assert shares[0] < 0.05 and shares[1] > 0.6
    [_, slope] = scale.scale_tables.slopes([2**20, 2**21], [scale.scale_tables.step_flops(2**n)[1] for n in (20, 21)])
    assert 1.9 < slope < 2  # attention has nearly all of it


def test_what_is_missing_is_measured(scale, results, tmp_path):
    wanted = list(scale.points("tokens", [512, 2048]))
    assert [point.name for point in wanted] == ["tokens-512", "tokens-2048"]
    (results / "tokens-512.json").write_text("{}")
    assert [point.name for point in scale.missing(wanted, again=False, work=tmp_path)] == ["tokens-2048"]
    assert scale.missing(wanted, again=True, work=tmp_path) == wanted
    ranks = [point.name for point in scale.points("ranks")]
    assert ranks == [f"ranks-{kind}-{n}" for n in (1, 2, 4) for kind in ("per_rank", "in_all")]


def test_later_starts_follow_a_new_first_start(scale, results, tmp_path):
    """The first start empties the caches that the others find."""
    wanted = list(scale.points("set", [1000, 10_000]))
    for kind in ("first", "second", "two_ranks"):
        (results / f"set-{kind}-10000.json").write_text("{}")
    (results / "set-second-1000.json").write_text("{}")
    found = [point.name for point in scale.missing(wanted, again=False, work=tmp_path)]
    assert found == ["set-first-1000", "set-second-1000", "set-two_ranks-1000"]
    (results / "set-first-1000.json").write_text("{}")
    (tmp_path / "set-1000/reference").mkdir(parents=True)
    assert [point.name for point in scale.missing(wanted, again=False, work=tmp_path)] == ["set-two_ranks-1000"]
    assert [point.ranks for point in wanted[:3]] == [1, 1, 2]
    (tmp_path / "set-1000/reference").rmdir()  # a later start would find nothing of the first one
    again = [point.name for point in scale.missing(wanted[:3], again=False, work=tmp_path)]
    assert again == ["set-first-1000", "set-two_ranks-1000"]


def test_a_stage_s_seconds_are_its_own(scale, monkeypatch):
    """By a clock that is moved by hand: outer 1 + 4, inner 2, the rest 8."""
    points, now = scale.scale_tables.scale_points, [100.0]
    monkeypatch.setattr(points.time, "time", lambda: now[0])
    monkeypatch.setattr(points.threading, "Thread", lambda **_: type("Idle", (), {"start": lambda self: None})())

    class Work:
        def outer(self):
            now[0] += 1
            self.inner()
            now[0] += 4

        def inner(self):
            now[0] += 2

    stages = points.Stages()
    for name, stage in (("outer", "load"), ("inner", "report")):
        stages.wrap(Work, name, stage)
    Work().outer()
    now[0] += 8
    stages.change()
    assert {k: v for k, v in stages.seconds.items() if v} == {"load": 5, "report": 2, "the rest": 8}
    assert stages.memory["load"] > 0


def test_tables_show_what_is_there(scale, results, capsys):
    rank = {"seconds": 2.0, "before_gb": 0.5, "step_gb": 0.75, "peak_gb": 1.0}
    start = {"stages": dict.fromkeys(scale.scale_tables.scale_points.ORDER, 1.0), "peak_gb": 1.5,
             "own_gb": dict.fromkeys(scale.scale_tables.scale_points.ORDER, 0.25)}  # fmt: skip
    common = {"cores": 2, "kind": "", "stand_in": False}
    for size in (512, 1024):
        made = {**common, "axis": "tokens", "size": size, "ranks": [{**rank, "seconds": size / 256}]}
        (results / f"tokens-{size}.json").write_text(json.dumps(made))
    made = {**common, "axis": "set", "size": 1000, "kind": "first", "stand_in": True, "ranks": [start]}
    (results / "set-first-1000.json").write_text(json.dumps(made))
    scale.scale_tables.show(scale.results())
    text = capsys.readouterr().out
    expected = math.log2(scale.scale_tables.step_flops(1024)[1] / scale.scale_tables.step_flops(512)[1])
    assert "4.000" in text and "1.00" in text and f"{expected:.2f}" in text and "0.250" in text
    assert "1,000*" in text and f"{len(scale.scale_tables.scale_points.ORDER):.1f}" in text and "zeros" in text
    scale.scale_tables.draw(scale.results(), results / "figure.png")
    assert (results / "figure.png").stat().st_size > 1000
