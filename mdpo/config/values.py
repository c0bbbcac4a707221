"""The meaning of texts in a recipe: null written as in Python, variables and ~ in paths."""

import dataclasses
import os
import re
import typing
from pathlib import Path
from typing import Any

from mdpo.config.parallelism import ADVICE
from mdpo.config.parsing import FIELDS, WORDS, Setting, members
from mdpo.errors import UserError

NULLS = {"none", "null", "nil", "~", ""}
OWN_WORDS = {"debug", "report_to"}  # an empty text and `none` are values of theirs
FREE_TEXT = {"run_name", "project"}  # any word may be meant
TRUTHS = set(WORDS) - {"y", "n"}
PATHS = {"model_name_or_path", "ref_model_name_or_path", "tokenizer_name_or_path", "dataset_mixer", "output_dir",
         "eval_dataset_mixer", "chat_template", "reference_cache_dir", "resume_from_checkpoint", "deepspeed",
         "accelerator_config"}  # fmt: skip
NAMES = {"run_name", "project", "model_revision", "hub_model_id", "hub_revision", "hub_token",
         "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"}  # fmt: skip
INNER_PATHS = {"model_init_kwargs": {"cache_dir", "offload_folder"}}
BRACED = re.compile(r"\$\{(\w+)\}")
VARIABLE = re.compile(r"\$(?:\{(\w+)\}|([A-Za-z_]\w*))")
OF_A_SHELL = re.compile(r"\$[({]|`")


def meant(setting: Setting, hint: Any, notes: list[str]) -> Setting:
    """The setting with null for the words that mean it elsewhere, with a line in `notes`. `hint` is the type
    of its key. Raises UserError where text is wanted and such a word, or one for true or false, is no text."""
    text, kinds = setting.text, members(hint)
    if setting.key == "parallelism_config" and setting.value is not None:
        raise UserError(f"{setting.origin}: {ADVICE}.")
    if setting.key == "report_to" and (setting.value is None or (text is not None and text.lower() in NULLS)):
        return dataclasses.replace(setting, value="none", text="none")  # Trainer takes no null
    choices = {choice for kind in kinds if typing.get_origin(kind) is typing.Literal for choice in kind.__args__}
    if text is None or setting.value is None or setting.key in OWN_WORDS or text in choices:
        return setting
    texts = str in kinds or list[str] in kinds
    if text.strip().lower() in NULLS and type(None) in kinds:
        notes.append(f"{setting.origin}: {text!r} is taken as null.")
        return dataclasses.replace(setting, value=None, text=None, quoted=False)
    if text.strip().lower() in NULLS and texts:
        default = FIELDS[setting.key].default
        shown = "" if default is dataclasses.MISSING else f", which is {default}"
        raise UserError(f"{setting.origin}: {text!r} is a text here; leave the key out for its default{shown}.")
    switch = text.lower() in TRUTHS and not setting.quoted and setting.key not in FREE_TEXT
    if switch and str in kinds and bool not in kinds:
        raise UserError(f"{setting.origin}: {text} is no name; write null to leave it out, or quote it as '{text}'.")
    return setting


def expanded(key: str, value: Any, origin: str) -> Any:
    """The value with ~ and variables of the environment put in where it is, or contains, a path; in names only those in
    braces. Raises UserError that names a variable without a value."""
    if key in INNER_PATHS and isinstance(value, dict):
        paths = INNER_PATHS[key]
        return {k: _of_path(v, f"{origin}.{k}") if k in paths and isinstance(v, str) else v for k, v in value.items()}
    if key in NAMES and isinstance(value, str):
        return BRACED.sub(lambda match: _variable(match, origin), value)
    if key not in PATHS:
        return value
    if isinstance(value, str):
        return value if value.startswith("{") else _of_path(value, origin)  # JSON
    if isinstance(value, list):
        return [_of_path(name, origin) for name in value]
    if isinstance(value, dict) and key.endswith("mixer"):
        names = {name: _of_path(name, origin) for name in value}
        if len(set(names.values())) < len(names):
            raise UserError(f"{origin}: names a dataset twice, with its path written in two ways; list each once.")
        return {names[name]: share for name, share in value.items()}
    return value


def _of_path(text: str, origin: str) -> str:
    if not set("$~`") & set(text) or os.path.exists(text):
        return text
    if OF_A_SHELL.search(VARIABLE.sub("", text)):
        raise UserError(f"{origin}: {text}: no shell reads this; $NAME and ${{NAME}} are replaced, nothing else is.")
    path = VARIABLE.sub(lambda match: _variable(match, origin), text)
    if path.startswith("~") and (home := os.path.expanduser(path)) == path:
        raise UserError(f"{origin}: {text}: {Path(path).parts[0]} is no home folder here; write the whole path.")
    return home if path.startswith("~") else path


def _variable(match: re.Match, origin: str) -> str:
    name = next(filter(None, match.groups()))
    if not os.environ.get(name):
        problem = "is empty" if name in os.environ else "is not set"
        raise UserError(f"{origin}: the variable {name} {problem}; export it, or write its value here.")
    return os.environ[name]
