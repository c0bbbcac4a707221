"""The text of a recipe or a command line → settings under today's keys, strictly: nothing is guessed or ignored.

YAML is read by the rules of YAML 1.2: 4e-7 is a number; yes, no, on and off are text.
Every error is a UserError that begins with the place: `recipe.yaml:12: beta` or `--beta`.
"""

import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from trl import ModelConfig

from mdpo.config.deprecated import RETIRED_KEYS
from mdpo.config.schema import DataArguments, MDPOConfig
from mdpo.config.yaml_nodes import Loader, prepare, refuse_words, syntax
from mdpo.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
PARTS = {"model": ModelConfig, "data": DataArguments, "training": MDPOConfig}
FIELDS = {field.name: field for part in PARTS.values() for field in dataclasses.fields(part)}
HINTS = {key: hint for part in PARTS.values() for key, hint in typing.get_type_hints(part).items()}
WORDS = {"true": True, "yes": True, "on": True, "y": True, "false": False, "no": False, "off": False, "n": False}


@dataclass(frozen=True)
class Setting:
    """One key as the user wrote it."""

    key: str
    value: Any
    text: str | None  # the scalar's exact text; None for a list or a mapping
    quoted: bool
    origin: str  # "recipe.yaml:12: beta" or "--beta"


def _setting(key: str, node: yaml.Node, loader: Loader, origin: str) -> Setting:
    scalar = isinstance(node, yaml.ScalarNode)
    if not scalar and key != "report_to":
        refuse_words(node, origin, strict=key == "model_init_kwargs")
    value = loader.construct_object(node, deep=True)
    return Setting(key, value, node.value if scalar else None, scalar and node.style is not None, origin)


def read_settings(argv: list[str], default: Path, notes: list[str]) -> tuple[Path, dict[str, Setting]]:
    """(recipe, settings by today's key) of a command line, whose settings win over the recipe's. Extends `notes`."""
    path, flags = read_flags(argv)
    path = path or default
    return path, todays_keys(read_yaml(path), notes) | todays_keys(flags, notes)


def read_yaml(path: Path) -> list[Setting]:
    """The settings of a recipe in file order. Raises UserError, with the line, for whatever is no mapping of keys."""
    try:
        loader = Loader(path.read_text(encoding="utf-8-sig"))
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode) or not root.value:
            raise UserError(
                f"{path}: contains no `key: value` lines; a recipe is a mapping of keys to values.", "recipe"
            )
        prepare(root, str(path))
        return [
            _setting(str(key.value), node, loader, f"{path}:{key.start_mark.line + 1}: {key.value}")
            for key, node in root.value
        ]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). {_near_recipes(path)}", "recipe") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8.", "recipe") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(syntax(str(path), error), "recipe") from None


def _near_recipes(path: Path) -> str:
    known = sorted(os.path.relpath(recipe) for recipe in (ROOT / "recipes").glob("*/dpo/*.yaml"))
    near = difflib.get_close_matches(str(path), known, n=3, cutoff=0.5) or known[:5]
    return f"Recipes here: {', '.join(near)}." if near else ""


def read_flags(argv: list[str]) -> tuple[Path | None, list[Setting]]:
    """(recipe or None, settings) of a command line. A bare --debug is the entrypoint's own switch and skipped here."""
    recipes, settings, tokens = [], [], [token for token in argv if token != "--debug"]
    while tokens:
        token = tokens.pop(0)
        key, equals, text = token.removeprefix("--").partition("=")
        if token.startswith("--") and key:
            text = text if equals else _take_value(key, tokens)
            if key == "config":
                recipes.append(text)
            else:
                settings.append(flag(key, text))
        elif token.endswith((".yaml", ".yml")):
            recipes.append(token)
        else:
            raise UserError(
                f"{token!r} is not expected: a recipe ends in .yaml, a setting is --key=value, a list [a, b].",
                key="argument",
            )
    if len(recipes) > 1:
        raise UserError(f"two recipes are given, {recipes[0]} and {recipes[1]}; give one.", "recipe")
    return (Path(recipes[0]) if recipes else None), settings


def _take_value(key: str, tokens: list[str]) -> str:
    """The value of `--key`, popped from `tokens`; "true" for a lone boolean flag. Raises UserError."""
    options = members(HINTS[key]) if key in HINTS else (bool, str) if key in RETIRED_KEYS else (str,)
    follows = bool(tokens) and not tokens[0].startswith("--")
    if bool in options:  # so that `--sanity_check recipe.yaml` leaves the recipe alone
        follows = follows and (
            tokens[0].lower() in WORDS or str in options and not tokens[0].endswith((".yaml", ".yml"))
        )
        return tokens.pop(0) if follows else "true"
    if not follows and key != "config" and key not in FIELDS:
        raise UserError(_unknown(key, f"--{key}"), key)
    if not follows:
        raise UserError(f"--{key}: its value is missing; write --{key}=VALUE.")
    return tokens.pop(0)


def flag(key: str, text: str) -> Setting:
    """A setting of the command line. Only keys that take lists or mappings are parsed as YAML: elsewhere # is text."""
    loader, node = Loader(text), None
    if any(typing.get_origin(kind) or kind is dict for kind in members(HINTS.get(key, str))):
        try:
            node = loader.get_single_node()
            prepare(node, f"--{key}")
        except yaml.YAMLError as error:
            raise UserError(syntax(f"--{key}", error), key) from None
    node = node or yaml.ScalarNode(loader.resolve(yaml.ScalarNode, text, (True, False)), text)
    return _setting(key, node, loader, f"--{key}")


def todays_keys(settings: Iterable[Setting], notes: list[str]) -> dict[str, Setting]:
    """Settings by today's key; notes on older keys are appended to `notes`. Raises UserError for unknown ones."""
    result: dict[str, Setting] = {}
    for setting in settings:
        today = setting if setting.key in FIELDS else _modernize(setting, notes)
        if today is None:
            continue
        if today.key in result:
            raise UserError(f"{today.origin} is set twice, before by {result[today.key].origin}; give it once.")
        result[today.key] = today
    return result


def _modernize(setting: Setting, notes: list[str]) -> Setting | None:
    """The setting under today's key, or None where it asks for nothing. Raises UserError with the table's advice."""
    retired, origin, value = RETIRED_KEYS.get(setting.key), setting.origin, setting.value
    if retired is None:
        raise UserError(_unknown(setting.key, origin), setting.key)
    if value is None or (retired.to is None and value is False):
        notes.append(f"{origin} is gone and was off; left out ({retired.advice or f'today: {retired.to}'}).")
        return None
    if retired.to is None:
        raise UserError(f"{origin} is gone: {retired.advice}.")
    notes.append(f"{origin} is called {retired.to} now; taken as that.")
    if retired.convert is None:
        return dataclasses.replace(setting, key=retired.to)
    try:
        return dataclasses.replace(setting, key=retired.to, value=retired.convert(value), text=None)
    except ValueError as error:
        raise UserError(f"{origin}: {value!r} cannot be turned into {retired.to}: {error}.") from None


def _unknown(key: str, origin: str) -> str:
    near = nearest(key.replace("-", "_"), FIELDS)
    dashes = "--" if origin.startswith("--") else ""
    return f"{origin} is not a key; " + (
        f"did you mean {dashes}{near}?" if near else "run_dpo.py --help lists the keys."
    )


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that was probably meant: one that begins with `name`, is alike, or contains it."""
    starts, containing = (
        ([], []) if len(name) < 3 else ([k for k in known if k.startswith(name)], [k for k in known if name in k])
    )
    alike = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    return next(iter(starts + alike + containing + difflib.get_close_matches(name, known, n=1)), None)


def members(hint: Any) -> tuple:
    """The members of a union; (hint,) for anything else."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
