"""What the page of a loop is drawn from: figures by hand, tasks to look at, folders that are broken."""

import json

import pytest
from errors import refused
from loop_folder import finish, logs, stages, trajectory, write_loop, write_pairs, write_training, write_trajectories

from mdpo.reporting.loop_training import training_figures
from mdpo.rollouts.iterations import DONE, TRAJECTORIES
from mdpo.rollouts.loop_figures import FIRST, HEAD, LAST, TAIL, loop_figures, readable, telling
from mdpo.rollouts.stage_figures import stage_figures, trajectory_at
from mdpo.rollouts.tables import mean_interval, reward_interval


def test_all_k_samples_right(tmp_path):
    """Tasks a, b, c with 3 of 3, 2 of 3 and 0 of 3 right samples: pass@1 5/9, pass@3 2/3, pass^3 1/3."""
    rows = [trajectory(key, k < right, k) for key, right in (("a", 3), ("b", 2), ("c", 0)) for k in range(3)]
    figures = stage_figures(write_trajectories(tmp_path, rows)).figures
    assert (figures["tasks"], figures["conversations"], figures["samples"]) == (3, 9, 3)
    found = [figures[name] for name in ("accuracy", "any_correct", "all_correct")]
    assert found == pytest.approx([5 / 9, 2 / 3, 1 / 3])


def test_lengths(tmp_path):
    """Sampled tokens 3 + 2, 4, and one without ids, which is left out: 3 a turn of 3 turns, 4.5 a trajectory of 2."""
    rows = [trajectory("a", True, tokens=(3, 2)), trajectory("b", True, tokens=(4,))]
    rows.append(trajectory("c", True, tokens=(100,), sequences=[]))
    figures = stage_figures(write_trajectories(tmp_path, rows)).figures
    assert figures["tokens"] == {"turn": 3.0, "trajectory": 4.5, "longest": 5}
    assert figures["turns"] == pytest.approx(4 / 3) and figures["by_turns"] == {1: (2, 2), 2: (1, 1)}
    without = write_trajectories(tmp_path / "without", rows[2:])
    assert stage_figures(without).figures["tokens"] is None


def test_the_interval_of_a_mean_is_over_tasks():
    """Of [[1, 0], [1, 1]] the mean is 0.75, sums less 2 · 0.75 are -0.5 and 0.5, √(2 / 1 · 0.5) / 4 = 0.25, times
    1.959964. The same samples twice tell nothing new: √(2 / 1 · 2) / 8 = 0.25. As eight tasks they would:
    √(8 / 7 · 1.5) / 8 = 0.163663."""
    assert mean_interval([[1, 0], [1, 1]]) == pytest.approx((0.75 - 0.489991, 0.75 + 0.489991))
    assert mean_interval([[1, 0, 1, 0], [1, 1, 1, 1]]) == pytest.approx((0.75 - 0.489991, 0.75 + 0.489991))
    assert mean_interval([[1], [0], [1], [1]] * 2) == pytest.approx((0.75 - 0.320774, 0.75 + 0.320774), abs=1e-5)
    assert mean_interval([[1, 0], []]) is None and mean_interval([]) is None


def test_the_interval_of_rewards_of_0_and_1_is_that_of_a_share():
    """8 of 10 right: Wilson's, of tasks and not of samples; all right: not of width 0. With a half it is a mean."""
    assert reward_interval([[1.0]] * 8 + [[0.0], [0.0], []]) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert reward_interval([[1.0, 1.0]] * 4) == pytest.approx((0.5101, 1.0), abs=1e-4)
    assert reward_interval([[1.0], [0.5]]) == mean_interval([[1.0], [0.5]]) and reward_interval([]) is None


def test_tasks_to_look_at():
    """One that became right, one that became wrong, the others of these, what went to and fro, the rest."""
    outcomes = {"a": [True] * 3, "b": [False, True, True], "c": [True, True, False], "d": [False, False, True]}
    outcomes |= {"e": [True, False, True], "f": [False] * 3}
    assert telling(outcomes) == ["b", "c", "d"] and telling(outcomes, 9) == ["b", "c", "d", "e", "a", "f"]
    assert telling({"a": [True], "b": [False]}) == ["a", "b"] and telling({}) == []


def test_a_whole_loop(tmp_path):
    """Of 4 held-out tasks 2, 3 and 2 are right (test helper `write_loop`); each sample of a task is alike."""
    facts = loop_figures(stages(write_loop(tmp_path)))
    assert facts["broken"] == [] and [finished for *_, finished in facts["stages"]] == [True] * 9
    shares = {n: found["shares"] for n, found in facts["evaluations"].items()}
    assert {n: found["right"][0] for n, found in shares.items()} == {0: 0.5, 1: 0.75, 2: 0.5}
    assert shares[0]["all"] == shares[0]["right"] and shares[0]["right"][1:] == pytest.approx(
        (0.1500, 0.8500), abs=1e-4
    )
    assert list(facts["samples"]) == list(facts["pairs"]) == list(facts["training"]) == [1, 2]
    assert facts["pairs"][2]["pairs"] == 7
    became_right, became_wrong, _ = facts["tasks"]
    assert (became_right["key"], became_wrong["key"]) == ("task-0", "task-1")
    assert [column["right"] for column in became_right["columns"]] == [False, True, True]
    assert became_right["prompt"] == [{"role": "user", "text": "What is task-0?"}]
    said = [message["text"] for message in became_right["columns"][0]["messages"]]
    assert said == ["```python\nprint(0)\n```", "```output\n0\n```", "The answer is False."]


def test_the_first_sample_of_a_task_is_shown_wherever_it_stands(tmp_path):
    path = write_trajectories(tmp_path, [trajectory("é", True, 1), trajectory("b", False), trajectory("é", False, 0)])
    place = stage_figures(path).places["é"]
    assert place.correct is False and trajectory_at(path, place.offset).sample == 0


def test_a_file_that_changed_is_read_again(tmp_path):
    path = write_trajectories(tmp_path, [trajectory("a", True)])
    assert stage_figures(path) is stage_figures(path) and stage_figures(path).figures["tasks"] == 1
    write_trajectories(tmp_path, [trajectory("a", True), trajectory("b", True)])
    assert stage_figures(path).figures["tasks"] == 2


def test_only_whole_stages_are_read(tmp_path):
    write_loop(tmp_path)
    for name in ("iteration-1/evaluate", "iteration-2/train"):
        (tmp_path / name / DONE).unlink()
    facts = loop_figures(stages(tmp_path))
    assert (list(facts["evaluations"]), list(facts["training"])) == ([0, 2], [1])
    assert loop_figures(stages(tmp_path / "nothing"))["tasks"] == []


def test_broken_stages_are_named(tmp_path):
    """Each finished, each broken in its own way; what is whole is there all the same."""
    write_loop(tmp_path)
    (tmp_path / "iteration-0/evaluate" / TRAJECTORIES).write_bytes(b"\xff\n")
    (tmp_path / "iteration-1/sample" / TRAJECTORIES).write_text('{"key": "a"}\n')
    (tmp_path / "iteration-1/evaluate" / TRAJECTORIES).unlink()
    (tmp_path / "iteration-2/sample" / TRAJECTORIES).write_text("")
    (tmp_path / "iteration-1/pair/pairs.report.json").write_text('{"pairs": 3}')
    (tmp_path / "iteration-2/pair/pairs.report.json").unlink()
    facts = loop_figures(stages(tmp_path))
    named = ["-0/evaluate", "-1/sample", "-1/pair", "-1/evaluate", "-2/sample", "-2/pair"]
    assert len(facts["broken"]) == 6
    for line, name in zip(facts["broken"], named, strict=True):
        assert f"iteration{name}/" in line
    assert list(facts["evaluations"]) == [2] and [len(task["columns"]) for task in facts["tasks"]] == [1, 1, 1]
    broken = trajectory("a", True, sequences=[{"input_ids": [1]}])
    with refused("sequences", "trajectories.jsonl:1", "assistant_masks"):
        stage_figures(write_trajectories(tmp_path / "ids", [broken]))
    with refused("trajectories", "no trajectory"):
        stage_figures(tmp_path / "iteration-2/sample" / TRAJECTORIES)


def test_long_trajectories_are_shown_in_part():
    many = [{"role": "assistant", "content": str(i)} for i in range(FIRST + LAST + 30)]
    shown = readable(many)
    assert len(shown) == FIRST + 1 + LAST and shown[FIRST] == {"role": "", "text": "… 30 messages …"}
    [long] = readable([{"role": "tool", "content": "a" * HEAD + "b" * 5000 + "c" * TAIL}])
    assert long["text"] == "a" * HEAD + "\n… 5,000 characters …\n" + "c" * TAIL


def test_messages_of_any_form_are_texts():
    """Thoughts, calls, parts, and what is none of these."""
    call = {"type": "function", "function": {"name": "buy", "arguments": {"item": "pën", "n": 2}}}
    said = [
        {"role": "assistant", "reasoning_content": "Let me buy.", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": [{"type": "text", "text": "bought"}, {"type": "text", "text": "2"}]},
        {"role": "tool", "content": {"left": 3}},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "stop", "arguments": "{}"}]},
        {"role": "assistant", "tool_calls": ["go", {"function": 3}]},
        "none of these",
    ]
    texts = [
        'Let me buy.\n→ buy({"item": "pën", "n": 2})',
        "bought\n2",
        '{"left": 3}',
        "→ stop({})",
        "→ go\n→ 3",
        "none of these",
    ]
    assert [message["text"] for message in readable(said)] == texts


def test_figures_of_training(tmp_path):
    """Rewards are β · (log π − log π_ref): the last tenth of 20 logs are 0.38 and 0.4, mean 0.39, β 0.2, so 1.95 nats;
    rejected -3.9. An evaluation counts instead where there is one, of a later step than the first."""
    write_training(tmp_path / "a", [logs(step, 0.02 * step) for step in range(1, 21)])
    found = training_figures(tmp_path / "a")
    assert (found["chosen_ratio"], found["rejected_ratio"]) == pytest.approx((1.95, -3.9))
    assert found["margin"] == pytest.approx(1.17) and found["of"] == "training pairs, last tenth of the logs"
    assert (found["pairs"], found["steps"], found["page"], found["accuracy"]) == (5, 40, True, 0.75)
    held_out = {"step": 20, "eval_loss": 0.4, "eval_pairs": 64, "eval_rewards/chosen": 0.1, "eval_logps/chosen": -48.0}
    write_training(tmp_path / "b", [logs(20, 0.4), held_out])
    found = training_figures(tmp_path / "b")
    assert (found["of"], found["chosen_ratio"], found["chosen"], found["loss"]) == (
        "64 held-out pairs",
        0.5,
        -48.0,
        0.4,
    )
    assert found["accuracy"] is None and found["rejected_ratio"] is None


def test_the_report_of_pairs_is_what_is_read(tmp_path):
    """A number that is none is named."""
    folder = stages(tmp_path)[2][1]
    write_pairs(finish(folder), pairs="many")
    assert "no report of pairs" in loop_figures([(1, folder)])["broken"][0]
    write_pairs(folder)
    report = loop_figures([(1, folder)])["pairs"][1]
    assert json.loads((folder / "pairs.report.json").read_text()) == report
