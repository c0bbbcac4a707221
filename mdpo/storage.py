"""Files that last: safely on the disk, with the mode of new ones, and a manifest that says which are complete."""

import json
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def sync(path: Path) -> None:
    """Returns when a file or a folder's list of names is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def as_new_files(folder: Path) -> None:
    """Gives `folder`, a file, or every file below it, the mode that a new file gets there, whatever decides it (umask,
    ACLs): what safetensors writes is for its owner's eyes only. Executables stay executable."""
    paths = [folder] if folder.is_file() else [path for path in folder.rglob("*") if path.is_file()]
    probe = (folder.parent if folder.is_file() else folder) / f"_mode-{uuid.uuid4().hex}"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in paths:
        with suppress(PermissionError):  # not ours, or a file system without modes
            path.chmod(mode | stat.S_IMODE(path.stat().st_mode) & 0o111)


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A draft beside `path` that takes its place when the body has ended: whoever reads meanwhile sees the whole old
    file or new one. A body that raises leaves the old one. Raises OSError."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield draft
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def replace_text(path: Path, text: str) -> None:
    """Writes a file atomically. Raises OSError."""
    with replaced(path) as draft:
        draft.write_text(text, encoding="utf-8")


def read_cache(path: Path) -> Any:
    """What `write_cache` has left there; None where nothing is, or a damaged file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_cache(path: Path, value: Any) -> None:
    """Plain JSON data, for other processes and later starts; where it cannot be written they compute it again."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(value, indent=0))


def manifest(folder: Path) -> dict:
    """Raises ValueError that says what is wrong with it."""
    try:
        facts = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"no {MANIFEST}: it was not written by this trainer, or not to its end") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{MANIFEST} cannot be read ({error})") from None
    if not (isinstance(facts, dict) and isinstance(facts.get("files"), dict)):
        raise ValueError(f"{MANIFEST} is not one of this trainer's")
    return facts
