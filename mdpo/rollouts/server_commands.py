"""What a server is started with: its command, its GPUs, its port."""

import os
import random
import re
import shlex
import shutil
import socket
from contextlib import suppress

import torch

from mdpo.console import first_line
from mdpo.errors import UserError

PORTS = (20_000, 32_000)  # below those that the kernel gives to clients


def served_words(command: str, model: str = "model", port: int = 0) -> list[str]:
    """A command's words with {model} and {port} filled in. Raises UserError for one that cannot be started."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UserError(f"--serve: {first_line(error)}: {command}", "serve") from None
    if missing := [name for name in ("{model}", "{port}") if name not in command]:
        raise UserError(f"--serve: needs {missing[0]}, in whose place the command gets it: {command}", "serve")
    if not shutil.which(words[0]):
        raise UserError(f"--serve: there is no program {words[0]}.", "serve")
    return [word.replace("{model}", model).replace("{port}", str(port)) for word in words]


def device_groups(count: int, gpus: int, option: str = "gpus_per_server") -> list[dict[str, str]]:
    """CUDA_VISIBLE_DEVICES of each server: the next `gpus` of this process's own. Raises UserError, about `option`,
    where there are fewer. Example: count 2, gpus 2, CUDA_VISIBLE_DEVICES=4,5,6,7 -> 4,5 and 6,7."""
    if not gpus:
        return [{}] * count
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    there = re.findall(r"[^,\s]+", visible) if visible is not None else [*map(str, range(torch.cuda.device_count()))]
    if len(there) < count * gpus:
        raise UserError(f"--{option}: {count} x {gpus} GPUs are asked for where {len(there)} are there.", option)
    return [{"CUDA_VISIBLE_DEVICES": ",".join(there[n * gpus : (n + 1) * gpus])} for n in range(count)]


def free_ports(count: int) -> list[int]:
    """Distinct ports of this machine that nobody listens on now."""
    found, ports = list[int](), random.SystemRandom().sample(range(*PORTS), 1000)
    for port in ports:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise UserError(f"--servers: no {count} free ports between {PORTS[0]} and {PORTS[1]}.", "servers")
