"""The output folder of a run: one run at a time, resumed where it stopped, never mixed with another one."""

import fcntl
import os
import platform
import shutil
import time
import uuid
from pathlib import Path

from mdpo.console import say
from mdpo.errors import UserError
from mdpo.ranks import agreed, gathered
from mdpo.runs.checkpoints import PREFIX, SAVING, by_step, newest_complete, step_of, why_not_resumable
from mdpo.runs.preemption import MARKER
from mdpo.runs.run_fingerprint import differences
from mdpo.storage import manifest

LEFT_BY_A_RUN = (f"{PREFIX}*", "*.safetensors", "*.safetensors.index.json", "run_report.json", "trainer_state.json")
ANSWERS = "_answers_before.json"  # of `mdpo.reporting.shown_answers`, until a new run begins
LOCK = "_lock"  # names a machine: what begins with _ is not pushed to the hub
SHARED_S = 20.0  # a network file system shows a new file elsewhere after some seconds
_locks = []  # held until the process ends, however it ends


def prepare_output_dir(args, facts: dict) -> str | None:
    """The checkpoint to resume from, or None for a new run; the folder is then locked, and free of another run's files.
    `facts` are recipe_facts. All ranks call it together. Raises UserError."""
    folder = Path(args.output_dir)
    agreed(lambda: _claim(folder))
    refuse_unshared(folder)
    checkpoint = _checkpoint(folder, args.resume_from_checkpoint, args.overwrite_output_dir)
    return agreed(lambda: _cleared(folder, checkpoint, args.overwrite_output_dir, facts))


def _claim(folder: Path) -> None:
    """Makes and locks the folder, and removes unfinished checkpoints."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir: {folder} cannot be made: {error.strerror}.") from error
    try:
        _lock(folder)
        (folder / MARKER).unlink(missing_ok=True)
        shutil.rmtree(folder / SAVING, ignore_errors=True)
    except OSError as error:
        raise UserError(f"output_dir: {folder} cannot be written to: {error.strerror}.") from error


def refuse_unshared(folder: Path) -> None:
    """Raises UserError on all ranks where one of them does not see what rank 0 writes into `folder`."""
    token = agreed(lambda: _token(folder))
    end = time.monotonic() + SHARED_S
    while not (seen := _listed(folder / token)) and time.monotonic() < end:
        time.sleep(0.25)
    answers = gathered((seen, platform.node()))
    agreed(lambda: (folder / token).unlink(missing_ok=True))
    blind = [f"{rank} ({node})" for rank, (seen, node) in enumerate(answers) if not seen]
    if blind:
        raise UserError(
            f"output_dir: {folder} of rank 0 ({answers[0][1]}) is not the folder that rank {', '.join(blind[:8])} sees"
            f"{f', and {len(blind) - 8} more' if len(blind) > 8 else ''}. On several nodes output_dir has to be on a "
            "file system that all of them share."
        )


def _token(folder: Path) -> str:
    name = f"_shared-{uuid.uuid4().hex}"
    try:
        (folder / name).touch()
    except OSError as error:
        raise UserError(f"output_dir: {folder} cannot be written to: {error.strerror}.") from error
    return name


def _listed(path: Path) -> bool:
    """Whether a file is there; listing its folders makes a network file system look again."""
    try:
        os.listdir(path.parent.parent)
        return path.name in os.listdir(path.parent)
    except OSError:
        return False


def _cleared(folder: Path, checkpoint: Path | None, overwrite: bool, facts: dict) -> str | None:
    """As prepare_output_dir returns it; another run's files are removed, or refused."""
    if checkpoint is not None:
        refuse_another_run(checkpoint, facts)
        say(f"resuming from {checkpoint}")
        if checkpoint.parent.resolve() == folder.resolve():
            return str(checkpoint)
    (folder / ANSWERS).unlink(missing_ok=True)  # of another run
    leftovers = [path for pattern in LEFT_BY_A_RUN for path in sorted(folder.glob(pattern))]
    if leftovers and not overwrite:
        raise UserError(
            f"output_dir: {folder} already holds a run ({leftovers[0].name}). Write over it "
            "(--overwrite_output_dir), or choose another output_dir."
        )
    for path in leftovers:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if leftovers:
        say(f"overwrite_output_dir: removed {len(leftovers)} files and folders of an earlier run from {folder}.")
    return None if checkpoint is None else str(checkpoint)


def _lock(folder: Path) -> None:
    """A record lock: the kernel releases it when this process ends, and forked workers do not keep it."""
    file = open(folder / LOCK, "a+", encoding="utf-8")  # noqa: SIM115
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise UserError(
            f"output_dir: {folder} is in use by another run ({file.read().strip() or 'it has not said which'}). Wait "
            "for it, stop it, or choose another output_dir."
        ) from None
    except OSError as error:
        say(f"warning: {folder} cannot be locked ({error.strerror}); nothing keeps a second run out of it.")
        return
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    _locks.append(file)


def _checkpoint(folder: Path, requested: str | bool | None, overwrite: bool) -> Path | None:
    """All ranks call it together: they share the reading."""
    if requested is False:
        return None
    if isinstance(requested, str):
        return _named(Path(requested), folder)
    if overwrite:
        if requested:
            raise UserError("resume_from_checkpoint: true resumes, overwrite_output_dir starts anew. Choose one.")
        return None
    checkpoint, skipped = newest_complete(folder)
    say(*(f"skipped {line}" for line in skipped))
    if checkpoint is None and skipped:
        raise UserError(
            f"output_dir: {folder} holds checkpoints, but none to resume from:\n"
            + "\n".join(skipped)
            + "\nStart anew with --overwrite_output_dir, or choose another output_dir."
        )
    if checkpoint is None and requested:
        raise UserError(f"resume_from_checkpoint: {folder} holds no checkpoint. Leave it out to start a new run.")
    return checkpoint


def _named(checkpoint: Path, folder: Path) -> Path:
    if not agreed(checkpoint.is_dir):
        raise UserError(
            f"resume_from_checkpoint: {checkpoint} is not a folder. Name a checkpoint's; true is the newest one."
        )
    if step_of(checkpoint) is None and (inside := agreed(lambda: by_step(checkpoint))):
        raise UserError(f"resume_from_checkpoint: {checkpoint} holds checkpoints. Name one of them, as {inside[0]}.")
    if wrong := why_not_resumable(checkpoint):
        raise UserError(f"resume_from_checkpoint: {checkpoint} cannot be resumed from: {'; '.join(wrong[:8])}.")
    step = step_of(checkpoint)
    newer = [path.name for path in agreed(lambda: by_step(folder)) if step is not None and step_of(path) > step]
    if newer and checkpoint.parent.resolve() == folder.resolve():
        raise UserError(
            f"resume_from_checkpoint: {folder} holds newer checkpoints than {checkpoint.name} ({', '.join(newer)}). "
            "Move them away, or give the run another output_dir."
        )
    return checkpoint


def refuse_another_run(checkpoint: str | Path, facts: dict) -> None:
    """Raises UserError, a line for each difference, where the checkpoint is of another run than `facts`."""
    then = manifest(Path(checkpoint))["run"]
    if not then:
        say(f"warning: {checkpoint} does not say what run it is of; nothing was compared.")
        return
    refused, rounding = differences(then, facts)
    if refused:
        raise UserError(
            f"{checkpoint} is of another run:\n  "
            + "\n  ".join(refused)
            + "\nResume with the recipe that it was made with, or start a new run: --overwrite_output_dir, or another "
            "output_dir."
        )
    say(*(f"warning: the resumed run may round differently: {line}" for line in rounding))
