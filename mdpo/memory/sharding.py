"""How a run is spread over devices, as far as memory goes: an accelerate file's processes and DeepSpeed settings."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mdpo.config.deepspeed_file import KEY
from mdpo.config.parsing import ROOT
from mdpo.errors import UserError
from mdpo.memory.zero import OVERLAP, SECONDARY, ZeroSizes, of_engine, planned_file
from mdpo.ranks import row_ranks

STAGES = {0: "no sharding", 2: "ZeRO-2", 3: "ZeRO-3"}
# Keys of `deepspeed_config` in an accelerate file that change nothing in a step's memory.
WITHOUT_EFFECT = {"deepspeed_multinode_launcher", "deepspeed_hostfile", "deepspeed_exclusion_filter"}
WITHOUT_EFFECT |= {"deepspeed_inclusion_filter", "gradient_accumulation_steps", "gradient_clipping"}
WITHOUT_EFFECT |= {"zero3_init_flag", "zero3_save_16bit_model"}
# What is read, and an accelerate file's names for it.
OF_ACCELERATE = {
    "stage": "zero_stage",
    "offload_optimizer": "offload_optimizer_device",
    "offload_param": "offload_param_device",
}


@dataclass(frozen=True)
class Sharding:
    """`stage` 0 (none), 2 or 3; `processes` of all machines together; what waits in CPU memory; `precision` as the
    launcher says: no, bf16 or fp16; `cpu`: no GPU at all; `overlap`: gradients are reduced while backward runs;
    `row_ranks` processes share each row (sequence parallel); within each `secondary` of them the weights are whole once
    more (ZeRO++), 1 is none."""

    stage: int = 0
    processes: int = 1
    machines: int = 1
    offload_optimizer: bool = False
    offload_param: bool = False
    precision: str = "no"
    cpu: bool = False
    overlap: bool = True
    row_ranks: int = 1
    secondary: int = 1
    sizes: ZeroSizes = ZeroSizes()

    @classmethod
    def read(cls, path: str | Path, processes: int | None = None) -> "Sharding":
        """From an accelerate file; `processes` as `accelerate launch --num_processes` has it. Raises UserError that
        names what cannot be planned."""
        raw = _mapping(path)
        kind, engine = str(raw.get("distributed_type", "NO")).upper(), raw.get("deepspeed_config") or {}
        if kind not in ("NO", "MULTI_GPU", "MULTI_CPU", "DEEPSPEED"):
            reason = f"{kind} cannot be planned; DEEPSPEED, MULTI_GPU or NO can."
            raise UserError(f"{path}: distributed_type: {reason}", "distributed_type")
        if processes is not None and processes < 1:
            raise UserError(f"--processes: {processes} is out of range; give a whole number >= 1.")
        n = processes or int(raw.get("num_processes") or 1)
        machines = int(raw.get("num_machines") or 1)
        if n % machines:
            raise UserError(f"{path}: {n} processes do not divide among {machines} machines.", "num_machines")
        if kind == "NO" and n > 1 and not raw.get("use_cpu"):
            raise UserError(f"{path}: distributed_type: NO is one process, not {n}.", "distributed_type")
        options: dict[str, Any] = {}
        if kind == "DEEPSPEED":
            zero = planned_file(path, raw, n, n // machines) if KEY in engine else _as_zero_optimization(path, engine)
            _refuse(path, zero, {} if KEY in engine else OF_ACCELERATE)
            options = of_engine(zero)
        return cls(
            processes=n,
            machines=machines,
            precision=str(raw.get("mixed_precision", "no")).lower(),
            cpu=bool(raw.get("use_cpu", False)),
            row_ranks=_row_ranks(path, raw, n),
            **options,
        )

    @classmethod
    def running(cls, accelerator, machines: int = 1) -> "Sharding":
        """Of a run that has begun."""
        plugin = accelerator.state.deepspeed_plugin
        return cls(
            processes=accelerator.num_processes,
            machines=machines,
            precision=accelerator.mixed_precision,
            cpu=accelerator.device.type == "cpu",
            row_ranks=row_ranks(),
            **of_engine(plugin.deepspeed_config["zero_optimization"] if plugin else {}),
        )

    def __str__(self) -> str:
        device = "CPU process" if self.cpu else "GPU"
        words = [f"{self.processes} {device}{'es' if self.cpu and self.processes > 1 else ''}"]
        words[0] += "s" if self.processes > 1 and not self.cpu else ""
        words += [f"on {self.machines} machines"] if self.machines > 1 else []
        sharded = STAGES[self.stage] if self.processes > 1 or self.stage else ""
        offloaded = " and ".join(
            w for w, on in (("optimizer", self.offload_optimizer), ("weights", self.offload_param)) if on
        )
        rows = f"{self.row_ranks} for each row" if self.row_ranks > 1 else ""
        in_cpu = f"{offloaded} in CPU memory" if offloaded else ""
        again = f"weights whole within {self.secondary} of them" if self.secondary > 1 else ""
        return ", ".join(part for part in (" ".join(words), rows, sharded, again, in_cpu) if part)


def overlap_reduction(plugin) -> str | None:
    """Lets ZeRO-2 reduce gradients while backward runs, unless the configuration of `plugin`, accelerate's
    DeepSpeedPlugin or None, says something about it. DeepSpeed does so by itself under ZeRO-3 only, and an accelerate
    file has no key for it. Returns a line on what was set, or None."""
    zero = plugin.deepspeed_config["zero_optimization"] if plugin is not None else {}
    if zero.get("stage") != 2 or OVERLAP in zero:
        return None
    zero[OVERLAP] = True
    return "ZeRO-2: gradients are reduced while backward runs (overlap_comm: true)"


def secondary_line(plugin, processes: int) -> str | None:
    """What ZeRO++'s secondary partition does in a run under `plugin`, accelerate's DeepSpeedPlugin or None; None
    without one."""
    size = of_engine(plugin.deepspeed_config.get("zero_optimization") or {})["secondary"] if plugin else 1
    if size <= 1:
        return None
    if size >= processes:
        return f"warning: {SECONDARY}: {size} are all {processes} processes: it takes memory and saves nothing."
    return (
        f"ZeRO++: from a step's first forward pass to the optimizer's step, weights are gathered within {size} "
        f"neighboring ranks ({SECONDARY})"
    )


def _mapping(path: str | Path) -> dict:
    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        files = ", ".join(sorted(os.path.relpath(p) for p in (ROOT / "training_configs").glob("*.yaml")))
        message = f"{path}: cannot be read ({error.strerror}). Accelerate files here: {files}."
        raise UserError(message, "accelerate file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not valid YAML: {error}", "accelerate file") from None
    if not isinstance(raw, dict) or "num_processes" not in raw:
        message = f"{path}: is not an accelerate file (no num_processes). A recipe goes first, without a flag."
        raise UserError(message, "num_processes")
    return raw


def _row_ranks(path: str | Path, raw: dict, processes: int) -> int:
    """Of parallelism_config, which may say nothing else."""
    sizes = {
        key.removeprefix("parallelism_config_"): size for key, size in (raw.get("parallelism_config") or {}).items()
    }
    if other := [
        key for key, size in sizes.items() if key.endswith("_size") and key != "sp_size" and size not in (None, 1)
    ]:
        raise UserError(f"{path}: parallelism_config: {other[0]} cannot be planned; sp_size can.", "parallelism_config")
    size = int(sizes.get("sp_size") or 1)
    if processes % size:
        raise UserError(
            f"{path}: parallelism_config: sp_size {size} does not divide {processes} processes.", "parallelism_config"
        )
    return size


def _as_zero_optimization(path: str | Path, engine: dict) -> dict[str, Any]:
    """The keys of `deepspeed_config` in an accelerate file in DeepSpeed's own form."""
    if unknown := sorted(
        set(engine) - set(OF_ACCELERATE.values()) - WITHOUT_EFFECT - {k for k in engine if k.endswith("_nvme_path")}
    ):
        reason = f"deepspeed_config.{unknown[0]} cannot be planned; leave it out to plan without it."
        raise UserError(f"{path}: {reason}", unknown[0])
    offload = {part: {"device": engine.get(OF_ACCELERATE[part])} for part in ("offload_optimizer", "offload_param")}
    return {"stage": int(engine.get("zero_stage", 2)), **offload}


def _refuse(path: str | Path, zero: dict[str, Any], names: dict[str, str]) -> None:
    """Raises UserError for what cannot be planned. `names` has what the file calls a key, where that is not DeepSpeed's
    name."""
    stage, key = int(zero.get("stage", 0)), names.get("stage", "stage")
    if stage not in (2, 3):
        raise UserError(f"{path}: {key}: ZeRO-{stage} cannot be planned; ZeRO-2 and ZeRO-3 can.", key)
    for part in ("offload_optimizer", "offload_param"):
        device, key = (zero.get(part) or {}).get("device") or "none", names.get(part, part)
        if device not in ("none", "cpu"):
            raise UserError(f"{path}: {key}: {device} cannot be planned; none and cpu can.", key)
        if device == "cpu" and part == "offload_param" and stage != 3:
            raise UserError(f"{path}: {key}: DeepSpeed takes it under ZeRO-3 only.", key)
