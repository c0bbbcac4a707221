"""transformers.Trainer with checkpoints that are whole or invisible, and from which a run goes on exactly.

Beside what Trainer keeps, each rank keeps what it has gathered since the last log, and what of the step was still to be
done. Trainer forgets both: the first log after a resume would average fewer steps, and an evaluation would be missing.
"""

import shutil
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from mdpo.errors import UserError
from mdpo.ranks import agreed, wait_for_all
from mdpo.runs.checkpoints import (
    PREFIX,
    SAVING,
    faults,
    move_files,
    newest_whole,
    publish,
    remove_older,
    sealed_by_all,
    writing,
    wrong_sizes,
)
from mdpo.runs.copies import copied
from mdpo.runs.saved_weights import check_saved, load_weights
from mdpo.storage import MANIFEST, as_new_files


class CheckpointedTrainer(Trainer):
    """`run_facts` goes into each checkpoint's manifest; `mdpo.runs.run_fingerprint` compares it when a run goes on."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.run_facts: dict = {}
        self._resumed_from: str | None = None
        self._rng_loaded = False
        self._owed: dict = {}  # what the step in hand still has to do, for its checkpoint
        self._epoch_ended = False
        self._saved_step = 0  # of the newest checkpoint that this start has written or has gone on from
        self._sampler = None
        self.add_callback(_GoOn(self))

    # ------------------------------------------------------------------------------------------------ saving

    def _save_checkpoint(self, model, trial, whole: bool = False) -> None:
        """Writes a checkpoint of the step just made, by all ranks together. `whole` wants the optimizer's state despite
        save_only_model. Raises UserError where the disk fails."""
        final = Path(self.args.output_dir, f"{PREFIX}{self.state.global_step}")
        staged = final.parent / SAVING / final.name
        with writing(final):
            try:
                self._write(staged, final, whole or not self.args.save_only_model)
            except Exception:
                if self.args.should_save:  # another rank would take away what this one is reading
                    shutil.rmtree(staged, ignore_errors=True)
                raise
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            remove_older(final.parent, self.args.save_total_limit, self.state.best_model_checkpoint)
        self._saved_step = self.state.global_step
        wait_for_all()

    def _write(self, staged: Path, final: Path, resumable: bool) -> None:
        self.store_flos()
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(final)
        if self.args.should_save:
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir(parents=True)
        wait_for_all()
        self.save_model(str(staged), _internal_call=True)
        wait_for_all()  # rank 0 writes for minutes, and collectives follow
        if resumable:
            self._save_optimizer_and_scheduler(str(staged))
            self._save_scaler(str(staged))
            self._save_rng_state(str(staged))
            torch.save({**self._progress(), "owed": self._owed}, staged / self._progress_file)
        if self.args.should_save:
            self._save_state(staged)
        wait_for_all()
        if resumable:
            agreed(lambda: self._refuse_scattered(staged))
        files = sealed_by_all(staged)  # each rank a share: reading takes as long as writing
        facts = {"step": self.state.global_step, "resumable": resumable, "run": self.run_facts, "files": files}
        agreed(lambda: publish(staged, final, facts))

    def _save_state(self, folder: Path) -> None:
        kept: dict[str, list] = {}
        for part in [*self.callback_handler.callbacks, self.control]:
            if isinstance(part, ExportableState):
                kept.setdefault(type(part).__name__, []).append(part.state())
        self.state.stateful_callbacks = {
            name: states if len(states) > 1 else states[0] for name, states in kept.items()
        }
        self.state.save_to_json(str(folder / "trainer_state.json"))

    def _refuse_scattered(self, folder: Path) -> None:
        missing = [rank for rank in range(self.args.world_size) if not (folder / f"progress_{rank}.pt").is_file()]
        if missing:
            raise UserError(
                f"output_dir: what ranks {missing} have written is not in {folder.parent.parent} of rank 0. On several "
                "nodes output_dir has to be on a file system that all of them share."
            )

    @property
    def _progress_file(self) -> str:
        return f"progress_{self.args.process_index}.pt"

    def _progress(self) -> dict:
        """What this rank has gathered and not yet logged, as plain values and tensors."""
        return {
            "loss": self._tr_loss.item(),
            "total_loss": self._total_loss_scalar,
            "logged_at": self._globalstep_last_logged,
        }

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """Every checkpoint and the final model are written here: weights, tokenizer, and a look at what was written.
        The final model appears in output_dir when it is whole."""
        folder = Path(output_dir or self.args.output_dir)
        final = folder == Path(self.args.output_dir)
        written = folder / SAVING / "final" if final else folder
        if (plugin := self.args.deepspeed_plugin) is not None and plugin.zero_stage < 3:
            if self.args.should_save:  # it has all; accelerate would copy them on every rank, and a tied one twice
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

    # ------------------------------------------------------------------------------------------------ going on

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """As Trainer's; true means the newest whole checkpoint. Raises UserError for one with missing or cut files."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint, passed_over = newest_whole(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise UserError(f"{self.args.output_dir} holds no whole checkpoint. {' '.join(passed_over)}")
        path = self._resumed_from = str(resume_from_checkpoint) if resume_from_checkpoint else None
        if path and Path(path, MANIFEST).exists() and (wrong := wrong_sizes(Path(path))):
            raise UserError(f"{path} is not whole: {'; '.join(wrong)}.")
        return super().train(path, *args, **kwargs)

    def _init_training_state(self, max_steps, *args, **kwargs):
        result = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)  # else the checkpoint's intervals, whatever is asked for now
        return result

    def go_on(self) -> None:
        """Puts back what this rank had gathered, and does what the checkpoint's step still had to do."""
        if self._resumed_from is None:
            return
        file = Path(self._resumed_from, self._progress_file)
        if not file.is_file():  # of another trainer: nothing was kept
            return
        self._saved_step = self.state.global_step
        progress = torch.load(file, weights_only=True, map_location="cpu")
        self._restore(progress)
        if progress["owed"]["evaluate"] or progress["owed"]["epoch_end"]:
            self._load_rng_state(self._resumed_from)
            self._do_owed(progress["owed"])

    def _restore(self, progress: dict) -> None:
        self._tr_loss += progress["loss"]
        self._total_loss_scalar = progress["total_loss"]
        self._globalstep_last_logged = progress["logged_at"]

    def _do_owed(self, owed: dict) -> None:
        """As Trainer does at the end of a step and then of an epoch."""
        rest = (self._tr_loss, owed["grad_norm"], self.model_wrapped, None, self.state.epoch, None, None)
        if owed["evaluate"]:
            self.control.should_evaluate = True
            self._maybe_log_save_evaluate(*rest, learning_rate=owed["learning_rate"])
        if owed["epoch_end"]:
            self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
            self._maybe_log_save_evaluate(*rest, learning_rate=owed["learning_rate"])

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, *args, learning_rate=None, **kwargs):
        """Notes what a checkpoint of this step would leave to be done."""
        # Trainer comes here once for a step, and again where it was the last one of an epoch or of all.
        last = float(self.state.epoch).is_integer() or self.state.global_step >= self.state.max_steps
        self._owed = {
            "evaluate": False,
            "epoch_end": last and not self._epoch_ended,
            "grad_norm": grad_norm.item() if isinstance(grad_norm, torch.Tensor) else grad_norm,
            "learning_rate": learning_rate,
        }
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, learning_rate=learning_rate, **kwargs)

    def _load_rng_state(self, checkpoint):
        """Once: what was owed has already moved the generators on, as it would have without a stop."""
        if not (checkpoint and checkpoint == self._resumed_from and self._rng_loaded):
            super()._load_rng_state(checkpoint)
        self._rng_loaded = True

    def _run_epoch(self, **kwargs):
        if self._sampler is not None:  # accelerate's wrappers do not pass the epoch on to it in every case
            self._sampler.set_epoch(kwargs["epoch"])
        if self.state.global_step >= self.state.max_steps:  # Trainer would make one more step before it looks
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

    def _evaluate(self, trial, ignore_keys_for_eval, skip_scheduler=False):
        if skip_scheduler and self.state.global_step:  # eval_on_start: this run has started before
            return {}
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
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


class _GoOn(TrainerCallback):
    """Trainer empties its counters and then says that training begins."""

    def __init__(self, trainer: CheckpointedTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.go_on()

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer._epoch_ended = False

    def on_epoch_end(self, args, state, control, **kwargs):
        self.trainer._epoch_ended = True
