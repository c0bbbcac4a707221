"""Progress of a run: time, speed and memory of its steps, and one line on the terminal."""

import atexit
import resource
import sys
import time

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from mdpo.ranks import row_ranks

BETWEEN_LINES_S = 5  # between lines of text, in a file or a pipe
COUNTS = {"num_tokens": "tokens_per_second", "num_distinct_tokens": "distinct_tokens_per_second"}  # log -> its speed
TEXT_WIDTH = 74  # characters of the line beside the bar
SHOWN = (("loss", "loss", ".4f"), ("accuracy", "rewards/accuracies", ".2f"), ("margin", "rewards/margins", ".3f"))


def peak_memory_gb(device) -> float:
    """Highest memory of this process so far, in GB (1e9 bytes): the GPU's where there is one, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _counts(logs: dict) -> dict[str, int]:
    return {name: logs[name] for name in COUNTS if name in logs}


class StepTimer(TrainerCallback):
    """Seconds from the beginning to the end of each optimizer step: training alone, no evaluation, no saving. Adds
    tokens_per_second and distinct_tokens_per_second (of all processes, since the last log) and peak_memory_gb (of this
    one) to training's logs."""

    def __init__(self):
        self.seconds, self.steps, self._began = 0.0, 0, None
        self._first_end = self._first_seconds = 0.0
        # Seconds and COUNTS up to the last log; None where the seconds of the tokens are not known.
        self._logged: tuple[float, dict[str, int]] | None = (0.0, dict.fromkeys(COUNTS, 0))

    def on_train_begin(self, args, state, control, **kwargs):
        """After a resume num_tokens continues from the checkpoint, and the seconds start from 0."""
        if state.global_step:
            logged = [log for log in state.log_history if "num_tokens" in log and log["step"] == state.global_step]
            self._logged = (self.seconds, _counts(logged[-1])) if logged else None

    def on_step_begin(self, args, state, control, **kwargs):
        self._began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        self.seconds, self.steps = self.seconds + now - self._began, self.steps + 1
        if self.steps == 1:
            self._first_end, self._first_seconds = now, self.seconds

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not {"loss", "num_tokens"} <= set(logs or {}):
            return
        metrics = {"peak_memory_gb": peak_memory_gb(args.device)}
        if self._logged and self.seconds > self._logged[0]:
            seconds, earlier = self._logged
            for name, count in _counts(logs).items():
                if name in earlier:
                    metrics[COUNTS[name]] = (count - earlier[name]) / (self.seconds - seconds)
        self._logged = (self.seconds, _counts(logs))
        logs.update(metrics)  # what trackers are given
        state.log_history[-1].update(metrics)

    def remaining_seconds(self, state) -> float | None:
        """Until the last step, with evaluations and checkpoints as frequent as so far; None before the first step.
        The first step, which compiles and warms up, counts only while there is no other."""
        if not self.steps:
            return None
        each = self._first_seconds
        if self.steps > 1:
            each = (time.perf_counter() - self._first_end) / (self.steps - 1)
        return each * (state.max_steps - state.global_step)

    def figures(self, args) -> dict[str, float]:
        """Pairs of all processes; the last step of an epoch may have had fewer pairs than it is counted with."""
        of_step = args.train_batch_size * args.gradient_accumulation_steps * (args.world_size // row_ranks())
        pairs = self.steps * of_step
        return {
            "steps": self.steps,
            "train_seconds": self.seconds,
            "pairs_per_second": pairs / self.seconds if self.seconds else 0.0,
        }


def clock(seconds: float) -> str:
    """75 -> 1:15, 3675 -> 1:01:15."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def figures_line(logs: dict[str, float], prefix: str = "") -> str:
    return "  ".join(f"{name} {logs[prefix + key]:{form}}" for name, key, form in SHOWN if prefix + key in logs)


class ProgressLine(TrainerCallback):
    """The main process's progress: a bar on a terminal, else lines of text, one a log, BETWEEN_LINES_S apart."""

    def __init__(self, timer: StepTimer, console: Console, bar: bool):
        self.timer, self.console, self.with_bar = timer, console, bar
        self._bar, self._figures, self._last, self._training, self._evaluated = None, "", -BETWEEN_LINES_S, False, 0

    def on_train_begin(self, args, state, control, **kwargs):
        self._training = True

    def on_step_end(self, args, state, control, **kwargs):
        if self.with_bar:
            self._move(state.global_step, state.max_steps, self.line(args, state))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        self._figures = figures_line(logs)
        if self.with_bar:
            self._move(state.global_step, state.max_steps, self.line(args, state))
        elif time.monotonic() - self._last >= BETWEEN_LINES_S or state.global_step == state.max_steps:
            self._last = time.monotonic()
            self._say(f"step {self.line(args, state)}")

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        self._evaluated += 1
        if self.with_bar and hasattr(eval_dataloader, "__len__"):
            self._move(self._evaluated, len(eval_dataloader), f"evaluating {self._evaluated}/{len(eval_dataloader)}")

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self._evaluated = 0
        if not self._training:
            self.close()
        if not state.is_world_process_zero:
            return
        for key in (key for key in metrics or {} if key.endswith("_pairs")):  # one a dataset; nll_loss is none
            name = key.removesuffix("_pairs")
            which = "" if name == "eval" else f" of {name.removeprefix('eval_')}"
            self._say(
                f"step {state.global_step}, {metrics[key]:.0f} held-out pairs{which}: "
                f"{figures_line(metrics, f'{name}_')}"
            )

    def on_train_end(self, args, state, control, **kwargs):
        self._training = False
        self.close()

    def line(self, args, state) -> str:
        speed, left = self.timer.figures(args)["pairs_per_second"], self.timer.remaining_seconds(state)
        parts = [f"{state.global_step}/{state.max_steps}", self._figures, f"{speed:.2f} pairs/s"]
        return "  ".join(part for part in [*parts, "" if left is None else f"{clock(left)} left"] if part)

    def _say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, markup=False, highlight=False)

    def _move(self, done: int, total: int, text: str) -> None:
        if self._bar is None:
            width = max(4, min(30, self.console.width - TEXT_WIDTH))
            columns = BarColumn(bar_width=width), TextColumn("{task.description}", markup=False)
            self._bar = Progress(*columns, console=self.console, auto_refresh=False, transient=not self._training)
            self._bar.add_task("", total=total)
            atexit.register(self._bar.stop)  # an error would leave the cursor hidden
            self._bar.start()
        [task] = self._bar.task_ids
        self._bar.update(task, completed=done, total=total, description=text, refresh=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            atexit.unregister(self._bar.stop)
            self._bar = None


def show_progress(trainer, timer: StepTimer, console: Console | None = None) -> None:
    """Puts the timer before the trackers, so that they log what it adds, and our line in place of Trainer's own bar and
    printed dicts. `disable_tqdm` asks for lines of text on a terminal too."""
    for default in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(default)
    callbacks = trainer.callback_handler.callbacks
    callbacks.remove(timer)
    callbacks.insert(0, timer)
    console = console or Console(file=sys.stdout)
    main = trainer.is_world_process_zero()
    trainer.add_callback(ProgressLine(timer, console, main and console.is_terminal and not trainer.args.disable_tqdm))
