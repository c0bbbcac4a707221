"""scripts/compare_runs.py: differing keys, final figures and curves of runs side by side, and what is no run."""

import json
from pathlib import Path

import compare_runs
import pytest
from browser import BROWSER, seen
from histories import HISTORY

from mdpo.runs.entrypoint import run

MORE = {"eval_rewards/accuracies": 0.75, "eval_rewards/margins": 1.25, "eval_pairs": 8}


def make_run(folder, recipe, history=HISTORY, report=True, state="trainer_state.json"):
    (folder / state).parent.mkdir(parents=True, exist_ok=True)
    (folder / "recipe_resolved.yaml").write_text(recipe)
    (folder / state).write_text(json.dumps({"log_history": [{**log, **MORE} for log in history]}))
    if report:
        (folder / "run_report.json").write_text(json.dumps({"pairs_per_second": 1.5, "peak_memory_gb": 3.25}))
    return str(folder)


@pytest.fixture
def folders(tmp_path):
    """The second run goes on: no report yet, its state is in checkpoints of which 10 is the last."""
    first = make_run(tmp_path / "a", "beta: 0.1\nlearning_rate: 4e-7\nmax_length: 512\nnote: 'on'\noutput_dir: a\n")
    going = tmp_path / "b<i>"
    recipe = "max_length: 512\nbeta: 0.2\nlearning_rate: 0.0000004\nloss_type: [hinge]\nnote: 'on'\noutput_dir: b\n"
    make_run(going, recipe, HISTORY[:1], report=False, state="checkpoint-9/trainer_state.json")
    history = [{k: {"eval_loss": 0.25, "loss": 0.125}.get(k, v) for k, v in log.items()} for log in HISTORY]
    make_run(going, recipe, history, report=False, state="checkpoint-10/trainer_state.json")
    return [first, str(going)]


def test_what_differs(folders):
    runs = compare_runs.load([Path(folder) for folder in folders])
    assert [of.name for of in runs] == ["a", "b<i>"]
    assert compare_runs.differing(runs) == [("beta", ["0.1", "0.2"]), ("loss_type", ["(default)", '["hinge"]'])]
    figures = dict(compare_runs.final_metrics(runs))
    assert figures["loss"] == ["0.5000", "0.2500"] and figures["log-probs chosen"] == ["-54.0000"] * 2
    assert figures["last training loss"] == ["0.6000", "0.1250"] and figures["steps"] == ["2", "2"]
    assert figures["pairs/s"] == ["1.50", "–"] and figures["peak memory (GB)"] == ["3.25", "–"]
    drawn = {title: lines for title, _, lines in compare_runs.plots(runs)}
    assert list(drawn) == ["Loss", "Reward accuracy", "Reward margin"] + [
        f"Log-probs of both sides: {side}" for side in ("chosen", "rejected")
    ]
    assert [(line.label, line.held_out, line.points[-1]) for line in drawn["Loss"]] == [
        ("a", False, (2, 0.6)), ("_", True, (2, 0.5)), ("b<i>", False, (2, 0.125)), ("_", True, (2, 0.25)),
    ]  # fmt: skip
    assert len({line.color for line in drawn["Loss"]}) == 2


def test_the_page_and_the_terminal(folders, tmp_path, capsys):
    out = tmp_path / "out.html"
    assert run(compare_runs.main, [*folders, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "beta" in printed and "0.2" in printed and "hinge" in printed and "learning_rate" not in printed
    text = out.read_text()
    assert text.count("<svg") == 5 and "b&lt;i&gt;" in text and "https:" not in text and "http:" not in text
    if BROWSER:
        page, console = seen(out, width=380)
        assert console == [] and page["scroll"] == page["client"] and len(page["plots"]) == 5


def test_the_same_run_twice_and_names(folders, tmp_path, capsys):
    twin = make_run(tmp_path / "other" / "a", Path(folders[0], "recipe_resolved.yaml").read_text())
    runs = compare_runs.load([Path(folders[0]), Path(twin)])
    assert [of.name for of in runs] == [folders[0], twin] and compare_runs.differing(runs) == []
    assert run(compare_runs.main, [folders[0], twin, "--out", str(tmp_path / "c.html")]) == 0
    assert "none" in capsys.readouterr().out


def test_what_is_refused(folders, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "recipe_resolved.yaml").write_text("beta: 0.1\n")
    cases = {
        f"{tmp_path}/empty contains no run: no recipe_resolved.yaml and no trainer_state.json.": [
            folders[0],
            f"{tmp_path}/empty",
        ],
        f"{tmp_path}/half contains no run: no trainer_state.json.": [f"{tmp_path}/half", folders[0]],
        "1 runs given; name 2 to 8": folders[:1],
        "--nothing is not an option": [*folders, "--nothing"],
        f"--out: there is no folder {tmp_path}/nowhere.": [*folders, "--out", f"{tmp_path}/nowhere/c.html"],
        f"--out: {tmp_path} is a folder": [*folders, "--out", f"{tmp_path}"],
        "broken/trainer_state.json cannot be read: Expecting value": [
            *folders[:1],
            make_run(tmp_path / "broken", "beta: 0.1\n"),
        ],
    }
    (tmp_path / "broken" / "trainer_state.json").write_text('{"log_history": [')
    for message, argv in cases.items():
        assert run(compare_runs.main, argv) == 1
        assert message in capsys.readouterr().err
