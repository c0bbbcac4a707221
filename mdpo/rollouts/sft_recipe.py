"""The recipe of `trl sft` that a loop begins with. TRL itself passes over keys that it does not know."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig

from mdpo.config.parsing import nearest, read_yaml
from mdpo.errors import UserError

SET_BY_THE_LOOP = ("model_name_or_path", "model_revision", "dataset_name", "dataset_train_split", "datasets",
                   "output_dir", "max_length", "resume_from_checkpoint", "save_only_model")  # fmt: skip
OTHER_TEXT = ("chat_template_path", "eos_token")  # prompts would be others than those that preference learning has
ADAPTERS = ("use_peft", "load_in_4bit", "load_in_8bit")


def sft_values(path: Path) -> dict[str, Any]:
    """Raises UserError, with the line, for what TRL would pass over, and for what the loop could not go on with."""
    parts = (ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig)
    known = {field.name for part in parts for field in dataclasses.fields(part)} | {"env"}
    values = {}
    for setting in read_yaml(path):
        if setting.key not in known:
            near = nearest(setting.key, known)
            hint = f"; did you mean {near}?" if near else "."
            raise UserError(f"{setting.origin}: is no key of trl sft{hint}", "sft")
        if setting.key in SET_BY_THE_LOOP:
            raise UserError(f"{setting.origin}: is set by the loop.", "sft")
        if setting.key in OTHER_TEXT:
            raise UserError(f"{setting.origin}: the recipe's chat template is used in all stages.", "sft")
        if setting.key in ADAPTERS and setting.value:
            raise UserError(f"{setting.origin}: SFT has to give a whole model, which is sampled and trained on.", "sft")
        values[setting.key] = setting.value
    return values


def last_checkpoint(folder: Path) -> Path | None:
    """Of TRL's SFT: the last one with a trainer_state.json, which is written when all else is there, and a schedule:
    without, as save_only_model leaves them, training would begin anew in its middle."""
    found = [path for path in folder.glob("checkpoint-*") if _is_json(path / "trainer_state.json")]
    found = [path for path in found if (path / "scheduler.pt").is_file() or [*path.glob("global_step*")]]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _is_json(path: Path) -> bool:
    try:
        return bool(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return False
