"""What the launcher asked for, and whether this machine's GPUs can be used at all."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import torch
import yaml
from accelerate.commands.config.config_args import default_config_file

from mdpo.config.parallelism import ADVICE
from mdpo.console import first_line
from mdpo.errors import UserError
from mdpo.ranks import row_ranks

CPU_FLAGS = {"--cpu", "--use_cpu"}
SCRIPT = "run_dpo.py"  # what comes behind it is ours, not the launcher's
DRIVER = Path("/proc/driver/nvidia/version")


def refuse_unusable_gpus(use_cpu: bool) -> list[str]:
    """Raises UserError where a run that is meant for GPUs would silently train on the CPU: where it is started by
    DeepSpeed or in several processes, while torch can use no GPU. One process beside an NVIDIA driver gets a line.
    `use_cpu` is the recipe's; the accelerate file, the launcher's flags and CUDA_VISIBLE_DEVICES='' ask for the CPU
    too."""
    asked = use_cpu or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if asked or torch.accelerator.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return []
    driver = nvidia_driver()
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"
    if not (deepspeed or int(os.environ.get("WORLD_SIZE", "1")) > 1):
        return [f"warning: training on the CPU: {_torch_says(driver)}"] if driver else []
    file, asked = launch_request()
    if asked:
        return []
    wants = f"{file} says use_cpu: false" if file else "This launch has DeepSpeed or several processes"
    raise UserError(
        f"{wants}, but torch can use no GPU here: {_torch_says(driver)} Install a torch that is built for this "
        "driver's CUDA (see docs/clusters.md), or newer drivers. To train on the CPU all the same, take "
        "training_configs/cpu.yaml, zero2_cpu.yaml or zero3_cpu.yaml, or set use_cpu: true.",
        key="use_cpu",
    )


def device_line(args) -> str:
    """Where a run computes: `device: 8 × NVIDIA H100 80GB HBM3 (cuda), ZeRO-2`."""
    name = f"{torch.cuda.get_device_name(args.device)} ({args.device.type})" if args.device.type == "cuda" else ""
    plugin = args.deepspeed_plugin
    sharded = f", ZeRO-{plugin.zero_stage}" if plugin is not None else ""
    rows = f", {row_ranks()} of them for each row" if row_ranks() > 1 else ""
    return f"device: {args.world_size} × {name or args.device.type}{sharded}{rows}"


def _torch_says(driver: str | None) -> str:
    built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
    reason = ""
    if torch.version.cuda:
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            reason = f" ({first_line(error)})"
    return f"torch {torch.__version__} {built}, NVIDIA driver: {driver or 'none found'}{reason}."


def nvidia_driver() -> str | None:
    """The version of the NVIDIA kernel driver, such as 580.65.06; None without one."""
    try:
        words = DRIVER.read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        return None
    return next((word for word in words if word[:1].isdigit() and "." in word), "of unknown version")


def launch_request() -> tuple[str | None, bool]:
    """(the accelerate file of the launcher that this process descends from, None without one; whether that file or the
    launcher's flags ask for the CPU). Under DeepSpeed the launcher does not pass `use_cpu` on, so it is looked up."""
    path, settings, flags = _launch()
    return path, bool(CPU_FLAGS & set(flags)) or bool(settings.get("use_cpu"))


def refuse_parallel_launch() -> None:
    """Raises UserError where the accelerate file or the launcher's flags split sequences or single weights among
    processes and the launcher has not passed it on: every process would train on its own."""
    path, settings, words = _launch()
    if row_ranks() > 1:
        return
    said = settings.get("parallelism_config") or {}
    sizes = [(name, size, path) for name, size in (said.items() if isinstance(said, dict) else ())]
    flags = [(i, word.partition("=")[0]) for i, word in enumerate(words) if word.startswith("--parallelism_config")]
    for name, size, where in sizes + [(flag, _value(words, i), "the launcher's flags") for i, flag in flags]:
        if name.endswith("sp_size") and str(size) not in ("None", "0", "1"):
            raise UserError(
                f"parallelism_config: {name}: {size} in {where}, which the launcher has not passed on. It does so for "
                "a file that has parallelism_config, DEEPSPEED or MULTI_GPU, without --use_deepspeed or --multi_gpu "
                "beside it (training_configs/zero3_sequence_parallel.yaml).",
                "parallelism_config",
            )
        if name.endswith("_size") and str(size) not in ("None", "1"):
            raise UserError(f"parallelism_config: {name}: {size} in {where} {ADVICE}.")


def _launch() -> tuple[str | None, dict, list[str]]:
    """(the accelerate file, its settings, the launcher's own words) of the launcher above this process."""
    for words, folder in _ancestors():
        own = words[: next((i for i, word in enumerate(words) if Path(word).name == SCRIPT), len(words))]
        if not any("accelerate" in word or word == "launch" for word in own):
            continue
        config_file = next((_value(own, i) for i, word in enumerate(own) if word.startswith("--config_file")), None)
        path = Path(folder, config_file or default_config_file)
        try:
            settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError):
            settings = None
        file = config_file or (str(path) if settings else None)
        return file, settings if isinstance(settings, dict) else {}, own
    return None, {}, []


def _value(words: list[str], i: int) -> str | None:
    name, equals, value = words[i].partition("=")
    return value if equals else next(iter(words[i + 1 : i + 2]), None)


def _ancestors() -> Iterator[tuple[list[str], str]]:
    """(command line, working folder) of the processes above this one, the nearest first."""
    with suppress(psutil.Error):  # gone, or another user's
        for process in psutil.Process().parents():
            yield [word for word in process.cmdline() if word], process.cwd()
