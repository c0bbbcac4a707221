"""Non-finite steps (NaN or Inf in a loss or gradient): skipped, their rows named, and the run ended after too many in
a row."""

import math

import torch

from mdpo.console import say
from mdpo.errors import UserError
from mdpo.loss.pair_tables import PairTables, rows_at_fault, rows_of
from mdpo.ranks import gathered
from mdpo.runs.checkpoints import PREFIX

NAMED = 8  # rows of a non-finite step that are named


class NonfiniteGuard:
    """Skips non-finite steps, and ends a run at `args.max_nonfinite_steps` of them in a row; None switches it off.
    `tables` contain the pairs of the step in hand. The trainer calls it where each method says."""

    def __init__(self, args, tables: PairTables):
        self.args, self.tables = args, tables
        self.in_a_row = self.of_run = 0  # non-finite steps
        self._logged_at = 0  # the step of the last log

    @property
    def on(self) -> bool:
        return self.args.max_nonfinite_steps is not None

    def loss(self, loss: torch.Tensor) -> torch.Tensor:
        """A micro-batch's scalar loss as it is; where it is non-finite its gradients are NaN too, by which all ranks
        notice it. The gradient of an infinite loss may be 0."""
        return loss * torch.where(loss.isfinite(), 1.0, math.nan) if self.on else loss

    def logged_loss(self, loss: torch.Tensor, total: torch.Tensor, steps: int) -> torch.Tensor:
        """What is added to the running `total` of `steps` steps: a non-finite loss counts as their mean. This is
        Trainer's `logging_nan_inf_filter` without its wait for the GPU after each micro-batch."""
        return torch.where(loss.isfinite(), loss, (total / (1 + steps)).to(loss.dtype)) if self.on else loss

    def watch(self, engine) -> None:
        """Before training: by itself DeepSpeed's ZeRO-2 checks half precision only."""
        if self.on:
            engine.optimizer.check_grad_overflow = True

    def end_of_backward(self, model, norm, engine, step: int, dataset) -> None:
        """After the gradients of step number `step` are there. DeepSpeed's `engine` has made the step by now, or
        skipped it; without one it is still to come. All ranks call it together. Raises UserError where the run has to
        end."""
        if not self.on:
            return
        skipped = engine.optimizer.overflow if engine is not None else not math.isfinite(norm)
        if not skipped or not self._skip(model, engine, step, dataset):
            self.in_a_row = 0
        self.tables.end_step()

    def _skip(self, model, engine, step: int, dataset) -> bool:
        """Names the rows of a non-finite step. False where float16's loss scale alone was too high."""
        table = self.tables.drop_step()
        parts = gathered((rows_of(table), rows_at_fault(table)))
        rows, at_fault = ([row for part in parts for row in part[i]] for i in (0, 1))
        if self.args.fp16 and not at_fault:
            return False
        if engine is None:
            model.zero_grad(set_to_none=True)  # without gradients the optimizer leaves every weight as it is
        self.in_a_row += 1
        self.of_run += 1
        subject = "the loss of" if at_fault else "a gradient, though no loss, of the step with"
        message = f"step {step}: {subject} {_named(at_fault or rows, dataset)} is not finite"
        if self.in_a_row >= self.args.max_nonfinite_steps:
            raise UserError(
                f"{message}, which makes {self.in_a_row} in a row (max_nonfinite_steps). All of them were "
                "skipped. Look at these rows, lower learning_rate, or use bf16 or float32 in place of fp16; the same "
                f"command then resumes from the newest {PREFIX}* in {self.args.output_dir}, where there is one."
            )
        say(f"warning: {message}; the step is skipped.")
        return True

    def amend(self, logs: dict[str, float], step: int) -> None:
        """A log of training at `step`: adds the number of non-finite steps; where every step since the last log was
        skipped, the loss is NaN in place of Trainer's 0."""
        if "loss" in logs and self.of_run:
            logs["nonfinite_steps"] = self.of_run
            if self.in_a_row >= step - self._logged_at:
                logs["loss"] = math.nan
        self._logged_at = step

    def state_dict(self) -> dict:
        return {"in_a_row": self.in_a_row, "of_run": self.of_run, "logged_at": self._logged_at}

    def load_state_dict(self, state: dict) -> None:
        self.in_a_row, self.of_run = state["in_a_row"], state["of_run"]
        self._logged_at = state.get("logged_at", 0)


def _named(rows: list[int], dataset) -> str:
    """The keys of rows, the first few of them."""
    keys = [_key(row, dataset) for row in sorted(set(rows))]
    more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
    return f"row{'s' if len(keys) > 1 else ''} {', '.join(keys[:NAMED])}{more}"


def _key(row: int, dataset) -> str:
    columns = getattr(dataset, "column_names", None) or ()
    return str(dataset[row]["key"]) if row >= 0 and "key" in columns else f"number {row}"
