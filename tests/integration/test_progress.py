"""The line of progress on a terminal and in a file, and what the timer adds to the logs."""

import io
import re
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from tiny import CHATML, tokenizer_for
from trainers import mdpo_trainer
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from mdpo.reporting.progress import ProgressLine, StepTimer, clock, figures_line, show_progress

ARGS = SimpleNamespace(train_batch_size=4, gradient_accumulation_steps=2, world_size=3, device=torch.device("cpu"))
LOGS = {"loss": 0.45216, "rewards/accuracies": 0.75, "rewards/margins": -1.2}


def test_clock():
    assert [clock(s) for s in (0, 9.6, 75, 3599.6, 3675, 90061)] == [
        "0:00", "0:10", "1:15", "1:00:00", "1:01:15", "25:01:01",
    ]  # fmt: skip


def test_figures_line():
    assert figures_line(LOGS) == "loss 0.4522  accuracy 0.75  margin -1.200"
    assert figures_line({"eval_loss": 0.5, "loss": 9}, "eval_") == "loss 0.5000"


def timer_after(steps, monkeypatch, first=30.0, others=2.0, between=1.0):
    """A timer after steps of that many seconds, with `between` seconds (an evaluation, say) before each but the first;
    and its clock, a list of one number."""
    now, timer, state = [100.0], StepTimer(), SimpleNamespace(global_step=0, max_steps=20, log_history=[{}])
    monkeypatch.setattr("mdpo.reporting.progress.time.perf_counter", lambda: now[0])
    for step in range(steps):
        now[0] += between if step else 0
        timer.on_step_begin(ARGS, state, None)
        now[0] += others if step else first
        timer.on_step_end(ARGS, state, None)
        state.global_step += 1
    return timer, state, now


def test_remaining_time(monkeypatch):
    """The first step of 30 s counts only while it is alone; then each takes 2 s and 1 s between."""
    assert timer_after(0, monkeypatch)[0].remaining_seconds(SimpleNamespace(global_step=0, max_steps=20)) is None
    timer, state, _ = timer_after(1, monkeypatch)
    assert timer.remaining_seconds(state) == 19 * 30
    timer, state, now = timer_after(5, monkeypatch)
    assert timer.remaining_seconds(state) == pytest.approx(15 * 3)
    assert timer.figures(ARGS) == {"steps": 5, "train_seconds": 38.0, "pairs_per_second": 5 * 24 / 38}


def test_speed_and_memory_in_the_logs(monkeypatch):
    """500 tokens in the first 30 s, 100 more in the next two steps of 2 s; of distinct ones 200 and 40."""
    timer, state, now = timer_after(1, monkeypatch)
    logs = {"loss": 0.5, "num_tokens": 500, "num_distinct_tokens": 200}
    timer.on_log(ARGS, state, None, logs=logs)
    assert logs["tokens_per_second"] == pytest.approx(500 / 30) and 0.01 < logs["peak_memory_gb"] < 100
    assert state.log_history[-1]["tokens_per_second"] == logs["tokens_per_second"]
    for _ in range(2):
        timer.on_step_begin(ARGS, state, None)
        now[0] += 2.0
        timer.on_step_end(ARGS, state, None)
    logs = {"loss": 0.5, "num_tokens": 600, "num_distinct_tokens": 240}
    timer.on_log(ARGS, state, None, logs=logs)
    assert logs["tokens_per_second"] == pytest.approx(100 / 4)
    assert logs["distinct_tokens_per_second"] == pytest.approx(40 / 4)
    evaluated = {"eval_loss": 0.5, "eval_num_tokens": 600}
    timer.on_log(ARGS, state, None, logs=evaluated)
    assert "tokens_per_second" not in evaluated


@pytest.mark.parametrize(("logged", "wanted"), [(20, [200 / 30, 50]), (19, [None, 50])])
def test_speed_after_a_resume(logged, wanted, monkeypatch):
    """At step 20 with 5000 tokens. Where the last log was earlier, the first one has tokens from before the clock."""
    timer, state, now = timer_after(0, monkeypatch)
    state.global_step, state.log_history = 20, [{"num_tokens": 4000, "step": 18}]
    state.log_history.append({"num_tokens": 5000, "step": logged})
    timer.on_train_begin(ARGS, state, None)
    for tokens, seconds, speed in zip((5200, 5300), (30.0, 2.0), wanted, strict=True):
        timer.on_step_begin(ARGS, state, None)
        now[0] += seconds
        timer.on_step_end(ARGS, state, None)
        logs = {"loss": 0.5, "num_tokens": tokens}
        timer.on_log(ARGS, state, None, logs=logs)
        assert logs.get("tokens_per_second") == (None if speed is None else pytest.approx(speed))


def line(bar, monkeypatch, width=80, **console):
    out, (timer, *_) = io.StringIO(), timer_after(3, monkeypatch)
    return ProgressLine(timer, Console(file=out, width=width, **console), bar), out


def test_lines_in_a_file(monkeypatch):
    """One a log, 5 s apart; the last step's always; each whole, however narrow."""
    progress, out = line(False, monkeypatch, width=20)
    now, state = [0.0], SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=20)
    monkeypatch.setattr("mdpo.reporting.progress.time.monotonic", lambda: now[0])
    for step in range(1, 21):
        state.global_step, now[0] = step, 2.0 * step
        progress.on_step_end(ARGS, state, None)
        progress.on_log(ARGS, state, None, logs=LOGS)
        progress.on_log(ARGS, state, None, logs={"eval_loss": 0.5})
    lines = out.getvalue().splitlines()
    assert [int(re.match(r"step (\d+)/20  ", text)[1]) for text in lines] == [1, 4, 7, 10, 13, 16, 19, 20]
    assert lines[0] == "step 1/20  loss 0.4522  accuracy 0.75  margin -1.200  2.12 pairs/s  0:57 left"


def test_evaluations_in_a_file(monkeypatch):
    progress, out = line(False, monkeypatch)
    state = SimpleNamespace(is_world_process_zero=True, global_step=4, max_steps=20)
    metrics = {"eval_loss": 0.5, "eval_rewards/accuracies": 1.0, "eval_rewards/margins": 2.0, "eval_pairs": 64}
    metrics |= {"eval_nll_loss": 0.3, "eval_aux_loss": 2.0, "eval_pairs/turn_1": 64}  # of the same dataset
    progress.on_evaluate(ARGS, state, None, metrics=metrics)
    named = {name.replace("eval_", "eval_math_"): value for name, value in metrics.items()}
    progress.on_evaluate(ARGS, state, None, metrics=named)
    state.is_world_process_zero = False
    progress.on_evaluate(ARGS, state, None, metrics=metrics)
    assert out.getvalue().splitlines() == [
        "step 4, 64 held-out pairs: loss 0.5000  accuracy 1.00  margin 2.000",
        "step 4, 64 held-out pairs of math: loss 0.5000  accuracy 1.00  margin 2.000",
    ]


def test_a_bar_on_a_terminal(monkeypatch):
    """One line that is written over, within the width; the cursor comes back."""
    progress, out = line(True, monkeypatch, force_terminal=True)
    state = SimpleNamespace(is_world_process_zero=True, global_step=4, max_steps=20)
    progress.on_train_begin(ARGS, state, None)
    progress.on_log(ARGS, state, None, logs=LOGS)
    progress.on_prediction_step(ARGS, state, None, eval_dataloader=[0] * 8)
    progress.on_step_end(ARGS, state, None)
    progress.on_train_end(ARGS, state, None)
    text = out.getvalue()
    shown = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", part).strip("\r\n") for part in re.split("\r|\n", text)]
    wanted = "4/20  loss 0.4522  accuracy 0.75  margin -1.200  2.12 pairs/s  0:48 left"
    assert any(part.endswith(wanted) for part in shown) and any("evaluating 1/8" in part for part in shown)
    assert max(map(len, shown)) <= 80
    assert text.index("\x1b[?25l") < text.rindex("\x1b[?25h")  # hidden, and shown again


class Tracker(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


@pytest.mark.parametrize("disable_tqdm", [True, False])
def test_in_the_place_of_trainers_own(disable_tqdm, tmp_path, capsys):
    tokenizer = tokenizer_for(CHATML, "byte", eos="<|im_end|>")
    trainer, tracker = mdpo_trainer(tmp_path, tokenizer, disable_tqdm=disable_tqdm), Tracker()
    timer, out = StepTimer(), io.StringIO()
    trainer.add_callback(tracker)
    trainer.add_callback(timer)
    show_progress(trainer, timer, Console(file=out))
    kinds = {type(callback) for callback in trainer.callback_handler.callbacks}
    assert not kinds & {ProgressCallback, PrinterCallback} and ProgressLine in kinds
    trainer.train()
    trainer.evaluate()
    assert "tokens_per_second" in tracker.logs[0] and "margins/turn_1" in tracker.logs[0]
    lines = out.getvalue().splitlines()
    assert re.match(r"step 1/2  loss \d\.\d{4}  accuracy \d\.\d\d  margin", lines[0])
    assert re.match(r"step 2, 8 held-out pairs: loss", lines[-1]) and len(lines) <= 3
    printed = capsys.readouterr()
    assert "'loss'" not in printed.out and "it/s" not in printed.err.replace("examples/s", "")
    assert all(log.get("peak_memory_gb", 1) > 0.1 for log in trainer.state.log_history if "loss" in log)
