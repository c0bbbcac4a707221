"""What DeepSpeed's configuration says of memory: its sizes, and a deepspeed_config_file that can be planned."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mdpo.config.deepspeed_file import (
    KEY,
    deepspeed_file,
    read_deepspeed_file,
    refuse_beside,
    refuse_secondary,
    refuse_strangers,
)
from mdpo.errors import UserError

BUCKET = 500_000_000  # elements: reduce_bucket_size
LIVE = 1_000_000_000  # elements: stage3_max_live_parameters, and what it may fetch ahead of its use
OVERLAP, SECONDARY = "overlap_comm", "zero_hpz_partition_size"  # keys of zero_optimization


@dataclass(frozen=True)
class ZeroSizes:
    """In elements, with DeepSpeed's defaults: a bucket of gradients; gathered weights that stay before they are
    released, and those kept as they are used again soon; what ZeRO-3's optimizer steps on at a time; ZeRO-3 shards no
    parameter below `whole`."""

    bucket: int = BUCKET
    live: int = LIVE
    reused: int = LIVE
    sub_group: int = 1_000_000_000
    whole: int = 100_000

    @property
    def gathered(self) -> int:
        return max(self.live, self.reused)


SIZES = {
    "bucket": "reduce_bucket_size",
    "live": "stage3_max_live_parameters",
    "reused": "stage3_max_reuse_distance",
    "sub_group": "sub_group_size",
    "whole": "stage3_param_persistence_threshold",
}
# Keys of a DeepSpeed file that change nothing in a step's memory: the recipe fills most of them in.
OF_THE_RECIPE = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"}
OF_THE_RECIPE |= {"gradient_clipping", "steps_per_print", "wall_clock_breakdown", "zero_allow_untested_optimizer"}
PRECISION = {
    "bf16": {"enabled"},
    "fp16": {"enabled", "auto_cast", "loss_scale", "loss_scale_window", "initial_scale_power", "hysteresis",
             "min_loss_scale", "consecutive_hysteresis"},
}  # fmt: skip
# Of zero_optimization: without effect on memory, and those that are planned at this value alone, DeepSpeed's own.
WITHOUT_EFFECT = {"stage3_gather_16bit_weights_on_model_save", "stage3_prefetch_bucket_size"}
PLANNED_AT = {
    "contiguous_gradients": True,
    "reduce_scatter": True,
    "allgather_partitions": True,
    "allgather_bucket_size": 500_000_000,
    "round_robin_gradients": False,
    "zero_quantized_weights": False,
    "zero_quantized_nontrainable_weights": False,
    "zero_quantized_gradients": False,
}
OF_OFFLOADING = {"device", "pin_memory", "nvme_path"}


def planned_file(accelerate: str | Path, raw: dict[str, Any], processes: int, of_machine: int) -> dict[str, Any]:
    """`zero_optimization` of the DeepSpeed file that the accelerate file `raw` names. Raises UserError that names the
    file and what in it cannot be planned."""
    refuse_strangers(raw["deepspeed_config"], str(accelerate))
    path = deepspeed_file(raw["deepspeed_config"][KEY], accelerate)
    refuse_beside([*raw["deepspeed_config"], *(key for key in raw if key == "mixed_precision")], str(accelerate))
    engine = read_deepspeed_file(path)
    zero = engine["zero_optimization"]
    _known(path, engine, {*OF_THE_RECIPE, *PRECISION, "zero_optimization"})
    for key, known in PRECISION.items():
        _known(path, engine.get(key) or {}, known, f"{key}.")
    offload = {part: zero.get(f"offload_{part}") or {} for part in ("optimizer", "param")}
    own = {"stage", OVERLAP, SECONDARY, *SIZES.values(), *(f"offload_{part}" for part in offload)}
    for key, value in PLANNED_AT.items():
        if zero.get(key, value) != value:
            raise UserError(f"{path}: zero_optimization.{key}: {zero[key]} cannot be planned; {value} can.", key)
    _known(path, zero, own | WITHOUT_EFFECT | set(PLANNED_AT), "zero_optimization.")
    for part, options in offload.items():
        _known(path, options, OF_OFFLOADING, f"zero_optimization.offload_{part}.")
    for key in SIZES.values():
        if key in zero and not _count(zero[key]):
            raise UserError(f"{path}: zero_optimization.{key}: {zero[key]} cannot be planned; a number can.", key)
    refuse_secondary(zero, processes, of_machine)
    return zero


def of_engine(zero: dict[str, Any]) -> dict[str, Any]:
    """Arguments of Sharding, of a `zero_optimization`; sizes that are no numbers (yet) count as DeepSpeed's own."""
    sizes = {name: int(zero[key]) for name, key in SIZES.items() if _count(zero.get(key))}
    devices = {part: (zero.get(f"offload_{part}") or {}).get("device") or "none" for part in ("optimizer", "param")}
    return {
        "stage": int(zero.get("stage", 0)),
        "offload_optimizer": devices["optimizer"] == "cpu",
        "offload_param": devices["param"] == "cpu",
        "overlap": bool(zero.get(OVERLAP, True)),
        "secondary": int(zero.get(SECONDARY, 1)),
        "sizes": ZeroSizes(**sizes),
    }


def _count(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


def _known(path: Path, given: dict[str, Any], known: set[str], inside: str = "") -> None:
    if unknown := sorted(set(given) - known):
        raise UserError(f"{path}: {inside}{unknown[0]} cannot be planned; leave it out to plan without it.", unknown[0])
