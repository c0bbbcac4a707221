"""What a policy acts in: an environment in the protocol of TRL 1.16's `environment_factory`, plain functions as tools,
or both. A class of that protocol has `reset(**row) -> str | None`, public methods with type hints and docstrings as
tools, and may have `get_reward() -> float`; one written for TRL's GRPOTrainer is taken as it is."""

import asyncio
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import get_json_schema

from mdpo.console import first_line
from mdpo.errors import UserError
from mdpo.rollouts.worker import Hung, Worker

NO_TOOLS = ("reset", "get_reward")  # public methods that the policy cannot call


def load_object(spec: str, option: str) -> Any:
    """The object that `path/to/file.py:NAME` or `package.module:NAME` names. Raises UserError."""
    where, colon, name = spec.rpartition(":")
    if not colon or not where or not name:
        raise UserError(f"--{option}: {spec!r} has to be path/to/file.py:NAME or package.module:NAME.")
    try:
        module = _of_file(Path(where), option) if where.endswith(".py") else importlib.import_module(where)
    except UserError:
        raise
    except Exception as error:  # the user's own code runs
        raise UserError(
            f"--{option}: {where} cannot be imported: {type(error).__name__}: {first_line(error)}."
        ) from error
    if not hasattr(module, name):
        public = [n for n in vars(module) if not n.startswith("_")]
        raise UserError(f"--{option}: {where} has no {name}. It has {', '.join(public) or 'nothing'}.")
    return getattr(module, name)


def code_files(options: dict[str, Any]) -> list[str]:
    """The files that sampling's options name as path/to/file.py:NAME, of a list or of a text with commas."""
    named = [options.get(name) or () for name in ("environment", "tools", "rewards")]
    specs = [spec for value in named for spec in (value.split(",") if isinstance(value, str) else value)]
    return sorted({where for where in (spec.rpartition(":")[0] for spec in specs) if where.endswith(".py")})


def _of_file(path: Path, option: str) -> Any:
    if not path.is_file():
        raise UserError(f"--{option}: there is no file {path}.")
    name = f"mdpo_user_{path.stem}_{abs(hash(path.resolve()))}"
    if name not in sys.modules:
        found = importlib.util.spec_from_file_location(name, path)
        assert found is not None and found.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(found)
        try:
            found.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


@dataclass
class Place:
    """An instance of the environment, None where there is no class, and the thread in which its methods run; `lost`
    where one of them never returned."""

    instance: Any | None
    worker: Worker
    lost: bool = False


class Environments:
    """Instances of one environment class, each constructed once and reset often; without a class, an episode has only
    `functions` as tools. `schemas` has the tools as chat templates take them, by name. Raises UserError for a class
    that is not of the protocol, or whose first instance is not there within `seconds`."""

    def __init__(
        self,
        factory: Callable[[], Any] | None = None,
        functions: Iterable[Callable[..., Any]] = (),
        seconds: float = 60.0,
    ):
        self.factory, self.functions, self.seconds = factory, list(functions), seconds
        self._free: list[Place] = []
        self.name = getattr(factory, "__name__", type(factory).__name__) if factory else ""
        probe = None if factory is None else self._probe(factory)
        self.has_reward = callable(getattr(type(probe), "get_reward", None))
        names = [f.__name__ for f in self.functions] + list(_methods(probe))
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"tools: {twice[0]} is the name of two tools.", "tools")
        self.schemas = {name: _schema(tool) for name, tool in self.tools(probe).items()}

    def tools(self, instance: Any | None) -> dict[str, Callable[..., Any]]:
        """The tools of an episode by name: the plain functions, then the instance's public methods."""
        return {f.__name__: f for f in self.functions} | _methods(instance)

    async def take(self, seconds: float) -> Place:
        """One that no other episode has. Raises what the class raises, or Hung."""
        if self._free:
            return self._free.pop()
        place = Place(None, Worker())
        if self.factory is not None:
            place.instance = await place.worker.call(f"{self.name}()", self.factory, seconds)
        return place

    def give_back(self, place: Place) -> None:
        """For the next episode, unless it is lost."""
        if place.lost:
            place.worker.close()
        else:
            self._free.append(place)

    def _probe(self, factory: Callable[[], Any]) -> Any:
        try:
            probe = asyncio.run(Worker().call(f"{self.name}()", factory, self.seconds))
        except Hung as error:
            raise UserError(f"environment: {error}: a longer time is --tool_seconds.", "environment") from None
        except Exception as error:
            raise UserError(
                f"environment: {self.name}() raised {type(error).__name__}: {first_line(error)}.", "environment"
            ) from error
        if not callable(getattr(type(probe), "reset", None)):
            raise UserError(f"environment: {self.name} has no method reset(**row).", "environment")
        return probe


def environments_of(
    loaded: Any, functions: Iterable[Callable[..., Any]] = (), seconds: float = 60.0
) -> dict[str | None, Environments]:
    """Of one class (or None) under None; of a dict of classes by the name that a task's `environment` gives, as TRL
    takes both. Raises UserError."""
    if not isinstance(loaded, dict):
        return {None: Environments(loaded, functions, seconds)}
    if not loaded or not all(isinstance(name, str) for name in loaded):
        raise UserError("environment: a dict of environments needs names as its keys.", "environment")
    functions = list(functions)
    return {name: Environments(factory, functions, seconds) for name, factory in loaded.items()}


def _methods(instance: Any | None) -> dict[str, Callable[..., Any]]:
    """The public methods of an instance, found on its class: properties are not evaluated."""
    found = [] if instance is None else inspect.getmembers(type(instance), predicate=inspect.isfunction)
    return {name: getattr(instance, name) for name, _ in found if not name.startswith("_") and name not in NO_TOOLS}


def _schema(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_json_schema(function)
    except Exception as error:  # of several kinds: no docstring, no hint, an argument without a description
        raise UserError(
            f"environment: the tool {function.__name__} cannot be described: {first_line(error)}.", "environment"
        ) from error
