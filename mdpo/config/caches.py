"""Whether a run can write to its folders outside output_dir, each named by what a user sets to move it."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import torch
from huggingface_hub import constants
from transformers.utils.hub import HF_MODULES_CACHE

from mdpo.errors import UserError
from mdpo.ranks import gathered

DATA = "HF_DATASETS_CACHE (or HF_HOME)"
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)


def default_folder() -> Path:
    """Where reference log-probs are cached unless a recipe says otherwise: beside the models that they come from."""
    return Path(constants.HF_HOME, "mdpo-reference")


def refuse_unwritable(args=None) -> None:
    """Raises UserError, on all ranks, for the first folder that this rank or another cannot write to. `args`: of a
    training run; with None only what reading data needs is checked. All ranks call it together."""
    lines = [line for line in gathered(next(_troubles(args), None)) if line]
    if lines:
        raise UserError(lines[0])


def _troubles(args) -> Iterator[str]:
    for folder, key, contents in _folders(args):
        if why := unwritable(folder):
            yield f"{key}: {folder}, which holds {contents}, cannot be written to: {why}. Set {key} to one that can."


def _folders(args) -> Iterator[tuple[Path, str, str]]:
    """(folder, what moves it, its contents) of all that are needed."""
    yield Path(datasets.config.HF_DATASETS_CACHE), DATA, "tokenized rows"
    if args is None:
        return
    if args.precompute_ref_log_probs:
        folder = Path(args.reference_cache_dir or default_folder())
        yield folder, "reference_cache_dir", "the reference's log-probs"
    if args.trust_remote_code:
        yield Path(HF_MODULES_CACHE), "HF_MODULES_CACHE (or HF_HOME)", "a model's own code"
    if "trackio" in (args.report_to or []):
        yield Path(os.environ.get("TRACKIO_DIR") or Path(constants.HF_HOME, "trackio")), "TRACKIO_DIR", "trackio's runs"
    if "tensorboard" in (args.report_to or []) and (place := os.environ.get("TENSORBOARD_LOGGING_DIR")):
        yield Path(place), "TENSORBOARD_LOGGING_DIR", "TensorBoard's runs"
    if args.deepspeed_plugin is not None:
        yield _extensions(), "TORCH_EXTENSIONS_DIR", "operators that DeepSpeed compiles"
    if torch.cuda.is_available():  # elsewhere Triton compiles nothing
        place = Path(os.environ.get("TRITON_HOME") or Path.home(), ".triton", "cache")
        yield Path(os.environ.get("TRITON_CACHE_DIR") or place), "TRITON_CACHE_DIR", "compiled kernels"


def _extensions() -> Path:
    from torch.utils.cpp_extension import get_default_build_root

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


@contextmanager
def keeping_rows():
    """Turns an error of the disk with `datasets`' own files into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno not in OF_THE_DISK:
            raise
        folder = datasets.config.HF_DATASETS_CACHE
        raise UserError(
            f"{DATA}: tokenized rows cannot be written into {folder}: {error.strerror}. Set HF_DATASETS_CACHE to a "
            "folder with room."
        ) from error


def unwritable(folder: Path) -> str | None:
    """Why nothing can be written into a folder, which is created where it is missing; None where it can be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
            file.flush()
    except OSError as error:
        return error.strerror or str(error)
    return None
