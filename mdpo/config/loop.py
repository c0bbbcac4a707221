"""What a loop of iterations may say: a YAML file, read as strictly as a recipe."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from mdpo.config.parsing import members, nearest
from mdpo.config.yaml_nodes import Loader, prepare, syntax
from mdpo.errors import UserError


@dataclass(frozen=True)
class Loop:
    """`sample`, `evaluate` and `pair` have options of scripts/sample.py (the first two) and scripts/pair_rollouts.py,
    `train` keys of the recipe. Paths are relative to where the loop is started."""

    recipe: str
    output_dir: str
    tasks: str
    held_out_tasks: str
    iterations: int = 3
    accelerate_config: str | None = None  # null: one process
    reference: str = "moved"  # training regularizes towards the policy before; or first: towards that of iteration 0
    policy: str | None = None  # null: the recipe's model_name_or_path
    sft: str | None = None  # a recipe of `trl sft`, for the policy before the first iteration
    sft_data: str | None = None  # the trajectories that it learns
    stop_when_worse: bool = True  # after an iteration whose share of right answers fell by more than its interval
    sample: dict[str, Any] = field(default_factory=dict)
    evaluate: dict[str, Any] = field(default_factory=dict)
    pair: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)


def read_loop(path: Path) -> Loop:
    """Raises UserError, with the line."""
    try:
        loader = Loader(path.read_text(encoding="utf-8-sig"))
        root = loader.get_single_node()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).", "loop") from None
    except yaml.YAMLError as error:
        raise UserError(syntax(str(path), error), "loop") from None
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path}: contains no `key: value` lines.", "loop")
    prepare(root, str(path))
    known, values = {f.name: f for f in dataclasses.fields(Loop)}, dict[str, Any]()
    hints = get_type_hints(Loop)
    for key, node in root.value:
        origin = f"{path}:{key.start_mark.line + 1}: {key.value}"
        if key.value not in known:
            near = nearest(str(key.value), known)
            raise UserError(f"{origin} is not a key; " + (f"did you mean {near}?" if near else ", ".join(known)))
        values[key.value] = _typed(loader.construct_object(node, deep=True), hints[key.value], origin)
    missing = [n for n, f in known.items() if f.default is f.default_factory is dataclasses.MISSING and n not in values]
    if missing:
        raise UserError(f"{path}: {missing[0]} is missing.", missing[0])
    loop = Loop(**values)
    if loop.iterations < 1:
        raise UserError(f"{path}: iterations: {loop.iterations} is out of range; give a number >= 1.", "iterations")
    if loop.reference not in ("moved", "first"):
        raise UserError(f"{path}: reference: {loop.reference!r} is neither moved nor first.", "reference")
    if bool(loop.sft) != bool(loop.sft_data):
        given, other = ("sft", "sft_data") if loop.sft else ("sft_data", "sft")
        raise UserError(f"{path}: {given}: needs {other} as well.", given)
    return loop


def _typed(value: Any, hint: Any, origin: str) -> Any:
    kinds = tuple(kind if not get_args(kind) else dict for kind in members(hint))
    if isinstance(value, bool) and bool not in kinds or not isinstance(value, kinds):
        names = " or ".join({"NoneType": "null", "dict": "a mapping"}.get(k.__name__, k.__name__) for k in kinds)
        raise UserError(f"{origin}: {value!r:.60} is not {names}.")
    return value
