"""A recipe and a command line → the dataclasses of a run.

    recipe = load_recipe(sys.argv[1:])  # [RECIPE.yaml] [--config RECIPE.yaml] [--key=value | --key value | --flag] ...
    recipe.model, recipe.data, recipe.training  # trl.ModelConfig, DataArguments, MDPOConfig
    recipe.notes  # lines to print once: older key names, fall-backs, derived values
    recipe.write(path)

Every mistake in a recipe is a UserError that names the place, the value and what is wanted.
"""

import copy
import dataclasses
import json
import re
import textwrap
import typing
import warnings
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from transformers import TrainingArguments
from trl import DPOConfig, ModelConfig

from mdpo.config.adapters import one_entry
from mdpo.config.deepspeed_file import find_deepspeed_file
from mdpo.config.parsing import FIELDS, HINTS, PARTS, ROOT, WORDS, Setting, flag, members, nearest, read_settings
from mdpo.config.precision import fit_to_machine
from mdpo.config.schema import DataArguments, MDPOConfig
from mdpo.config.values import expanded, meant
from mdpo.config.yaml_nodes import Dumper
from mdpo.errors import UserError

DEFAULT_RECIPE = ROOT / "recipes/gemma-7b-it/dpo/config_full.yaml"
# Not written beside a checkpoint: a secret, and what a launcher passes to one process.
PRIVATE_KEYS = ("hub_token", "local_rank")


@dataclass
class Recipe:
    """One run: what is trained, on what, how. `values`: every key set or derived; `written`: before fit_to_machine."""

    model: ModelConfig
    data: DataArguments
    training: MDPOConfig
    path: Path | None
    notes: list[str]
    values: dict[str, Any] = dataclasses.field(repr=False)  # may hold hub_token
    written: dict[str, Any] = dataclasses.field(repr=False, default_factory=dict)
    origins: dict[str, str] = dataclasses.field(repr=False, default_factory=dict)  # key -> where it was set

    def resolved(self) -> dict[str, Any]:
        """key -> value as plain YAML data, for the report and for `write`."""
        return {key: value for key, value in self.values.items() if key not in PRIVATE_KEYS}

    @contextmanager
    def placed(self):
        """A UserError that names keys names their places too."""
        try:
            yield
        except UserError as error:
            raise _placed(str(error), self.origins, error.key) from error

    def write(self, path: str | Path) -> None:
        """Write the resolved recipe; load_recipe reads it back to the same values (all but PRIVATE_KEYS)."""
        header = f"# Resolved from {self.path}: this file alone is the recipe of the run.\n"
        text = yaml.dump(self.resolved(), Dumper=Dumper, sort_keys=False, allow_unicode=True)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(header + text, encoding="utf-8")


def load_recipe(argv: list[str]) -> Recipe:
    """The recipe of a command line; without one in it, DEFAULT_RECIPE. --help prints the keys and exits with 0.

    Raises UserError. Never creates an Accelerator: TrainingArguments has to come first.
    """
    if "--help" in argv or "-h" in argv:
        print(help_text())
        raise SystemExit(0)
    notes: list[str] = []
    path, settings = read_settings(argv, DEFAULT_RECIPE, notes)
    origins = {key: setting.origin for key, setting in settings.items()}
    values = {key: typed(meant(setting, accepted(key), notes)) for key, setting in settings.items()}
    values = {key: expanded(key, value, origins[key]) for key, value in values.items()}
    for key in ("model_name_or_path", "dataset_mixer"):
        if not values.get(key):
            raise UserError(f"{path}: {key} is missing; a recipe has to name its model and its training datasets.", key)
    if not values.get("output_dir"):
        values["output_dir"] = _default_output_dir(path)
        notes.append(f"output_dir is not set; writing to {values['output_dir']}.")
    values, written = fit_to_machine(values, notes), values
    return Recipe(**_build(values, origins), path=path, notes=notes, values=values, written=written, origins=origins)


def _default_output_dir(path: Path) -> str:
    """recipes/gemma-7b-it/dpo/config_full.yaml -> outputs/gemma-7b-it/dpo/config_full; else outputs/FOLDER/NAME."""
    parts = path.resolve().with_suffix("").parts
    after = max((i for i, part in enumerate(parts[:-1]) if part == "recipes"), default=len(parts) - 3) + 1
    return str(Path("outputs", *parts[after:]))


def _build(values: dict[str, Any], origins: dict[str, str]) -> dict[str, Any]:
    """{"model": ModelConfig, ...} of the values. Raises UserError that names where the keys at fault were set."""
    find_deepspeed_file()
    parts, values = {}, copy.deepcopy(values)  # TrainingArguments and trainers change lists and dicts in place
    for name, part in PARTS.items():
        names = {field.name for field in dataclasses.fields(part)}
        try:
            with warnings.catch_warnings():  # a default of TRL's own triggers it, and the handbook's name works
                warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)
                parts[name] = part(**{key: value for key, value in values.items() if key in names})
        except (json.JSONDecodeError, UnicodeDecodeError) as error:  # of the one file that a key may name here
            at = origins.get("deepspeed", "deepspeed")
            raise UserError(f"{at}: {values.get('deepspeed')} is no JSON in UTF-8 ({error}).") from error
        except (ValueError, TypeError, OSError, ImportError, AttributeError, KeyError, RuntimeError) as error:
            message = " ".join(str(error).strip().split("\n\n")[0].split())
            part_values = {k: values[k] for k in values if k in names}
            if not isinstance(error, UserError) and not set(re.findall(r"\w+", message)) & set(part_values):
                message = f"{_culprit(part, part_values)}{message}"
            raise _placed(message, origins, error.key if isinstance(error, UserError) else None) from error
    one_entry(parts["model"])
    return parts


def _culprit(part: type, part_values: dict[str, Any]) -> str:
    """`KEY: ` of the first key without which the dataclass takes the others; the last one set is tried first."""
    for key in reversed(part_values):
        with suppress(Exception), warnings.catch_warnings():  # another key's refusal, in whatever form
            warnings.simplefilter("ignore")
            part(**copy.deepcopy({k: v for k, v in part_values.items() if k != key}))
            return f"{key}: "
    return ""


def _placed(message: str, origins: dict[str, str], key: str | None) -> UserError:
    """The message with the places of the keys in it: in front for `key: ...`, else behind. `key`: that of the error,
    None for the first one in the message."""
    first = message.partition(":")[0]
    if first in origins:
        return UserError(origins[first] + message[len(first) :], None if key == first else key)
    named = [word for word in dict.fromkeys(re.findall(r"\w+", message)) if word in origins]
    places = f" (Set at {', '.join(origins[word] for word in named)}.)" if named else ""
    return UserError(message + places, key or next(iter(named), None))


def accepted(key: str) -> Any:
    """The type of a key; where the dataclass only lists its choices or names an Enum beside str, their Literal."""
    kinds = members(HINTS[key])
    enums = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Enum)]
    choices = FIELDS[key].metadata.get("choices") or [member.value for enum in enums for member in enum]
    if not choices:
        return HINTS[key]
    return Literal[tuple(choices)] | None if type(None) in kinds else Literal[tuple(choices)]


def describe(hint: Any) -> str:
    """A type in words, for errors and --help: `a whole number or null`."""
    kinds, args = members(hint), typing.get_args(hint)
    if len(kinds) > 1:
        return " or ".join(dict.fromkeys(map(describe, kinds)))
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, args))}"
    if typing.get_origin(hint) is list:
        return f"a list (items: {describe(args[0])})"
    if typing.get_origin(hint) is dict:
        return f"a mapping ({describe(args[0])}: {describe(args[1])})"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    return names.get(hint) or {dict: "a mapping", Any: "anything"}.get(hint) or hint.__name__


def typed(setting: Setting) -> Any:
    """The setting's value in the type of its key. Raises UserError that names value and type.

    A scalar for a list is its one item, or several between commas; a whole float is an int where one is wanted; a
    number where text is wanted stays the text that was written (run_name: 1.10 is "1.10").
    """
    hint, value, text = accepted(setting.key), setting.value, setting.text
    kinds = members(hint)
    if bool in kinds and isinstance(value, str):
        value = WORDS.get(value.lower(), value)
    if any(typing.get_origin(kind) is list for kind in kinds) and text is not None and value is not None:
        if "," in text and not setting.quoted:
            value = [flag("", item.strip()).value for item in text.split(",")]
        elif str not in kinds:
            value = [value]
    if isinstance(value, float) and value.is_integer() and int in kinds and float not in kinds:
        value = int(value)
    try:
        TypeAdapter(hint, config=ConfigDict(strict=True)).validate_python(value)
    except ValidationError:
        if str in kinds and text is not None and value is not None and not isinstance(value, list):
            return text
        raise UserError(_mismatch(setting, hint)) from None
    return value


def _mismatch(setting: Setting, hint: Any) -> str:
    written = setting.text or "null"
    if setting.text is None or setting.quoted:
        written = repr(setting.value)
    choices = [
        choice for kind in members(hint) if typing.get_origin(kind) is Literal for choice in typing.get_args(kind)
    ]
    near = nearest(written, choices)
    return f"{setting.origin}: {written:.100} is not {describe(hint)}." + (f" Did you mean {near}?" if near else "")


def key_groups() -> dict[str, list[str]]:
    """Every key under the title of the dataclass that it comes from; "(ours)" where it is this repository's."""
    ours = {field.name for field in dataclasses.fields(MDPOConfig) if field.name in MDPOConfig.__annotations__}
    titles = {"Data (ours)": {f.name for f in dataclasses.fields(DataArguments)}, "Multi-turn DPO (ours)": ours}
    titles["Model (trl.ModelConfig)"] = {field.name for field in dataclasses.fields(ModelConfig)}
    hf = {field.name for field in dataclasses.fields(TrainingArguments)}
    titles["DPO (trl.DPOConfig)"] = {field.name for field in dataclasses.fields(DPOConfig)} - hf - ours
    titles["Training (transformers.TrainingArguments)"] = hf - ours
    return {title: [key for key in FIELDS if key in names] for title, names in titles.items()}


def key_facts(key: str) -> tuple[str, Any, str]:
    """(type in words, default, help) of a key: what --help and docs/recipe-keys.md say of it."""
    field = FIELDS[key]
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    default = default.value if isinstance(default, Enum) else default
    return describe(accepted(key)), default, " ".join(field.metadata.get("help", "").split())


def help_text() -> str:
    """Every key with its type, default and help (its first sentence, where it is not ours)."""
    lines = ["run_dpo.py [RECIPE.yaml | --config RECIPE.yaml] [--key=value | --key value | --flag] ... [--debug]"]
    for title, keys in key_groups().items():
        lines += ["", title] + [_help_line(key, "ours" in title) for key in keys]
    return "\n".join(lines)


def _help_line(key: str, whole: bool) -> str:
    kind, default, text = key_facts(key)
    text = text if whole else re.split(r"(?<=[.!?])\s", text)[0]
    line = f"--{key} ({kind}; default {'null' if default is None else default}) {text}"
    return textwrap.fill(line, 118, initial_indent="  ", subsequent_indent="      ")


def model_init_kwargs(model, args) -> dict:
    """Keyword arguments of from_pretrained, from trl.ModelConfig and what the recipe says in model_init_kwargs."""
    kwargs = {"dtype": model.dtype, "attn_implementation": model.attn_implementation, "revision": model.model_revision}
    return {**{k: v for k, v in kwargs.items() if v is not None}, **(args.model_init_kwargs or {})}
