"""Whether what a recipe names as a model is one: an adapter's folder or hub name, or a folder without weights, is not.

transformers loads an adapter as its base with the adapter's layers put in. Where PEFT puts a new adapter on that, the
first one has no effect: policy and reference begin as the bare base.
"""

import json
import shlex
from pathlib import Path
from typing import Any

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftModel, PromptLearningConfig
from transformers.utils.peft_utils import find_adapter_config_file

from mdpo.console import first_line
from mdpo.errors import UserError
from mdpo.masking.tokenizer import refuse_missing_folder

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*", "*.gguf")
ADAPTER = "adapter_config.json"
SHOWN = 5  # names of files in a message


def refuse_unloadable(model, args) -> None:
    """Checks what a recipe names as policy and reference before anything is loaded. `model` is trl.ModelConfig,
    `args` the training arguments. Raises UserError."""
    kwargs = args.model_init_kwargs or {}
    names = {"model_name_or_path": (model.model_name_or_path, model.model_revision)}
    names["ref_model_name_or_path"] = (args.ref_model_name_or_path, None)
    for key, (name, revision) in names.items():
        if name and "gguf_file" in kwargs:
            refuse_missing_folder(key, name)
        elif name:
            refuse_no_model(key, name, revision, kwargs.get("subfolder", ""))


def refuse_no_model(key: str, name: str, revision: str | None = None, subfolder: str = "") -> None:
    """Raises UserError where `name`, a folder or a name on the hub, is no model as far as can be told. `key` is where
    the user wrote it."""
    refuse_missing_folder(key, name)
    refuse_adapter(name, key, revision, subfolder)
    refuse_without_weights(name, key, subfolder)


def refuse_adapter(name: str, key: str = "model", revision: str | None = None, subfolder: str = "") -> None:
    """Raises UserError, with the command that makes a model of it, where `name`, a folder or a name on the hub, is an
    adapter. `key` is where the user wrote it."""
    name = str(Path(name).expanduser()) if name.startswith("~") else name
    try:
        adapter_file = find_adapter_config_file(name, revision=revision, subfolder=subfolder)
    except (OSError, ValueError) as error:  # no name that the hub could have
        raise UserError(f"{key}: {name!r} cannot be loaded: {first_line(error)}") from error
    if adapter_file is None:
        return
    try:
        settings = dict(json.loads(Path(adapter_file).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{key}: {adapter_file} cannot be read: {error}") from error
    kind = PEFT_TYPE_TO_CONFIG_MAPPING.get(settings.get("peft_type"))
    message = f"{key}: {name} is an adapter ({settings.get('peft_type')}), not a model"
    if kind is not None and issubclass(kind, PromptLearningConfig):
        raise UserError(f"{message}, and cannot be merged into one. Name the model that it was trained on.")
    folder = Path(adapter_file).parent if Path(name).is_dir() else None
    if folder and _weights(folder):
        raise UserError(
            f"{key}: {name} contains both a model and an adapter (adapter_config.json), and the adapter would go on "
            "top of the model. Give each a folder of its own, and name the model's."
        )
    raise UserError(f"{message}. {_merging(name, folder, settings, key)}")


def _merging(name: str, folder: Path | None, settings: dict[str, Any], key: str) -> str:
    """The commands that make a model of an adapter; `folder` is None for one on the hub."""
    local = str(folder) if folder else name.split("/")[-1]
    command = ["python", "scripts/merge_adapter.py", local, f"{local.rstrip('/')}-merged"]
    base, hint = settings.get("base_model_name_or_path"), ""
    base = base if isinstance(base, str) else None
    if _gone(base):
        command.append("--base=BASE_MODEL")
        hint = f"\nIts base, {base}, is not there:" if base else "\nIt names no base:"
        hint += " put the folder or hub name of the model that it was trained on in place of BASE_MODEL."
    elif Path(base, ADAPTER).is_file():
        hint = f"\nIts base, {base}, is an adapter too: merge that one first."
    download = "" if folder else f"    hf download {shlex.quote(name)} --local-dir {shlex.quote(local)}\n"
    return (
        "Merge it into its base first; policy and reference then both begin from what it has learned:\n"
        f"{download}    {shlex.join(command)}\nand set {key}: {command[3]}{hint}"
    )


def _gone(base: str | None) -> bool:
    """Whether an adapter's base is missing, as far as can be told without the hub."""
    if not base:
        return True
    return not Path(base).is_dir() and (base.startswith((".", "/", "~")) or base.count("/") > 1)


def refuse_without_weights(name: str, key: str, subfolder: str = "") -> None:
    """Raises UserError for a local folder without weights to load."""
    folder = Path(name, subfolder).expanduser()
    if not folder.is_dir() or _weights(folder):
        return
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if any(path.startswith("adapter_model") for path in names):
        raise UserError(f"{key}: {folder} contains an adapter's weights, but no adapter_config.json. Copy that too.")
    parts = sorted(folder.iterdir(), key=lambda path: (len(path.name), path.name))  # checkpoint-12 behind checkpoint-7
    hints = [f"{path.name} in it does hold some" for path in parts if path.is_dir() and _weights(path)]
    hints = hints or [f"{path.name} in it is an adapter" for path in parts if (path / ADAPTER).is_file()]
    shown = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
    raise UserError(
        f"{key}: {folder} holds no weights (model.safetensors); what is there: {shown or 'nothing'}."
        + (f" {hints[-1]}." if hints else "")
    )


def _weights(folder: Path) -> bool:
    """Whether a model's weights, other than an adapter's, are in the folder."""
    return any(not path.name.startswith("adapter_") for pattern in WEIGHTS for path in folder.glob(pattern))


def refuse_objects(model, ref_model) -> None:
    """Models that a caller has made: raises UserError for one whose calls or layers are not its class's own."""
    for role, candidate in (("model", model), ("ref_model", ref_model)):
        if hasattr(candidate, "_orig_mod") or getattr(candidate, "_compiled_call_impl", None) is not None:
            raise UserError(
                f"{role}: is compiled (torch.compile). Give the model itself; fused_ops compiles parts of it."
            )
        if getattr(candidate, "_hf_peft_config_loaded", False) and not isinstance(candidate, PeftModel):
            raise UserError(
                f"{role}: transformers has put an adapter into it, which cannot be switched off as PEFT's can. Give "
                "PeftModel.from_pretrained(base, adapter, is_trainable=True), or a model that it is merged into."
            )


def refuse_frozen(model) -> None:
    """Raises UserError where training would change nothing."""
    if not any(weight.requires_grad for weight in model.parameters()):
        adapter = "PeftModel.from_pretrained takes is_trainable=True"
        hint = adapter if isinstance(model, PeftModel) else "after merge_and_unload, call model.requires_grad_(True)"
        raise UserError(f"model: no weight of {type(model).__name__} is to be trained (requires_grad); {hint}.")
