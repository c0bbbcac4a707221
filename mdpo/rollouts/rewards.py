"""How good a trajectory is: the sum of an environment's reward and of reward functions in TRL's form, weighted."""

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import fsum, isfinite
from typing import Any

from transformers import TrainerState

from mdpo.errors import UserError
from mdpo.rollouts.answers import gold_answer, is_right, last_boxed
from mdpo.rollouts.calls import CODE, visible
from mdpo.types import Message

RewardFunction = Callable[..., Any]
# What TRL's trainer gives beside the columns.
OF_TRAINING = {"trainer_state": TrainerState(), "log_extra": lambda *_, **__: None, "log_metric": lambda *_, **__: None}


@dataclass(frozen=True)
class Rewards:
    """Reward functions are called as TRL's GRPOTrainer calls them, for one trajectory: `f(prompts=[messages],
    completions=[messages], completion_ids=[ids], environments=[instance], **columns)`, each column a list of one, and
    return a list of one number or None. One that takes `trainer_state`, `log_extra` or `log_metric` gets a state of
    step 0 and functions that write nothing down: there is no training here. `weights` has one for each function; the
    environment's own reward has 1."""

    functions: Sequence[RewardFunction] = ()
    weights: Sequence[float] = ()
    names: list[str] = field(init=False)

    def __post_init__(self):
        if self.weights and len(self.weights) != len(self.functions):
            raise UserError(
                f"reward_weights: {len(self.weights)} numbers for {len(self.functions)} reward functions.",
                "reward_weights",
            )
        if not all(map(isfinite, self.weights)):
            raise UserError(f"reward_weights: {list(self.weights)} are not all finite numbers.", "reward_weights")
        names = [getattr(f, "__name__", type(f).__name__) for f in self.functions]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"rewards: {twice[0]} is the name of two reward functions.")
        object.__setattr__(self, "names", names)

    def calls(
        self, task: dict[str, Any], prompt: list[Message], completion: list[Message], ids: list[int], instance: Any
    ) -> dict[str, Callable[[], float | None]]:
        """For each function by name, a call that returns its reward for a trajectory, or raises what it raises."""
        columns = {n: [copy.deepcopy(value)] for n, value in task.items() if n not in ("prompt", "completion")}
        if instance is not None:
            columns["environments"] = [instance]
        given = {**columns, "prompts": [prompt], "completions": [completion], "completion_ids": [ids]}
        return {
            name: partial(_one, name, function, given)
            for name, function in zip(self.names, self.functions, strict=True)
        }

    def total(self, rewards: dict[str, float | None]) -> float | None:
        """The weighted sum; None where a source has none, or there is no source."""
        weights = dict(zip(self.names, self.weights or [1.0] * len(self.names), strict=True))
        if not rewards or any(reward is None for reward in rewards.values()):
            return None
        return fsum(weights.get(name, 1.0) * reward for name, reward in rewards.items() if reward is not None)


def _one(name: str, function: RewardFunction, given: dict[str, Any]) -> Any:
    """The reward, or what comes to it when awaited."""
    taken = inspect.signature(function).parameters
    every = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    values = function(**given, **{n: value for n, value in OF_TRAINING.items() if every or n in taken})
    return _number(name, values) if not inspect.isawaitable(values) else _awaited(name, values)


async def _awaited(name: str, values: Any) -> float | None:
    return _number(name, await values)


def _number(name: str, values: Any) -> float | None:
    if not isinstance(values, list | tuple) or len(values) != 1:
        raise ValueError(f"{name} has to return a list of one number or None for one trajectory, not {values!r:.60}")
    return checked_reward(name, values[0])


def checked_reward(name: str, value: Any) -> float | None:
    """A finite number, or None. Raises ValueError."""
    if value is None:
        return None
    number = float(value)
    if not isfinite(number):
        raise ValueError(f"{name} returned {value}, not a finite number")
    return number


def right_answer(completions: list[list[Message]], answer: list[Any], **_: Any) -> list[float]:
    """A reward function of TRL's form: 1 where the last turn's \\boxed{} outside code is the row's `answer` by
    math-verify, else 0."""
    return [
        float(is_right(final_answer(completion), gold_answer(gold)))
        for completion, gold in zip(completions, answer, strict=True)
    ]


def final_answer(completion: list[Message]) -> str | None:
    """The last \\boxed{} outside code of the last turn; None where there is none, or no turn."""
    turns = [message for message in completion if message["role"] == "assistant"]
    return last_boxed(CODE.sub("", visible(turns[-1].get("content") or ""))) if turns else None
