"""The trajectories of a checkpoint. What can fail before weights are loaded fails in `prepare`."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from threading import Thread
from typing import Any

import xxhash
from transformers import AutoConfig, GenerationConfig

from mdpo.config.caches import default_folder
from mdpo.config.recipe import Recipe
from mdpo.console import say
from mdpo.errors import UserError
from mdpo.masking.chat_template import ChatTemplate
from mdpo.masking.dates import NAME as DAY
from mdpo.reference.fingerprint import named_digest
from mdpo.rollouts.answers import gold_answer, refuse_missing_verifier
from mdpo.rollouts.calls import CallForm, call_form
from mdpo.rollouts.chat import Chat
from mdpo.rollouts.continuous import ContinuousBatching
from mdpo.rollouts.driver import ENVIRONMENT, ByEnvironment, Plays, jobs, roll_out
from mdpo.rollouts.environment import Environments, environments_of, load_object
from mdpo.rollouts.episode import Backend, Limits, Player
from mdpo.rollouts.generate import ROUND, Rounds, context_length, refuse_hidden_tool_role, sampling_config, stop_ids
from mdpo.rollouts.load_policy import adapter_config, load_policy
from mdpo.rollouts.options import NOT_OF_A_TRAJECTORY, SERVED, SamplingOptions
from mdpo.rollouts.processes import Processes, counted
from mdpo.rollouts.python_maths import python_tool
from mdpo.rollouts.records import Records, Trajectory
from mdpo.rollouts.rewards import Rewards, right_answer
from mdpo.rollouts.sandbox import Limits as ProgramLimits
from mdpo.rollouts.sandbox import Sandbox
from mdpo.rollouts.server import SLOWEST, TIMEOUT_S, Server, served_context
from mdpo.rollouts.serving import Servers, servable
from mdpo.rollouts.tasks import Task, read_tasks

CODE_START_S = 30.0  # beside a program's own limit: the sandbox's start on a busy machine
ASKED = {"server": Server, "chat": Chat}


@dataclass(frozen=True)
class Prepared:
    options: SamplingOptions
    tasks: list[Task]
    template: ChatTemplate
    # By the name in a task's `environment`, where there are several.
    places: dict[str | None, tuple[Environments, CallForm]]
    rewards: Rewards

    def player(self, backend: Backend, stops: set[int], context: int | None) -> Plays:
        """Raises UserError where no turn fits into the model's context."""
        limits, hung = limits_of(self.options, context), list[tuple[str, Thread]]()
        slots = asyncio.Semaphore(self.options.slots)
        players = {
            name: Player(
                backend,
                self.template,
                stops,
                form,
                environments,
                self.rewards,
                limits,
                hung,
                name and ENVIRONMENT,
                slots,
            )
            for name, (environments, form) in self.places.items()
        }
        named = {name: one for name, one in players.items() if name is not None}
        return ByEnvironment(named) if named else players[None]


def prepare(path: str, options: SamplingOptions, recipe: Recipe, tokenizer) -> Prepared:
    """Reads the tasks, makes an environment, and asks the template. Raises UserError."""
    options = counted(options, recipe.training.device.type)
    template = ChatTemplate(tokenizer, recipe.data.chat_template_kwargs)
    found, rewards, tasks = played_in(path, options)
    kind = options.tool_calls if options.environment or options.tools else "python"
    places = {}
    for name, one in found.items():
        tools = list(one.schemas.values())
        places[name] = one, call_form(kind, tools, template, options.tool_role, options.backend == "chat")
        check_tool_role(places[name][1], template, options.tool_role)
    if not options.isolated:
        say("allow_unisolated_code: the model's programs run with access to this user's files and network.")
    if options.backend == "chat":
        say("backend chat: its trajectories have no token ids: training tokenizes their text again.")
        if recipe.data.chat_template:
            say(
                "backend chat: the server renders prompts with its own chat template; start it with the recipe's, "
                f"{recipe.data.chat_template}, or training has other contexts than it had."
            )
    if not options.save.parent.is_dir():
        raise UserError(f"--save: {options.save} has no folder.")
    return Prepared(options, tasks, template, places, rewards)


def played_in(path: str, options: SamplingOptions) -> tuple[dict[str | None, Environments], Rewards, list[Task]]:
    """(environments by name, rewards, tasks): what needs no tokenizer. Raises UserError."""
    functions = [load_object(spec, "rewards") for spec in options.rewards]
    own = bool(options.environment or options.tools)
    if own:
        loaded = load_object(options.environment, "environment") if options.environment else None
        tools = [load_object(spec, "tools") for spec in options.tools]
        found = environments_of(loaded, tools, options.tool_seconds)
        if not functions and not all(one.has_reward for one in found.values()):
            raise UserError("rewards: the environment has no get_reward; name a reward function.")
    else:
        refuse_missing_verifier()
        sandbox = Sandbox(ProgramLimits(options.code_seconds), namespaces=options.isolated)
        found, functions = environments_of(None, [python_tool(sandbox)]), [right_answer, *functions]
    needs: dict[str, Callable[[Any], Any]] = {} if own else {"answer": gold_answer}
    if None not in found:
        needs[ENVIRONMENT] = partial(known_environment, names=list(found))
    rewards = Rewards(functions, options.reward_weights)
    return found, rewards, read_tasks(path, options.instruction, needs, own_prompts=bool(options.environment))


def known_environment(name: Any, names: list[str | None]) -> None:
    """Raises UserError."""
    if name not in names:
        raise UserError(f"environment: {name!r} is none of {', '.join(map(str, names))}.", "environment")


def check_tool_role(form: CallForm, template: ChatTemplate, role: str) -> None:
    """Raises UserError where the role has no effect, or its messages would not be shown."""
    if not form.schemas:
        refuse_hidden_tool_role(template, role)
    elif role != SamplingOptions.tool_role:
        raise UserError("--tool_role: has no effect where the template has calls of its own; --tool_calls=text.")


def sample(prepared: Prepared, checkpoint: str, recipe: Recipe) -> list[Trajectory]:
    """All trajectories of the tasks, those included that an earlier start has written; weights are loaded only where
    some are missing. Raises UserError."""
    options, shard = prepared.options, prepared.options.shard
    policy = named_digest(checkpoint, None, default_folder()) or checkpoint
    records = Records(options.save, policy, settings_of(prepared, recipe))
    wanted = jobs(prepared.tasks[shard[0] :: shard[1]], options.samples, options.places)
    if not wanted:
        raise UserError("--shard: has no task of the file.")
    if missing := records.missing(wanted):
        # No process without a conversation.
        prepared = replace(prepared, options=replace(options, processes=min(options.processes, len(missing))))
        seed = options.seed + len(records.done)  # after a kill the same noise would give copies
        with backend_of(checkpoint, recipe, prepared, seed) as (backend, stops, context):
            player = prepared.player(backend, stops, context)
            roll_out(player, wanted, records, options.places)
    order = {(task.key, sample): n for n, (task, sample) in enumerate(wanted)}
    return sorted(records.done, key=lambda t: order[t.key, t.sample])


@contextmanager
def backend_of(
    checkpoint: str, recipe: Recipe, prepared: Prepared, seed: int
) -> Iterator[tuple[Backend, set[int], int | None]]:
    """(The backend, the ids that end a turn, the tokens of the model's context). Raises UserError."""
    options, template = prepared.options, prepared.template
    if options.backend in SERVED:
        source = recipe.model.model_name_or_path if adapter_config(checkpoint) else checkpoint
        config = AutoConfig.from_pretrained(source, trust_remote_code=recipe.training.trust_remote_code)
        stops = stop_ids(_generation_config(source), template)
        vocabulary = max(template.tokenizer.get_vocab().values()) + 1
        with served(checkpoint, recipe, options) as (name, addresses, own):
            timeout = max(TIMEOUT_S, options.max_new_tokens / SLOWEST)
            arguments = (addresses, name, stops, vocabulary, options.temperature)
            more = {"timeout_s": timeout, "own": own}
            if options.backend == "chat":
                more["template_kwargs"] = {name: v for name, v in template.kwargs.items() if name != DAY}
            with ASKED[options.backend](*arguments, **more) as server:
                listed = options.backend == "server"  # transformers serve lists what is in its cache alone
                served_lengths = [served_context(address, name, listed) for address in addresses]
                lengths = [context_length(config), *served_lengths]
                yield server, stops, min((n for n in lengths if n), default=None)
        return
    if options.processes > 1:
        with Processes(checkpoint, recipe, options, seed) as backend:
            yield backend, backend.stops, backend.context
        return
    with loaded(checkpoint, recipe, template, options, seed) as found:
        yield found


@contextmanager
def loaded(
    checkpoint: str, recipe: Recipe, template: ChatTemplate, options: SamplingOptions, seed: int
) -> Iterator[tuple[Backend, set[int], int | None]]:
    """What `backend_of` gives, of a policy in this process."""
    model = load_policy(checkpoint, recipe)
    stops = stop_ids(model.generation_config, template)
    sampling = sampling_config(stops, template.tokenizer.pad_token_id, options.temperature)
    if options.backend == "generate":
        own: Any = Rounds(model, sampling, seed, options.in_flight or ROUND)
    else:
        own = ContinuousBatching(model, sampling, seed, 1 / options.processes)
    with own as backend:
        yield backend, stops, context_length(model.config)


@contextmanager
def served(
    checkpoint: str, recipe: Recipe, options: SamplingOptions
) -> Iterator[tuple[str, list[str], Servers | None]]:
    """(What servers call the checkpoint, their addresses, those of them that were started here). Raises UserError."""
    if not options.serve:
        yield options.served_model or checkpoint, list(options.base_url), None
        return
    with servable(checkpoint, recipe, options.save) as model:
        with Servers(options.serve, model, options.save, options.servers, options.gpus_per_server or 0) as own:
            yield options.served_model or model, list(own.by_address), own


def _generation_config(checkpoint: str) -> GenerationConfig | None:
    try:
        return GenerationConfig.from_pretrained(checkpoint)
    except OSError:  # it has none
        return None


def limits_of(options: SamplingOptions, context: int | None) -> Limits:
    """Raises UserError where no turn fits into the model's context."""
    if context and options.max_new_tokens >= context:
        raise UserError(f"--max_new_tokens: {options.max_new_tokens} leaves no room in a context of {context} tokens.")
    own = options.environment or options.tools
    seconds = options.tool_seconds if own else max(options.tool_seconds, options.code_seconds + CODE_START_S)
    return Limits(options.max_turns, options.max_new_tokens, context, seconds)


def settings_of(prepared: Prepared, recipe: Recipe) -> dict[str, Any]:
    """What a trajectory depends on beside its task and the policy."""
    template = prepared.template
    settings = {name: value for name, value in asdict(prepared.options).items() if name not in NOT_OF_A_TRAJECTORY}
    settings |= {name: list(value) for name, value in settings.items() if isinstance(value, tuple)}  # as JSON has them
    written = xxhash.xxh3_64_hexdigest(f"{template.tokenizer.chat_template} {sorted(template.kwargs.items())}".encode())
    calls = ", ".join(sorted({type(form).__name__ for _, form in prepared.places.values()}))
    dtype = str(recipe.model.dtype)
    day = {DAY: template.kwargs[DAY]} if DAY in template.kwargs else {}
    return {**settings, "tool_calls": calls, "chat_template": written, "dtype": dtype, **day}
