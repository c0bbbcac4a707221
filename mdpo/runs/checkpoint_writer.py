"""A checkpoint of the step just taken, written by all ranks together: staged, sealed, then committed by a rename."""

import shutil
from pathlib import Path

from transformers.trainer_callback import ExportableState

from mdpo.errors import UserError
from mdpo.ranks import agreed, wait_for_all
from mdpo.runs import rank_state
from mdpo.runs.checkpoints import PREFIX, SAVING, commit, remove_older, sealed_by_all, writing


def write_checkpoint(trainer, resumable: bool) -> None:
    """`resumable`: with the optimizer's, the scheduler's and each rank's state. Raises UserError where the disk
    fails."""
    final = Path(trainer.args.output_dir, f"{PREFIX}{trainer.state.global_step}")
    staged = final.parent / SAVING / final.name
    with writing(final):
        try:
            _write(trainer, staged, final, resumable)
        except Exception:
            if trainer.args.should_save:  # another rank would remove what this one is reading
                shutil.rmtree(staged, ignore_errors=True)
            raise
    if trainer.args.push_to_hub:
        trainer._push_from_checkpoint(str(final))
    if trainer.args.should_save:
        remove_older(final.parent, trainer.args.save_total_limit, trainer.state.best_model_checkpoint)


def _write(trainer, staged: Path, final: Path, resumable: bool) -> None:
    args, state = trainer.args, trainer.state
    trainer.store_flos()
    if state.best_global_step == state.global_step:
        state.best_model_checkpoint = str(final)
    if args.should_save:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
    wait_for_all()
    trainer.save_model(str(staged), _internal_call=True)
    wait_for_all()  # rank 0 writes for minutes, and collectives follow
    if resumable:
        trainer._save_optimizer_and_scheduler(str(staged))
        trainer._save_scaler(str(staged))
        trainer._save_rng_state(str(staged))
        rank_state.save(staged / rank_state.file_name(args.process_index), trainer.rank_parts, trainer.pending)
    if args.should_save:
        _save_state(trainer, staged)
    wait_for_all()
    if resumable:
        agreed(lambda: _refuse_scattered(staged, args.world_size))
    files = sealed_by_all(staged)  # each rank a share: reading takes as long as writing
    facts = {"step": state.global_step, "resumable": resumable, "run": trainer.run_facts, "files": files}
    agreed(lambda: commit(staged, final, facts))


def _save_state(trainer, folder: Path) -> None:
    states: dict[str, list] = {}
    for part in [*trainer.callback_handler.callbacks, trainer.control]:
        if isinstance(part, ExportableState):
            states.setdefault(type(part).__name__, []).append(part.state())
    trainer.state.stateful_callbacks = {
        name: part_states if len(part_states) > 1 else part_states[0] for name, part_states in states.items()
    }
    trainer.state.save_to_json(str(folder / "trainer_state.json"))


def _refuse_scattered(folder: Path, world_size: int) -> None:
    missing = [rank for rank in range(world_size) if not (folder / rank_state.file_name(rank)).is_file()]
    if missing:
        raise UserError(
            f"output_dir: what ranks {missing} have written is not in {folder.parent.parent} of rank 0. On several "
            "nodes output_dir has to be on a file system that all of them share."
        )
