"""What is read out of a log history, by hand: curves, smoothing, figures before and after, chosen log-probs."""

import json
import re
import shutil
from dataclasses import asdict

import pytest
from errors import refused
from histories import HISTORY, evaluation
from loop_folder import trajectory
from repository import ROOT

from mdpo.reporting.health import ADVICE, STOP_FALL, TOKEN_FALL, health_warnings
from mdpo.reporting.log_history import before_and_after, chosen_logps, curve, latest_turns, not_finite, smoothed
from mdpo.reporting.plots import MOST_POINTS, PLOTS, lines_of, thinned, turn_lines
from mdpo.reporting.run_report import REPORT, of_the_training, show_result
from mdpo.rollouts.iterations import TRAJECTORIES
from mdpo.rollouts.tables import wilson
from scripts.dev import healthy_runs


def test_curves():
    loss = curve(HISTORY, "loss")
    assert loss.training == [(1, 0.69), (2, 0.60)] and loss.held_out == [(0, 0.5), (2, 0.5)]
    assert curve(HISTORY, "grad_norm").training == [(2, 3.0)] and not_finite(HISTORY) == {"grad_norm": 1}
    assert curve(HISTORY, "logps/chosen").held_out == [(0, -50.0), (2, -54.0)]  # the later of two at step 2
    assert not curve(HISTORY, "nothing")
    before, after = before_and_after(HISTORY)
    assert (before["step"], after["eval_logps/chosen"]) == (0, -54.0)
    assert before_and_after(HISTORY[1:3]) == ({}, {}) and before_and_after(HISTORY[3:])[0] == {}


def test_lines_of_a_plot():
    plots = {plot.name: plot for plot in PLOTS}
    loss = lines_of(plots["loss"], HISTORY)
    assert [(line.label, line.held_out, line.points) for line in loss] == [
        ("training", False, [(1, 0.69), (2, 0.60)]),
        ("held-out", True, [(0, 0.5), (2, 0.5)]),
    ]
    logps = lines_of(plots["logps"], HISTORY)
    assert [(line.label, line.points[-1]) for line in logps] == [
        ("chosen held-out", (2, -54.0)),
        ("rejected held-out", (2, -76.0)),
    ]
    assert lines_of(plots["memory"], HISTORY) == []
    assert [(line.label, line.points) for line in turn_lines(HISTORY)] == [("turn 1", [(0, 0.0), (2, 1.5)])]
    assert [line.held_out for line in turn_lines(HISTORY) + turn_lines(HISTORY[1:3])] == [True, False]


def test_smoothing_and_thinning():
    """40 points: windows of 2 to each side, fewer where the curve ends."""
    points = [(step, float(step % 2)) for step in range(40)]
    smooth = smoothed(points)
    assert [value for _, value in smooth[:4]] == pytest.approx([1 / 3, 2 / 4, 2 / 5, 3 / 5])
    assert [step for step, _ in smooth] == list(range(40)) and smooth[-1] == (39, pytest.approx(2 / 3))
    assert smoothed(points[:19]) == points[:19]
    assert thinned(points) == points
    many = thinned([(step, float(step)) for step in range(2 * MOST_POINTS + 1)])
    assert len(many) == 267 and many[:2] == [(1.0, 1.0), (4.0, 4.0)] and many[-1] == (799.0, 799.0)


def test_a_noisy_curve_is_drawn_over_its_raw_values():
    history = [{"loss": float(step % 2), "learning_rate": float(step % 2), "step": step} for step in range(100)]
    plots = {plot.name: plot for plot in PLOTS}
    [loss], [rate] = (lines_of(plots[name], history) for name in ("loss", "learning_rate"))
    assert len(loss.raw) == 100 and max(value for _, value in loss.points[10:-10]) < 0.6
    assert rate.raw == [] and rate.points[:2] == [(0, 0.0), (1, 1.0)]


def test_latest_turns():
    which, names = latest_turns(HISTORY)
    assert which == "held-out pairs at step 2" and names["margins/turn_1"] == 1.5 and "loss" in names
    which, names = latest_turns(HISTORY[1:3])
    assert which == "training pairs at step 2" and names["margins/turn_1"] == 0.2
    assert latest_turns([{"loss": 1.0, "step": 1}]) == ("", {})


def test_chosen_logps_of_held_out_pairs():
    line, fell = chosen_logps(HISTORY, 0.1)
    assert fell and line == (
        "log-probs of the chosen side fell by 4.00 nats a pair (held-out pairs, -50.00 at step 0, -54.00 at step 2); "
        "rejected fell by 16.00."
    )
    line, fell = chosen_logps([evaluation(0, -50.0, -60.0), evaluation(9, -50.4, -59.0)], 0.1)
    assert not fell and "fell by 0.40" in line and line.endswith("rejected rose by 1.00.")  # under 1 % of 50
    line, fell = chosen_logps([evaluation(0, -50.0, -60.0), evaluation(9, -40.0, -60.0)], 0.1)
    assert not fell and "rose by 10.00" in line


def test_chosen_logps_of_training_alone():
    """Rewards over β are the distance to the reference: −0.4 / 0.1 = −4 nats below, the last of 10 logs."""
    logs = [
        {"loss": 0.6, "rewards/chosen": -0.04 * i, "rewards/rejected": -0.1 * i, "logps/chosen": -50.0, "step": i}
        for i in range(1, 11)
    ]
    line, fell = chosen_logps(logs, 0.1)
    assert fell and "-4.00 nats (training pairs, the last log), rejected -10.00" in line
    assert chosen_logps([{"loss": 1.0, "step": 1}], 0.1) == ("", False)
    assert chosen_logps([evaluation(0, -50.0, -60.0)], 0.1) == ("", False)  # one evaluation tells of no change


def of_a_run(chosen=0.0, rejected=0.0, token=0.0, stop=0.0):
    """Two evaluations: both sides begin at -50 and -60 nats a pair, a chosen token at -2, a stop at -0.1."""
    first = {"eval_logps_per_token/chosen": -2.0, "eval_stop_logps/chosen": -0.1}
    last = {"eval_logps_per_token/chosen": -2.0 + token, "eval_stop_logps/chosen": -0.1 + stop}
    return [evaluation(0, -50.0, -60.0, **first), evaluation(8, -50.0 + chosen, -60.0 + rejected, **last)]


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        ({"token": -TOKEN_FALL - 0.01}, f"by {TOKEN_FALL + 0.01:.2f} nats a token (held-out pairs, step 0 to 8; more"),
        ({"token": -TOKEN_FALL + 0.01}, ""),
        ({"token": 1.0}, ""),
        ({"stop": -STOP_FALL - 0.01}, f"fell by {STOP_FALL + 0.01:.2f} nats a turn (held-out pairs, step 0 to 8; more"),
        ({"stop": -STOP_FALL + 0.01}, ""),
        ({"stop": 0.1}, ""),
        ({"chosen": -0.51, "rejected": -0.52}, "by 0.51 nats a pair (more than 1% of its log-prob is a warning): the "),
        ({"chosen": -0.51, "rejected": -0.52}, "the margin grows only because rejected falls faster."),
        ({"chosen": -0.51, "rejected": -0.50}, "rejected does not fall as fast, and the margin shrinks."),
        ({"chosen": -0.49, "rejected": -20.0}, ""),  # under 1 % of 50
        ({"chosen": 5.0, "rejected": -20.0}, ""),
    ],
)
def test_warnings_of_both_sides_of_each_threshold(change, warning):
    found = health_warnings(of_a_run(**change), 0.1)
    assert found == [] if not warning else len(found) == 2 and warning in found[0] and found[1] == ADVICE


def test_all_warnings_at_once_have_one_advice():
    found = health_warnings(of_a_run(-20.0, -30.0, -1.0, -3.0), 0.1)
    assert len(found) == 4 and found[-1] == ADVICE and "learning_rate" in ADVICE and "nll_coefficient" in ADVICE


def test_the_runs_of_the_page():
    """Held-out figures of docs/healthy-runs.md: the quickstart's, and at ten times its learning rate."""

    def ends(chosen, rejected, token, stop):
        more = [
            {"eval_logps_per_token/chosen": t, "eval_stop_logps/chosen": s} for t, s in zip(token, stop, strict=True)
        ]
        return [evaluation(20 * i, chosen[i], rejected[i], **more[i]) for i in (0, 1)]

    assert health_warnings(ends((-45.5, -40.1), (-53.2, -73.0), (-1.273, -1.122), (-1.7, -0.084)), 0.1) == []
    assert len(health_warnings(ends((-49.0, -176.1), (-56.9, -260.1), (-1.351, -4.859), (-1.665, -18.734)), 0.1)) == 4


def test_warnings_of_training_alone():
    """The last of ten logs says how far the policy is from its reference."""

    def logs(token, stop):
        ratios = {"log_ratios_per_token/chosen": token, "stop_log_ratios/chosen": stop}
        return [
            {"loss": 0.6, **(ratios if step == 10 else dict.fromkeys(ratios, -9.0)), "step": step}
            for step in range(1, 11)
        ]

    [token, stop, _] = health_warnings(logs(-TOKEN_FALL - 0.1, -STOP_FALL - 0.1), 0.1)
    assert "training pairs, against the reference" in token and "training pairs, against the reference" in stop
    assert health_warnings(logs(-TOKEN_FALL + 0.05, -STOP_FALL + 0.05), 0.1) == health_warnings([], 0.1) == []


def agrees_with_itself(screen: str) -> bool:
    """Whether the table's rows of log-probs and the line below it tell of the same evaluations."""
    rows = re.findall(r"│ log-probs (\w+) +│ +(-[\d.]+) │ +(-[\d.]+) │", screen)
    table = {side: (float(before), float(after)) for side, before, after in rows}
    moved = {
        side: f"{'fell' if after < before else 'rose'} by {abs(after - before):.2f}"
        for side, (before, after) in table.items()
    }
    before, after = table["chosen"]
    line = f"side {moved['chosen']} nats a pair (held-out pairs, {before:.2f} at step 0, {after:.2f} at step "
    return line in screen and f"rejected {moved['rejected']}." in screen


@pytest.mark.parametrize(("last", "word"), [(-45.0, "rose"), (-54.0, "fell")])
def test_the_end_s_table_and_line_agree(last, word, capsys):
    """Figures after training are the last evaluation's, in both; one in between counts in neither."""
    rest = {"eval_rewards/accuracies": 1.0, "eval_rewards/margins": 2.0, "eval_pairs": 8}
    history = [
        evaluation(0, -50.0, -60.0, **rest),
        evaluation(2, -57.5, -90.0, **rest),
        evaluation(4, last, -76.0, **rest),
    ]
    line, fell = chosen_logps(history, 0.1)
    report = {"before": before_and_after(history)[0], "after": history[-1], "first_loss": 0.69, "steps": 4}
    report |= {"pairs_per_second": 1.0, "train_seconds": 4.0, "peak_memory_gb": 1.0}
    show_result(report | {"chosen_logps": {"line": line, "fell": fell}, "warnings": health_warnings(history, 0.1)})
    screen = capsys.readouterr().out
    assert agrees_with_itself(screen) and f"side {word} by" in screen and ("warning: " in screen) == fell
    assert not agrees_with_itself(screen.replace(f"{last:.4f}", "-57.5000"))


def test_what_training_took_is_kept_by_a_start_that_trains_nothing(tmp_path):
    path = tmp_path / REPORT
    took = {"train": {"train_loss": 0.5}, "steps": 7, "train_seconds": 3.0, "pairs_per_second": 9.0}
    assert of_the_training(path, steps=0) == {}  # there is none
    for text, kept in (
        (json.dumps({**took, "peak_memory_gb": 2.0, "after": {}}), {**took, "peak_memory_gb": 2.0}),
        (json.dumps(took), {}),
        ("[]", {}),
        ("{", {}),
    ):
        path.write_text(text)
        assert of_the_training(path, steps=0) == kept and of_the_training(path, steps=1) == {}


def test_readme_s_first_screen_agrees_with_itself():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert agrees_with_itself(text[: text.index("## ")])


def test_right_answers_are_drawn_where_both_runs_have_them(tmp_path):
    """After 0 and 10 steps, of two questions each: 1 and 2 right, 1 and 0."""
    history = [{metric: 0.5, "step": 1} for metric, *_ in healthy_runs.PANELS]
    for name, rights in {"healthy": (1, 2), "broken": (1, 0)}.items():
        for step, right in zip((0, 10), rights, strict=True):
            folder = tmp_path / name / "answers" / str(step)
            folder.mkdir(parents=True)
            rows = [json.dumps(asdict(trajectory(f"q{n}", n < right))) for n in range(2)]
            (folder / TRAJECTORIES).write_text("\n".join(rows) + "\n", encoding="utf-8")
        (tmp_path / name / "trainer_state.json").write_text(json.dumps({"log_history": history}), encoding="utf-8")
    runs = [tmp_path / name for name in ("healthy", "broken")]
    answers = [healthy_runs._answers(run) for run in runs]
    assert answers == [[(0, 0.5, 2), (10, 1.0, 2)], [(0, 0.5, 2), (10, 0.0, 2)]]
    drawn = healthy_runs._drawn([history, history], answers).axes[-1]
    assert [list(line.lines[0].get_ydata()) for line in drawn.containers] == [[0.5, 1.0], [0.5, 0.0]]
    for line, share in zip(drawn.containers, (1.0, 0.0), strict=True):
        [low, high] = line.lines[2][0].get_segments()[1][:, 1]  # the interval at step 10
        assert (low, high) == pytest.approx(wilson(share, 2))
    shutil.rmtree(runs[1] / "answers")
    with refused("healthy_runs", str(runs[1])):
        healthy_runs.main([str(run) for run in runs])
    (runs[0] / "trainer_state.json").write_text(json.dumps({"log_history": HISTORY}), encoding="utf-8")
    with refused("healthy_runs", str(runs[0]), "rewards/margins"):
        healthy_runs.main([str(run) for run in runs])
