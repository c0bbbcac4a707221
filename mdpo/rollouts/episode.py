"""One conversation of a policy with its environment: a turn is sampled, its calls are run, the results come back as the
next messages, until a turn without a call or another end."""

import asyncio
import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Thread
from typing import Any, Protocol, runtime_checkable

from mdpo.console import first_line
from mdpo.data.tool_calls import linked
from mdpo.errors import DropPair, UserError
from mdpo.masking.chat_template import ChatTemplate
from mdpo.masking.spans import token_ids
from mdpo.rollouts.arguments import wrong_arguments
from mdpo.rollouts.calls import Call, CallForm, TurnCalls
from mdpo.rollouts.environment import Environments, Place
from mdpo.rollouts.options import IN_FLIGHT
from mdpo.rollouts.records import SampledTurn, Trajectory, recorded_sequences
from mdpo.rollouts.rewards import Rewards, checked_reward
from mdpo.rollouts.tasks import Task, observed
from mdpo.rollouts.worker import Hung, Worker
from mdpo.types import Message

RESULT_CHARACTERS = 16_000  # of a result that the policy sees: the first and the last half
HUNG = 100  # methods that have not returned, after which sampling ends: each holds a thread


class Outcome(str):
    """A tool's text with how it ended, where that is not "ok": an ordinary text for everyone else."""

    ended = "ok"

    @classmethod
    def of(cls, text: str, ended: str) -> "Outcome":
        outcome = cls(text)
        outcome.ended = ended
        return outcome


@dataclass(frozen=True)
class Sampled:
    """What the policy sampled, its stop included; of a Speaker a message in place of ids; neither where there was no
    room for a token. `cut` says that the token limit ended it."""

    ids: list[int]
    cut: bool = False
    logprobs: list[float] | None = None
    message: Message | None = None


class Backend(Protocol):
    async def sample(self, prompt: list[int], max_new_tokens: int) -> Sampled: ...


@runtime_checkable
class Speaker(Protocol):
    """A backend without token ids."""

    async def answer(self, messages: list[Message], tools: list[dict] | None, max_new_tokens: int) -> Sampled: ...


@dataclass(frozen=True)
class Limits:
    """`turns` of the policy in a conversation, `new_tokens` in a turn, `context` tokens in all (None: no limit),
    `seconds` that `reset`, a tool or a reward may take."""

    turns: int = 6
    new_tokens: int = 512
    context: int | None = None
    seconds: float = 60.0


@dataclass
class Player:
    """All that the episodes of one run have in common. `stops` are the ids that end a turn."""

    backend: Backend | Speaker
    template: ChatTemplate
    stops: set[int]
    form: CallForm
    environments: Environments
    rewards: Rewards
    limits: Limits
    hung: list[tuple[str, Thread]] = field(default_factory=list)  # what has not returned, and where
    named_by: str | None = None  # the column that names one of several environments: `reset` does not get it
    slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(IN_FLIGHT))  # for the user's code

    async def play(self, task: Task, sample: int) -> Trajectory:
        """An episode from `reset` to its reward. Failures of the environment end it as "environment error", and turns
        that the template refuses as "refused"; a first prompt that it refuses, and a backend that fails, raise
        UserError, as every other episode would."""
        trajectory = Trajectory(task.key, sample, task.row, list(task.messages), tools=self.form.schemas)
        turns: list[SampledTurn] = []
        place = None
        try:
            async with self.slots:
                place = await self.environments.take(self.limits.seconds)
            instance = place.instance
            if instance is not None:
                row = copy.deepcopy({n: value for n, value in task.row.items() if n != self.named_by})
                observation = await self._limited(place, "reset", lambda: instance.reset(**row))
                trajectory.messages = observed(task.messages, observation)
            trajectory.messages = self.form.opening(trajectory.messages)
            trajectory.prompt_messages = len(trajectory.messages)
            while not trajectory.ended:
                await self._turn(trajectory, turns, place)
            if trajectory.turns:
                await self._judge(trajectory, turns, place)
        except UserError:
            raise
        except Exception as error:  # of the user's code
            trajectory.ended = "environment error"
            trajectory.error = f"{type(error).__name__}: {first_line(error)}"
            trajectory.reward = None
        trajectory.sequences = recorded_sequences(turns)
        if place:
            self.environments.give_back(place)
        return trajectory

    async def prompt(self, messages: list[Message]) -> list[int]:
        """Ids of the conversation and the generation prompt, by the template and tokenizer that training uses."""
        try:
            text = self.template.render(linked(messages, strict=True), self.form.schemas, generation=True)
            # Of 10,000 tokens 20 ms, in which servers would wait for all other conversations.
            return await asyncio.to_thread(token_ids, text, self.template.tokenizer)
        except DropPair as reason:
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(f"{reason} (its messages: {roles}).", reason.key) from reason

    async def _turn(self, trajectory: Trajectory, turns: list[SampledTurn], place: Place) -> None:
        try:
            prompt, limits = await self.prompt(trajectory.messages), self.limits
        except UserError as error:
            if not trajectory.turns:
                raise
            trajectory.ended, trajectory.error = "refused", str(error)  # the policy's own turns were the reason
            return
        if limits.context is not None and len(prompt) + limits.new_tokens > limits.context:
            trajectory.ended = "too long"
            return
        sampled = await self._sampled(prompt, trajectory.messages)
        if sampled.message is None and not sampled.ids:  # a server found no room
            trajectory.ended = "too long"
            return
        if sampled.message is None:
            turns.append(SampledTurn(prompt, sampled.ids, sampled.logprobs))
        trajectory.turns += 1
        turn = self._read(sampled, prompt)
        trajectory.messages.append(turn.message)
        if sampled.cut:
            trajectory.ended = "cut"
        elif not turn.calls and not turn.malformed:
            trajectory.ended = "done"
        elif trajectory.turns == limits.turns:
            trajectory.ended = "max turns"
        else:
            trajectory.messages += self.form.results(turn, await self._results(trajectory, turn, place))

    def _read(self, sampled: Sampled, prompt: list[int]) -> TurnCalls:
        if sampled.message is not None:
            return self.form.of_message(sampled.message)
        end = next((t for t, token in enumerate(sampled.ids) if token in self.stops), len(sampled.ids))
        text = self.template.tokenizer.decode(
            sampled.ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return self.form.read(text, sampled.ids, prompt)

    async def _sampled(self, prompt: list[int], messages: list[Message]) -> Sampled:
        try:
            if isinstance(self.backend, Speaker):
                return await self.backend.answer(messages, self.form.schemas, self.limits.new_tokens)
            return await self.backend.sample(prompt, self.limits.new_tokens)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"backend: {type(error).__name__}: {first_line(error)}.") from error

    async def _results(self, trajectory: Trajectory, turn: TurnCalls, place: Place) -> list[str]:
        """The text that comes back for each call, in order: one after another, as each may change the state."""
        if turn.malformed:
            trajectory.calls.append(("", "malformed"))
            return [f"error: the call cannot be read: {turn.malformed}"]
        texts = []
        for call in turn.calls:
            text, ended = await self._called(call, place)
            trajectory.calls.append((call.name, ended))
            texts.append(shortened(text))
        return texts

    async def _called(self, call: Call, place: Place) -> tuple[str, str]:
        tools = self.environments.tools(place.instance)
        function = tools.get(call.name)
        if function is None:
            return f"error: there is no tool {call.name}. There is {', '.join(tools) or 'none'}.", "unknown"
        if wrong := wrong_arguments(call.arguments, self.environments.schemas[call.name]["function"]):
            return f"error: {wrong}", "wrong arguments"
        try:
            result = await self._limited(place, call.name, lambda: function(**call.arguments))
        except UserError:
            raise
        except Hung as error:
            return f"error: {error}", "hung"
        except Exception as error:
            return f"error: {type(error).__name__}: {first_line(error)}", "raised"
        return str(result), result.ended if isinstance(result, Outcome) else "ok"

    async def _judge(self, trajectory: Trajectory, turns: list[SampledTurn], place: Place) -> None:
        """The rewards, of every trajectory that the policy had a turn in."""
        rewards: dict[str, float | None] = {}
        instance = place.instance
        if instance is not None and self.environments.has_reward:
            value = await self._limited(place, "get_reward", instance.get_reward)
            rewards[self.environments.name] = checked_reward("get_reward", value)
        said = trajectory.messages
        prompt, completion = said[: trajectory.prompt_messages], said[trajectory.prompt_messages :]
        ids = [token for turn in turns for token in turn.ids]
        for name, call in self.rewards.calls(trajectory.task, prompt, completion, ids, instance).items():
            rewards[name] = await self._limited(place, name, call)
        trajectory.rewards, trajectory.reward = rewards, self.rewards.total(rewards)

    async def _limited(self, place: Place, name: str, function: Callable[[], Any]) -> Any:
        """What the function returns, or raises, in the place's thread; after a Hung that is another one. Raises
        UserError after many of these."""
        try:
            async with self.slots:
                return await place.worker.call(name, function, self.limits.seconds)
        except Hung as error:
            place.worker.close()
            self.hung[:] = [(n, thread) for n, thread in self.hung if thread.is_alive()] + [(name, place.worker.thread)]
            if len(self.hung) >= HUNG:
                names = ", ".join(sorted({n for n, _ in self.hung}))
                raise UserError(f"environment: {HUNG} calls of {names} have not returned.", "environment") from error
            place.worker, place.lost = Worker(), True
            raise


def shortened(text: str, characters: int = RESULT_CHARACTERS) -> str:
    """A result as the policy sees it."""
    half = characters // 2
    if len(text) <= 2 * half:
        return text
    return f"{text[:half]}\n… {len(text) - 2 * half} characters left out …\n{text[-half:]}"
