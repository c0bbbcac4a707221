"""What each rank saves beside the model and the optimizer, so that a resumed run logs what it would have logged.

    progress_RANK.pt    {"parts": {name: part.state_dict()}, "pending": what the checkpoint's step still had to do}

Plain values and tensors. Files of older versions, with all in one dict, are read too.
"""

from pathlib import Path
from typing import Any, Protocol

import torch

from mdpo.errors import UserError


class Part(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class LossCounters:
    """Trainer's own counters of the loss since the last log, which it forgets at a resume."""

    def __init__(self, trainer):
        self.trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        trainer = self.trainer
        return {
            "loss": trainer._tr_loss.item(),
            "total_loss": trainer._total_loss_scalar,
            "logged_at": trainer._globalstep_last_logged,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.trainer._tr_loss += state["loss"]
        self.trainer._total_loss_scalar = state["total_loss"]
        self.trainer._globalstep_last_logged = state["logged_at"]


def file_name(rank: int) -> str:
    return f"progress_{rank}.pt"


def save(file: Path, parts: dict[str, Part], pending: dict[str, Any]) -> None:
    torch.save({"parts": {name: part.state_dict() for name, part in parts.items()}, "pending": pending}, file)


def load(file: Path, parts: dict[str, Part]) -> dict[str, Any]:
    """Puts every part's state back and returns what was pending."""
    saved = torch.load(file, weights_only=True, map_location="cpu")
    if "parts" not in saved:
        saved = _of_one_dict(saved)
    if unknown := sorted(set(saved["parts"]) - set(parts)):
        raise UserError(f"resume_from_checkpoint: {file} has a state of {unknown[0]}, which this trainer lacks.")
    for name, state in saved["parts"].items():
        parts[name].load_state_dict(state)
    return saved["pending"]


def _of_one_dict(old: dict[str, Any]) -> dict[str, Any]:
    """A file of an older version in today's form."""
    parts = {"loss": {name: old[name] for name in ("loss", "total_loss", "logged_at")}}
    if "tables" in old:
        parts["tables"] = {"train": old["tables"], "tokens": old.get("tokens", 0)}
    if "nonfinite" in old:
        in_a_row, of_run = old["nonfinite"]
        parts["nonfinite"] = {"in_a_row": in_a_row, "of_run": of_run, "logged_at": old["logged_at"]}
    return {"parts": parts, "pending": old["owed"]}
