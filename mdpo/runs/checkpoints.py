"""Checkpoints that become visible only when complete, and the proof of it: a manifest of sizes and digests.

output_dir/
    _saving/checkpoint-20     being written; not usable, removed at the next start
    checkpoint-10/            complete: written aside, synced to disk, then renamed
        manifest.json         {"step", "resumable", "run", "files": {name: [bytes, xxh3]}}
"""

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import xxhash
from safetensors import SafetensorError
from tqdm.auto import tqdm

from mdpo.errors import UserError
from mdpo.ranks import agreed, gathered, rank, share
from mdpo.storage import MANIFEST, as_new_files, manifest, sync

SAVING = "_saving"  # what begins with _ is not pushed to the hub
PREFIX = "checkpoint-"
BLOCK = 1 << 24  # bytes
# What torch says where a disk is full or a file cannot be written; it has no type of its own for it.
TORCH_WRITE_ERRORS = ("PytorchStreamWriter", "unexpected pos", "file write failed", "iostream", "cannot be opened")


def digest(path: Path, bar: tqdm | None = None) -> str:
    """xxh3-128 of a file's bytes."""
    hasher = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            hasher.update(block)
            if bar is not None:
                bar.update(len(block))
    return hasher.hexdigest()


def files_of(folder: Path) -> list[str]:
    """Every file below `folder` but the manifest, as a relative path, in order."""
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in paths if name != MANIFEST)


def sealed_by_all(folder: Path) -> dict[str, list]:
    """`sealed` for all files in `folder`, each rank a share. All ranks call it together."""
    # One list for all: a shared disk may show each rank a different one for a while.
    sizes = agreed(lambda: {name: (folder / name).stat().st_size for name in files_of(folder)})
    mine = sealed(folder, share(sizes))
    return {name: facts for part in gathered(mine) for name, facts in part.items()}


def sealed(folder: Path, names: list[str]) -> dict[str, list]:
    """name -> [bytes, digest] of files that are certain to be on the disk when this returns."""
    facts = {}
    for name in names:
        sync(folder / name)
        facts[name] = [(folder / name).stat().st_size, digest(folder / name)]
    return facts


def commit(staged: Path, final: Path, facts: dict) -> None:
    """Writes the manifest into `staged` and makes it visible as `final` in one step, all files with the mode of new
    ones; an older folder of that name goes aside first. A kill at any moment leaves `final` complete or absent."""
    as_new_files(staged)
    with open(staged / MANIFEST, "w", encoding="utf-8") as file:
        json.dump(facts, file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    for folder in [staged, *(path for path in staged.rglob("*") if path.is_dir())]:
        sync(folder)
    if final.exists():
        discard(final)  # `staged` keeps the folder of both
    os.rename(staged, final)
    sync(final.parent)
    _gone_when_empty(staged.parent)


def discard(folder: Path) -> None:
    """Removes a checkpoint; a kill in the middle leaves no half of it under its name."""
    aside = folder.parent / SAVING / f"removed-{folder.name}"
    aside.parent.mkdir(exist_ok=True)
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)
    _gone_when_empty(aside.parent)


def _gone_when_empty(folder: Path) -> None:
    if not any(folder.iterdir()):
        folder.rmdir()


def faults(folder: Path) -> list[str]:
    """What is wrong with a checkpoint, by file; empty where it is complete. All ranks call it together: rank 0 looks at
    the sizes, and where these are right each rank reads a share of the contents."""
    wrong = agreed(lambda: wrong_sizes(folder))
    if wrong:
        return wrong
    files = agreed(lambda: manifest(folder)["files"])
    mine = share({name: size for name, (size, _) in files.items()})
    parts = gathered(_wrong_contents(folder, {name: files[name] for name in mine}))
    return [line for part in parts for line in part]


def wrong_sizes(folder: Path) -> list[str]:
    """`faults` as far as they show without reading any file but the manifest, by this process alone."""
    try:
        files = manifest(folder)["files"]
    except ValueError as error:
        return [str(error)]
    wrong = []
    for name, (size, _) in files.items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif (actual := path.stat().st_size) != size:
            wrong.append(f"{name} has {actual} bytes of {size}")
    return wrong


def _wrong_contents(folder: Path, files: dict[str, list]) -> list[str]:
    wrong, total, first = [], sum(size for size, _ in files.values()), rank() == 0
    with tqdm(
        total=total, unit="B", unit_scale=True, desc=f"checking {folder.name}", delay=3, disable=not first
    ) as bar:
        for name, (_, expected) in files.items():
            try:
                if digest(folder / name, bar) != expected:
                    wrong.append(f"{name} has other contents than were written")
            except OSError as error:
                wrong.append(f"{name} cannot be read by rank {rank()} ({error.strerror})")
    return wrong


def by_step(output_dir: Path) -> list[Path]:
    """Checkpoint folders under their names, the newest first, complete or not."""
    folders = [path for path in Path(output_dir).glob(f"{PREFIX}*") if path.is_dir() and step_of(path) is not None]
    return sorted(folders, key=step_of, reverse=True)


def step_of(folder: Path) -> int | None:
    number = folder.name.removeprefix(PREFIX)
    return int(number) if number.isdecimal() else None


def newest_complete(output_dir: Path) -> tuple[Path | None, list[str]]:
    """(the newest complete checkpoint that a run can resume from, or None; a line for each one skipped). All ranks call
    it together."""
    lines = []
    for folder in agreed(lambda: by_step(output_dir)):
        if not (wrong := why_not_resumable(folder)):
            return folder, lines
        lines.append(f"{folder}: {'; '.join(wrong[:3])}{f'; {len(wrong) - 3} more' if len(wrong) > 3 else ''}.")
    return None, lines


def why_not_resumable(folder: Path) -> list[str]:
    """Why a run cannot resume from a checkpoint; empty where it can. All ranks call it together."""
    if wrong := faults(folder):
        return wrong
    resumable = agreed(lambda: manifest(folder)["resumable"])
    return [] if resumable else ["save_only_model left the optimizer's state out"]


def remove_older(output_dir: Path, limit: int | None, keep: str | None) -> None:
    """Keeps the newest `limit` checkpoints and the one called `keep`. What is not complete does not count towards the
    limit and is left for its owner to look at; the newest complete one always stays."""
    complete = [folder for folder in by_step(output_dir) if not wrong_sizes(folder)]
    for folder in complete[max(limit, 1) :] if limit else ():
        if keep is None or folder.name != Path(keep).name:
            discard(folder)


def move_files(source: Path, folder: Path) -> None:
    """All files of `source` into `folder`, weights last: once they are there, so is the rest."""
    names = sorted(source.iterdir(), key=lambda path: path.suffix in (".safetensors", ".bin"))
    for path in names:
        target = folder / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
    source.rmdir()
    _gone_when_empty(source.parent)


@contextmanager
def writing(target: str | Path):
    """Turns a failed write within it into a UserError about `target`."""
    try:
        yield
    except Exception as error:
        if not is_write_failure(error):
            raise
        raise UserError(
            f"{target} could not be written: {error}\nComplete checkpoints are as they were. Make room "
            "(save_total_limit says how many are kept) or fix the disk, then start the same command again: it "
            "resumes from the newest."
        ) from error


def is_write_failure(error: BaseException) -> bool:
    """Whether a save failed because of the disk: full, read-only, gone."""
    if isinstance(error, OSError | SafetensorError):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in TORCH_WRITE_ERRORS)
