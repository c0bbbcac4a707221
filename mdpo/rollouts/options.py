"""How a policy is sampled, as a command line or a recipe says it."""

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from mdpo.errors import UserError
from mdpo.rollouts.server_commands import served_words

AUTO = 0  # processes: as many as fit the device
IN_FLIGHT = 64  # conversations at a time: each one that waits for a tool leaves its place in the batch to another


@dataclass(frozen=True)
class SamplingOptions:
    """Without `environment` and `tools` the tasks are maths: Python blocks are run in the sandbox, and `answer` is
    compared."""

    save: Path
    instruction: str = ""
    environment: str | None = None  # path/to/file.py:Class or module:Class
    tools: tuple[str, ...] = ()  # path/to/file.py:function or module:function
    rewards: tuple[str, ...] = ()  # path/to/file.py:function or module:function
    reward_weights: tuple[float, ...] = ()
    tool_calls: str = "auto"  # auto | template | text
    tool_role: str = "user"
    backend: str = "transformers"  # transformers | generate | server | chat
    base_url: tuple[str, ...] = ()
    served_model: str = ""
    serve: str = ""
    servers: int = 1
    gpus_per_server: int | None = None
    processes: int = 1  # or AUTO
    samples: int = 1
    temperature: float = 0.0
    seed: int = 42
    max_turns: int = 6
    max_new_tokens: int = 512
    code_seconds: float = 10.0
    tool_seconds: float = 60.0
    in_flight: int | None = None  # 64, with servers or processes for each of them
    tools_at_once: int | None = None  # of maths the cores, else as many as conversations
    shard: tuple[int, int] = (0, 1)
    isolated: bool = True

    @property
    def places(self) -> int:
        """Conversations at a time."""
        return self.in_flight or IN_FLIGHT * max(self.servers, len(self.base_url), self.processes)

    @property
    def slots(self) -> int:
        """Calls of tools, resets and rewards at a time. More programs than cores would spend their own time limits
        waiting; what else a tool does, most wait: for a server, a container, a judge."""
        own = self.environment or self.tools
        return self.tools_at_once or (self.places if own else len(os.sched_getaffinity(0)))


def listed(kind: type) -> Callable[[str], tuple]:
    def read(text: str) -> tuple:
        return tuple(kind(part) for part in text.split(","))

    read.__name__ = f"{kind.__name__},…"
    return read


def number_or_auto(text: str) -> int:
    if text == "auto":
        return AUTO
    if (number := int(text)) < 1:
        raise ValueError(text)
    return number


def shard(text: str) -> tuple[int, int]:
    k, n = map(int, text.split("/"))
    if not 0 <= k < n:
        raise ValueError(text)
    return k, n


HOW = (
    "transformers batches continuously; generate in rounds, for any model; server asks vLLM or SGLang; chat any "
    "server, for text without token ids"
)
SERVED = ("server", "chat")  # backends of servers
ROLLOUTS = {  # option: (type or choices, least value, help); the defaults are those of SamplingOptions
    "save": (
        Path,
        None,
        "file for trajectories (default CHECKPOINT/trajectories.jsonl, with --shard trajectories-K-of-N)",
    ),
    "environment": (str, None, "path/to/file.py:Class or module:Class"),
    "tools": (listed(str), None, "functions to call, path/to/file.py:function or module:function"),
    "rewards": (listed(str), None, "reward functions of TRL's form, path/to/file.py:function or module:function"),
    "reward_weights": (
        listed(float),
        None,
        "a number for each reward function, of maths math-verify's first; 1 where not given",
    ),
    "tool_calls": (("auto", "template", "text"), None, "how the policy writes calls; needs --environment or --tools"),
    "instruction": (str, None, "text in front of each question, with an empty line between"),
    "max_turns": (int, 1, "turns of the model in a conversation, at most"),
    "max_new_tokens": (int, 1, "tokens in a turn, at most"),
    "in_flight": (int, 1, f"conversations at a time, at most (default {IN_FLIGHT}, for each server or process)"),
    "tools_at_once": (
        int,
        1,
        "calls of tools, resets and rewards at a time, at most (default: as many as conversations; of maths the cores)",
    ),
    "backend": (("transformers", "generate", *SERVED), None, HOW),
    "base_url": (listed(str), None, "of servers that serve CHECKPOINT, such as http://127.0.0.1:8000/v1"),
    "served_model": (str, None, "what the servers call CHECKPOINT (default: as it is written here)"),
    "serve": (str, None, "in place of --base_url: starts servers by this command, with {model} and {port} in it"),
    "servers": (int, 1, "servers that --serve starts"),
    "gpus_per_server": (int, 1, "each server has that many of the GPUs (default: its environment is as it is)"),
    "processes": (
        number_or_auto,
        None,
        "that generate: each has a GPU of its own, or its share of a CPU's threads; auto: one a GPU, two on a CPU",
    ),
    "temperature": (float, 0, "0 takes the most likely token"),
    "samples": (int, 1, "conversations for each task; needs a temperature"),
    "seed": (int, 0, "seed of sampling; what joins a batch when depends on the machine"),
    "shard": (shard, None, "K/N: every N-th task from the K-th on, from 0"),
    "tool_role": (("user", "tool"), None, "role of results in text; M-DPO's data has user"),
    "code_seconds": (float, 0.1, "time limit of a program"),
    "tool_seconds": (
        float,
        0.1,
        "time limit of a tool, of an environment's start and reset, and of a reward; of maths code_seconds and 30 "
        "more at least",
    ),
}

OF_SERVERS = ("base_url", "served_model", "serve", "servers", "gpus_per_server")
# Keys of a recipe that sampling reads too.
OF_RECIPE = ("dtype", "chat_template", "chat_template_kwargs", "tokenizer_name_or_path", "attn_implementation")
NOT_OF_A_TRAJECTORY = (
    "save",
    "in_flight",
    "tools_at_once",
    "shard",
    "samples",
    "processes",
    *OF_SERVERS,
)  # options that change nothing in one
OF_MATHS = "with --environment or --tools"
SAMPLED = ("samples", "seed")  # need a temperature
DEFAULTS = {field.name: field.default for field in fields(SamplingOptions)}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--allow_unisolated_code", action="store_true", help="see above")
    for key, (kind, _, text) in ROLLOUTS.items():
        default = DEFAULTS[key]
        text += "" if default in (MISSING, None, "", (), (0, 1)) else f" (default {default})"
        takes: dict[str, Any] = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        parser.add_argument(f"--{key}", help=text, **takes)


def read_options(args: argparse.Namespace, save: Path) -> SamplingOptions:
    """`save` is the default of that option. Raises UserError, also for options that would have no effect."""
    given = {name: value for name in ROLLOUTS if (value := getattr(args, name)) is not None}
    named = [*given, *(["allow_unisolated_code"] if args.allow_unisolated_code else [])]
    for names, effect, without in (
        (SAMPLED, args.temperature, "at temperature 0; set --temperature"),
        (("base_url", "served_model", "serve"), args.backend in SERVED, "without --backend server"),
        (("servers", "gpus_per_server"), args.serve, "without --serve"),
        (("processes",), args.backend not in SERVED, f"with --backend {args.backend}; see --servers"),
        (
            ("seed",),
            args.backend not in SERVED,
            f"with --backend {args.backend}, as each of its samples would be the same",
        ),
        (("tool_calls",), args.environment or args.tools, "without --environment or --tools"),
        (("code_seconds", "allow_unisolated_code"), not (args.environment or args.tools), OF_MATHS),
    ):
        if not effect and (unused := [name for name in named if name in names]):
            raise UserError(f"--{unused[0]}: has no effect {without}.")
    for name, value in given.items():
        least = ROLLOUTS[name][1]
        if least is not None and not least <= value < float("inf"):
            raise UserError(f"--{name}: {value} is out of range; give a number >= {least}.")
    if args.backend in SERVED and bool(args.base_url) == bool(args.serve):
        raise UserError(f"--base_url: --backend {args.backend} needs an address, or --serve, not both.")
    if args.serve:
        served_words(args.serve)
    return SamplingOptions(**{"save": save, **given}, isolated=not args.allow_unisolated_code)


def flags(options: dict[str, Any]) -> list[str]:
    """A switch without a value where the option is true; none where it is false or null."""
    given = {name: value for name, value in options.items() if value is not False and value is not None}
    return [f"--{name}" if value is True else f"--{name}={_text(value)}" for name, value in given.items()]


def keys(train: dict[str, Any]) -> list[str]:
    """Keys of a recipe as flags."""
    return [f"--{key}={json.dumps(value) if isinstance(value, list) else _text(value)}" for key, value in train.items()]


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return json.dumps(value) if isinstance(value, dict | bool) or value is None else str(value)
