"""The tokenizer of a recipe, with its chat template."""

from pathlib import Path

from transformers import AutoTokenizer

from mdpo.types import UserError


def load_tokenizer(model, data, trust_remote_code: bool = False):
    """From `tokenizer_name_or_path`, else from the model's folder or hub name; `chat_template` (a path) replaces its
    template. `model` is trl.ModelConfig, `data` is DataArguments. Raises UserError."""
    name = data.tokenizer_name_or_path or model.model_name_or_path
    key = "tokenizer_name_or_path" if data.tokenizer_name_or_path else "model_name_or_path"
    refuse_missing_folder(key, name)
    revision = None if data.tokenizer_name_or_path else model.model_revision
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as e:
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise UserError(
            f"loading model {name!r}: it cannot be had: {reason}\n"
            f"Where the hub cannot be reached, download it elsewhere and set {key} to the local folder; "
            "for a gated model, log in with `hf auth login`."
        ) from e
    if data.chat_template:
        path = Path(data.chat_template)
        if not path.is_file():
            raise UserError(f"chat_template: {path} does not exist. Give the path of a .jinja file.")
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    return tokenizer


def refuse_missing_folder(key: str, name: str) -> None:
    """A name that can only be a folder is not asked for at the hub, which takes a while to say no. Raises UserError."""
    path = Path(name).expanduser()
    local = name.startswith((".", "/", "~", "models/", "outputs/")) or len(path.parts) > 2
    if local and not path.is_dir():
        hint = " `python scripts/prepare_quickstart.py` makes it." if "smollm2-135m-instruct" in name else ""
        raise UserError(f"{key}: there is no folder {name} (looked in {Path.cwd()}).{hint}")
