"""transformers.Trainer whose run can stop and be resumed exactly: at a checkpoint, a crash, or a preemption.

Beside what Trainer saves, each rank saves what it has gathered since the last log, and what was pending of the step.
Trainer forgets both: the first log after a resume would average fewer steps, and an evaluation would be missing.
"""

from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback

from mdpo.console import say
from mdpo.data.sampler import by_rows
from mdpo.errors import Preempted, UserError
from mdpo.ranks import row_ranks, wait_for_all
from mdpo.runs import preemption, rank_state
from mdpo.runs.checkpoint_writer import write_checkpoint
from mdpo.runs.checkpoints import PREFIX, SAVING, faults, move_files, newest_complete, wrong_sizes
from mdpo.runs.copies import copied
from mdpo.runs.saved_weights import check_saved, load_weights
from mdpo.storage import MANIFEST, as_new_files


class EvaluationInterrupted(Exception):
    """All ranks stop an evaluation together because one of them was preempted."""


class ResumableTrainer(Trainer):
    """`run_facts` goes into each checkpoint's manifest; `mdpo.runs.run_fingerprint` compares it at a resume.
    `rank_parts` are the objects whose state each rank saves; a subclass adds its own."""

    def __init__(self, *args, **kwargs):
        if row_ranks() > 1 and kwargs.get("compute_metrics") is not None:
            raise UserError("compute_metrics: does not go with sequence parallel, whose ranks have the same pairs.")
        super().__init__(*args, **kwargs)
        self.run_facts: dict = {}
        self.rank_parts: dict[str, rank_state.Part] = {"loss": rank_state.LossCounters(self)}
        self.pending: dict = {}  # what the step in hand still has to do, for its checkpoint
        self._resumed_from: str | None = None
        self._rng_loaded = False
        self._epoch_ended = False
        self._saved_step = 0  # of the newest checkpoint that this start has written or was resumed from
        self.add_callback(_Resume(self))

    # ------------------------------------------------------------------------------------------------ sequence parallel

    def _get_dataloader(self, *args, **kwargs):
        with by_rows(self.accelerator):
            return super()._get_dataloader(*args, **kwargs)

    def get_total_train_batch_size(self, args) -> int:
        return super().get_total_train_batch_size(args) // row_ranks()

    def floating_point_ops(self, inputs) -> int:
        return super().floating_point_ops(inputs) // row_ranks()  # Trainer adds up those of all ranks

    # ------------------------------------------------------------------------------------------------ preemption

    def _preempted(self) -> bool:
        """Whether any rank was asked to stop: the same answer on all, which call it together."""
        request = torch.tensor(float(bool(preemption.requested())), device=self.args.device)
        return bool(self.accelerator.reduce(request, "sum").item())

    def _stop(self):
        """A checkpoint of the last step, unless there is one or nothing was trained, then Preempted."""
        step = self.state.global_step
        if step and step != self._saved_step:
            self._save_checkpoint(self.model_wrapped, None, resumable=True)
        if step:
            clears = getattr(self.args, "overwrite_output_dir", False)
            how = "overwrite_output_dir would remove it: with --overwrite_output_dir=false the" if clears else "The"
            say(f"\npreempted at step {step}; {PREFIX}{step} is on the disk. {how} same command resumes from it.")
        raise Preempted(preemption.requested() or "the signal of another rank")

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """As Trainer's; true means the newest complete checkpoint. Raises UserError for one with missing or cut files,
        and Preempted after the step in which a signal came, with a checkpoint of that step on the disk."""
        with preemption.defer_signals():
            path = self._resumed_from = self._checkpoint_to_resume(resume_from_checkpoint)
            try:
                result = super().train(path, *args, **kwargs)
            except EvaluationInterrupted:  # of eval_on_start
                self._stop()
            if self._preempted():
                self._stop()
        return result

    def evaluate(self, *args, **kwargs):
        """Outside of training a signal ends in Preempted here; inside, the step's checkpoint comes first."""
        if self.is_in_train:
            return super().evaluate(*args, **kwargs)
        with preemption.defer_signals():
            try:
                return super().evaluate(*args, **kwargs)
            except EvaluationInterrupted:
                self._stop()

    def interrupt_if_preempted(self) -> None:
        """Before each batch of an evaluation, on all ranks together. Raises EvaluationInterrupted."""
        if self._preempted():
            raise EvaluationInterrupted

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, *args, learning_rate=None, **kwargs):
        """Notes what is pending in a checkpoint of this step; a preempted run stops after it."""
        # Trainer calls this once for a step, and again where it was the last one of an epoch or of all.
        last = float(self.state.epoch).is_integer() or self.state.global_step >= self.state.max_steps
        self.pending = {
            "evaluate": False,
            "epoch_end": last and not self._epoch_ended,
            "grad_norm": grad_norm.item() if isinstance(grad_norm, torch.Tensor) else grad_norm,
            "learning_rate": learning_rate,
        }
        stop, evaluate = not self._epoch_ended and self._preempted(), self.control.should_evaluate
        if stop:
            self.control.should_evaluate = self.control.should_save = False
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, learning_rate=learning_rate, **kwargs)
        except EvaluationInterrupted:
            stop = evaluate = True
        if stop:
            self.pending["evaluate"] = evaluate
            self._stop()

    # ------------------------------------------------------------------------------------------------ saving

    def _save_checkpoint(self, model, trial, resumable: bool = False) -> None:
        """By all ranks together. `resumable` wants the optimizer's state despite save_only_model. Raises UserError
        where the disk fails."""
        write_checkpoint(self, resumable or not self.args.save_only_model)
        self._saved_step = self.state.global_step
        wait_for_all()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """Every checkpoint and the final model are written here: weights, tokenizer, and a check of what was written.
        The final model appears in output_dir when it is complete."""
        folder = Path(output_dir or self.args.output_dir)
        final = folder == Path(self.args.output_dir)
        written = folder / SAVING / "final" if final else folder
        if (plugin := self.args.deepspeed_plugin) is not None and plugin.zero_stage < 3:
            if self.args.should_save:  # it has all weights; accelerate would copy them on every rank, tied ones twice
                self._save(str(written), state_dict=copied(self.model))
        else:
            super().save_model(str(written), _internal_call=True)
        if self.args.should_save:
            check_saved(written, self.accelerator.unwrap_model(self.model))
            as_new_files(written)
            if final:
                move_files(written, folder)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    # ------------------------------------------------------------------------------------------------ resuming

    def _checkpoint_to_resume(self, requested) -> str | None:
        if requested is True:
            requested, skipped = newest_complete(self.args.output_dir)
            if requested is None:
                message = f"{self.args.output_dir} has no complete checkpoint. {' '.join(skipped)}"
                raise UserError(message, "resume_from_checkpoint")
        path = str(requested) if requested else None
        if path and Path(path, MANIFEST).exists() and (wrong := wrong_sizes(Path(path))):
            raise UserError(f"{path} is not complete: {'; '.join(wrong)}.", "resume_from_checkpoint")
        return path

    def _init_training_state(self, max_steps, *args, **kwargs):
        result = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)  # else the checkpoint's intervals, not the recipe's
        return result

    def resume_rank_state(self) -> None:
        """Puts back what this rank had gathered, and does what was pending in the checkpoint's step."""
        if self._resumed_from is None:
            return
        file = Path(self._resumed_from, rank_state.file_name(self.args.process_index))
        if not file.is_file():  # of another trainer: nothing was saved
            return
        self._saved_step = self.state.global_step
        pending = rank_state.load(file, self.rank_parts)
        if pending["evaluate"] or pending["epoch_end"]:
            self._load_rng_state(self._resumed_from)
            self._run_pending(pending)

    def _run_pending(self, pending: dict) -> None:
        """As Trainer does at the end of a step and then of an epoch."""
        step_args = (self._tr_loss, pending["grad_norm"], self.model_wrapped, None, self.state.epoch, None, None)
        if pending["evaluate"]:
            self.control.should_evaluate = True
            self._maybe_log_save_evaluate(*step_args, learning_rate=pending["learning_rate"])
        if pending["epoch_end"]:
            self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
            self._maybe_log_save_evaluate(*step_args, learning_rate=pending["learning_rate"])

    def _load_rng_state(self, checkpoint):
        """Only once: what was pending has already advanced the generators, as it would have without a stop."""
        if not (checkpoint and checkpoint == self._resumed_from and self._rng_loaded):
            super()._load_rng_state(checkpoint)
        self._rng_loaded = True

    def begin_epoch(self, epoch: int) -> None:
        """For a sampler's set_epoch: accelerate's wrappers do not pass the epoch on to it in every case."""

    def _run_epoch(self, **kwargs):
        self.begin_epoch(kwargs["epoch"])
        if self.state.global_step >= self.state.max_steps:  # Trainer would make one more step before it looks
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

    def _evaluate(self, trial, ignore_keys_for_eval, skip_scheduler=False):
        if skip_scheduler and self.state.global_step:  # eval_on_start: this run has started before
            return {}
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        for name in (name for name in logs if name.endswith("_steps_per_second") and not name.startswith("train")):
            logs[name] *= row_ranks()  # Trainer counts the steps that ranks of their own would have made
        if "train_loss" in logs:  # Trainer divides by the steps since this start
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, start_time)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.is_deepspeed_enabled or not load_weights(resume_from_checkpoint, self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self):
        folder = Path(self.state.best_model_checkpoint)
        if wrong := faults(folder):
            raise UserError(f"load_best_model_at_end: {folder}: {'; '.join(wrong)}.")
        if self.is_deepspeed_enabled or not load_weights(folder, self.model):
            super()._load_best_model()


class _Resume(TrainerCallback):
    """Restores the state at on_train_begin, after Trainer has emptied its counters."""

    def __init__(self, trainer: ResumableTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.resume_rank_state()

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer._epoch_ended = False

    def on_epoch_end(self, args, state, control, **kwargs):
        self.trainer._epoch_ended = True
