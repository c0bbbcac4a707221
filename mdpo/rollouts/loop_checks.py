"""What would stop a loop only hours later, asked before its first stage."""

from pathlib import Path
from typing import Any

import torch
import yaml

from mdpo.config.loop import Loop
from mdpo.errors import UserError
from mdpo.rollouts.iterations import OF_LAUNCH
from mdpo.rollouts.options import SamplingOptions
from mdpo.rollouts.processes import counted
from mdpo.rollouts.sampling import played_in
from mdpo.rollouts.server_commands import device_groups
from mdpo.runs.run_fingerprint import FREE


def recipe_keys(written: dict[str, Any]) -> dict[str, Any]:
    """Of what a recipe says (and a loop's `train`), the keys that a stage's result depends on, as plain JSON data."""
    plain = (str, int, float, bool, list, dict, type(None))
    kept = {key: value for key, value in written.items() if key not in FREE}
    return {key: value if isinstance(value, plain) else str(value) for key, value in kept.items()}


def refuse_missing(loop: Loop, *keys: str) -> None:
    """Raises UserError."""
    for key in keys:
        path = getattr(loop, key)
        if path is not None and not Path(path).is_file():
            raise UserError(f"{key}: there is no file {path}.", key)


def launch_keys(loop: Loop) -> dict[str, Any]:
    """Of the accelerate file what results of training depend on."""
    said = _said(loop)
    return {key: said[key] for key in OF_LAUNCH if key in said}


def _said(loop: Loop) -> dict[str, Any]:
    if loop.accelerate_config is None:
        return {}
    said = yaml.safe_load(Path(loop.accelerate_config).read_text(encoding="utf-8"))
    return said if isinstance(said, dict) else {}


def check_launch(loop: Loop) -> None:
    """Raises UserError for an accelerate file that a loop, which starts one launcher on this machine, cannot use."""
    if loop.accelerate_config is None:
        return
    said = _said(loop)
    where = f"accelerate_config: {loop.accelerate_config}"
    if (machines := said.get("num_machines") or 1) != 1:
        raise UserError(
            f"{where}: num_machines is {machines}; a loop runs on one. Run its stages by hand, as they are printed, "
            "and training with scripts/launch.slurm.",
            "accelerate_config",
        )
    if loop.sft and said.get("parallelism_config"):
        raise UserError(
            f"{where}: parallelism_config is for M-DPO, and SFT is trl's. Make SFT by itself and give its model as "
            "the recipe's, without sft.",
            "accelerate_config",
        )
    processes, gpus = said.get("num_processes") or 1, torch.cuda.device_count()
    if gpus and not said.get("use_cpu") and processes > gpus:
        raise UserError(
            f"{where}: num_processes is {processes}, and {gpus} GPUs are there. Set it to {gpus}.", "accelerate_config"
        )


def check_sampling(name: str, tasks: str, options: SamplingOptions, device: str) -> None:
    """Raises UserError for what sampling would refuse before it loads weights, of the section `name`, on a `device`
    such as "cuda", and for servers that cannot have the loop's policies."""
    if options.base_url:
        raise UserError(
            f"{name}: base_url: a server that is there serves one policy, and each iteration has another. Give serve, "
            "which starts servers of each.",
            name,
        )
    try:
        counted(options, device)
        if device == "cuda":
            device_groups(options.servers, options.gpus_per_server or 0)
    except UserError as error:
        raise UserError(f"{name}: {str(error).removeprefix('--')}", error.key) from None
    played_in(tasks, options)
