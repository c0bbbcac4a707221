"""A trainer that leaves when it is asked to and applies no step that is not finite."""

import math

import torch

from mdpo.console import say
from mdpo.errors import Preempted, UserError
from mdpo.loss.turn_metrics import joined
from mdpo.ranks import gathered
from mdpo.runs import preemption
from mdpo.runs.checkpoints import PREFIX
from mdpo.runs.resumable_trainer import CheckpointedTrainer

NAMED = 8  # rows of a step that is not finite


class EvaluationCut(Exception):
    """All ranks leave an evaluation together because one of them was asked to leave."""


class GuardedTrainer(CheckpointedTrainer):
    """With `max_nonfinite_steps` among its arguments, that many steps in a row that are not finite end the run."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # One table of pairs for each batch since the last log: row, loss, rewards, log-probs … (mdpo/loss/metrics.py)
        self._tables: dict[str, list[torch.Tensor]] = {"train": [], "eval": []}
        self._tables_before = 0  # how many of them belong to earlier steps
        self._logged_before = 0  # the step of the last log
        self._nonfinite = [0, 0]  # steps in a row, and of the whole run

    # ------------------------------------------------------------------------------------------------ leaving

    def _asked_to_leave(self) -> bool:
        """Whether any rank was: the same answer on all, which call it together."""
        asked = torch.tensor(float(bool(preemption.requested())), device=self.args.device)
        return bool(self.accelerator.reduce(asked, "sum").item())

    def train(self, *args, **kwargs):
        """Raises Preempted after the step in which a signal came, with a checkpoint of that step on the disk."""
        with preemption.held():
            try:
                result = super().train(*args, **kwargs)
            except EvaluationCut:  # of eval_on_start
                self._leave()
            if self._asked_to_leave():
                self._leave()
        return result

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        if self._epoch_ended or not self._asked_to_leave():
            try:
                return super()._maybe_log_save_evaluate(*args, **kwargs)
            except EvaluationCut:
                self._owed["evaluate"] = True
        else:
            evaluate, self.control.should_evaluate, self.control.should_save = (
                self.control.should_evaluate,
                False,
                False,
            )
            super()._maybe_log_save_evaluate(*args, **kwargs)
            self._owed["evaluate"] = evaluate
        self._leave()

    def _leave(self):
        """A checkpoint of the last step, unless there is one or nothing was trained, and out."""
        step = self.state.global_step
        if step and step != self._saved_step:
            self._save_checkpoint(self.model_wrapped, None, whole=True)
        if step:
            say(f"\npreempted at step {step}; {PREFIX}{step} is on the disk. The same command goes on from it.")
        raise Preempted(preemption.requested() or "the signal of another rank")

    def evaluate(self, *args, **kwargs):
        """Outside of training a signal ends in Preempted here; inside, the step's checkpoint comes first."""
        if self.is_in_train:
            return super().evaluate(*args, **kwargs)
        with preemption.held():
            try:
                return super().evaluate(*args, **kwargs)
            except EvaluationCut:
                self._leave()

    def refuse_when_asked_to_leave(self) -> None:
        """Before each batch of an evaluation, on all ranks together. Raises EvaluationCut."""
        if self._asked_to_leave():
            raise EvaluationCut

    # ------------------------------------------------------------------------------------------------ finite steps

    @property
    def _limit(self) -> int | None:
        return getattr(self.args, "max_nonfinite_steps", None)

    def guarded(self, loss: torch.Tensor) -> torch.Tensor:
        """A scalar loss as it is; where it is not finite its gradients are NaN too, by which all ranks notice. The
        gradient of an infinite loss may be 0."""
        return loss if self._limit is None else loss * torch.where(loss.isfinite(), 1.0, math.nan)

    def training_step(self, *args, **kwargs):
        """A loss that is not finite counts as the mean since the last log: Trainer's `logging_nan_inf_filter`, which
        asks the GPU after each micro-batch, without asking."""
        loss = super().training_step(*args, **kwargs)
        if self._limit is None:
            return loss
        mean = self._tr_loss / (1 + self.state.global_step - self._globalstep_last_logged)
        return torch.where(loss.isfinite(), loss, mean.to(loss.dtype))

    def _prepare_for_training(self, *args, **kwargs):
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.is_deepspeed_enabled and self._limit is not None:
            self.deepspeed.optimizer.check_grad_overflow = True  # by itself ZeRO-2 looks in half precision only
        return prepared

    def _get_grad_norm(self, model, grad_norm=None):
        """Trainer asks once a step. DeepSpeed has made the step by now, or left it out; else it is still to come."""
        norm = super()._get_grad_norm(model, grad_norm)
        if self._limit is not None:
            skipped = self.deepspeed.optimizer.overflow if self.is_deepspeed_enabled else not math.isfinite(norm)
            if not skipped or not self._left_out(model):
                self._nonfinite[0] = 0
            self._tables_before = len(self._tables["train"])
        return norm

    def _left_out(self, model) -> bool:
        """Names the rows of a step that is not finite, and ends the run where there were too many in a row. False where
        float16's loss scale alone was too high. All ranks call it together."""
        tables, self._tables["train"] = (
            self._tables["train"][self._tables_before :],
            self._tables["train"][: self._tables_before],
        )
        table = joined(tables).cpu()
        mine = table[:, 0].long().tolist()
        at_fault = [
            row for row, finite in zip(mine, table[:, 1:6].isfinite().all(1).tolist(), strict=True) if not finite
        ]
        parts = gathered((mine, at_fault))
        rows, at_fault = ([row for part in parts for row in part[i]] for i in (0, 1))
        if self.args.fp16 and not at_fault:
            return False
        if not self.is_deepspeed_enabled:
            model.zero_grad(set_to_none=True)  # without gradients the optimizer leaves every weight as it is
        self._nonfinite = [n + 1 for n in self._nonfinite]
        what = "the loss of" if at_fault else "a gradient, though no loss, of the step with"
        message = f"step {self.state.global_step + 1}: {what} {self._named(at_fault or rows)} is not finite"
        if self._nonfinite[0] >= self._limit:
            raise UserError(
                f"{message}, the {self._nonfinite[0]}. such step in a row (max_nonfinite_steps). None of them was "
                "applied. Look at these rows, lower learning_rate, or use bf16 or float32 in place of fp16; the same "
                f"command then goes on from the newest {PREFIX}* in {self.args.output_dir}, where there is one."
            )
        say(f"warning: {message}; it is not applied.")
        return True

    def take_tables(self) -> list[torch.Tensor]:
        """The tables of training since the last call."""
        taken, self._tables["train"], self._tables_before = self._tables["train"], [], 0
        return taken

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Where every step since the last log was left out, Trainer's loss of 0 is none."""
        if "loss" in logs and self._nonfinite[1]:
            logs["nonfinite_steps"] = self._nonfinite[1]
            if self._nonfinite[0] >= self.state.global_step - self._logged_before:
                logs["loss"] = math.nan
        self._logged_before = self.state.global_step
        super().log(logs, start_time)

    def _named(self, rows: list[int]) -> str:
        """The keys of rows, the first few of them."""
        keys = [self._key(row) for row in sorted(set(rows))]
        more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
        return f"row{'s' if len(keys) > 1 else ''} {', '.join(keys[:NAMED])}{more}"

    def _key(self, row: int) -> str:
        columns = getattr(self.train_dataset, "column_names", None) or ()
        return str(self.train_dataset[row]["key"]) if row >= 0 and "key" in columns else f"number {row}"

    def _progress(self) -> dict:
        return {**super()._progress(), "tables": self._tables["train"], "nonfinite": self._nonfinite}

    def _restore(self, progress: dict) -> None:
        super()._restore(progress)
        self._tables["train"] = [table.to(self.args.device) for table in progress["tables"]]
        self._tables_before, self._nonfinite = len(progress["tables"]), progress["nonfinite"]
