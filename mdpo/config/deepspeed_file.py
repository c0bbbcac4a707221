"""A whole DeepSpeed configuration (deepspeed_config_file) in place of an accelerate file's keys: found from any folder;
what in it contradicts the recipe, or has never been run here, is refused by name."""

import json
import os
from pathlib import Path
from typing import Any

from mdpo.config.parsing import ROOT
from mdpo.errors import UserError

KEY = "deepspeed_config_file"
FILE, FIELDS = "ACCELERATE_DEEPSPEED_CONFIG_FILE", "ACCELERATE_CONFIG_DS_FIELDS"  # what accelerate's launcher passes on
# Keys of an accelerate file that accelerate refuses beside a DeepSpeed file, and what says the same in that one.
BESIDE = {
    "mixed_precision": 'bf16: {"enabled": "auto"}, as the recipe says',
    "gradient_accumulation_steps": 'gradient_accumulation_steps: "auto"',
    "gradient_clipping": 'gradient_clipping: "auto"',
    "zero_stage": "zero_optimization.stage",
    "offload_optimizer_device": "zero_optimization.offload_optimizer.device",
    "offload_optimizer_nvme_path": "zero_optimization.offload_optimizer.nvme_path",
    "offload_param_device": "zero_optimization.offload_param.device",
    "offload_param_nvme_path": "zero_optimization.offload_param.nvme_path",
    "zero3_save_16bit_model": "zero_optimization.stage3_gather_16bit_weights_on_model_save",
}
# What accelerate reads under deepspeed_config; any other key it passes over without a word.
OF_ACCELERATE = {KEY, *BESIDE, "zero3_init_flag", "deepspeed_hostfile", "deepspeed_multinode_launcher"}
OF_ACCELERATE |= {"deepspeed_exclusion_filter", "deepspeed_inclusion_filter", "deepspeed_moe_layer_cls_names"}
KERNELS = "with kernels for NVIDIA GPUs alone, which have not been run here"
# Keys of zero_optimization that are refused, and why.
UNTESTED = {
    "zero_quantized_weights": f"log-probs would be those of weights rounded to 8 bits, {KERNELS}",
    "zero_quantized_nontrainable_weights": f"frozen weights would be rounded to 8 bits, {KERNELS}",
    "zero_quantized_gradients": f"gradients would be rounded to 4 and 8 bits, {KERNELS}",
}
SUPER_OFFLOAD = (
    "super_offload: DeepSpeed takes it on NVIDIA GPUs alone, for machines whose CPU and GPU share a fast link (GH200), "
    "and it has not been run here. Leave it out: training_configs/zero3_offload_for_dpo.yaml offloads without it."
)
MAPS = {"bf16": 'enabled": "auto"', "fp16": 'enabled": "auto"'}  # what they are to say
MAPS |= dict.fromkeys(("offload_optimizer", "offload_param"), 'device": "cpu"')
# What the recipe decides: the argument that transformers fills in for "auto", and what DeepSpeed takes without the key.
OF_THE_RECIPE = {
    "train_micro_batch_size_per_gpu": ("per_device_train_batch_size", None),
    "gradient_accumulation_steps": ("gradient_accumulation_steps", 1),
    "gradient_clipping": ("max_grad_norm", 0.0),
}
INSTEAD = {"optimizer": "optim, optim_args and learning_rate", "scheduler": "lr_scheduler_type and warmup_steps"}
# Keys of a DeepSpeed configuration and of its zero_optimization that a run takes; all others change what is computed,
# or have never been run here.
TAKEN = {
    *OF_THE_RECIPE,
    "train_batch_size",
    "bf16",
    "fp16",
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "aio",
}
TAKEN |= {"zero_force_ds_cpu_optimizer", "steps_per_print", "wall_clock_breakdown", "comms_logger", "flops_profiler"}
TAKEN_OF_ZERO = set(
    "stage overlap_comm zero_hpz_partition_size reduce_bucket_size sub_group_size offload_optimizer offload_param "
    "contiguous_gradients reduce_scatter allgather_partitions allgather_bucket_size round_robin_gradients "
    "stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save stage3_prefetch_bucket_size "
    "stage3_max_live_parameters stage3_max_reuse_distance stage3_param_persistence_threshold "
    "stage3_model_persistence_threshold ignore_unused_parameters log_trace_cache_warnings".split()
)


def deepspeed_file(given: str | Path, named_in: str | Path = "the accelerate file") -> Path:
    """Where the file is: from the working folder, as accelerate looks for it, else from the repository's. Raises
    UserError where it is in neither."""
    folders = (Path.cwd(), ROOT)
    for folder in folders:
        if (path := folder / given).is_file():
            return path
    places = " nor in ".join(map(str, dict.fromkeys(folders)))
    raise UserError(
        f"{KEY}: {given} of {named_in} is not in {places}. Give a path from there, or an absolute one.", KEY
    )


def read_deepspeed_file(path: Path) -> dict[str, Any]:
    """Its keys. Raises UserError where it has none."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{KEY}: {path} is no JSON in UTF-8 ({error}).", KEY) from error
    if not isinstance(raw, dict) or not isinstance(raw.get("zero_optimization"), dict):
        raise UserError(f"{KEY}: {path} has no zero_optimization, with its stage.", KEY)
    zero = raw["zero_optimization"]
    if isinstance(zero.get("stage"), bool) or not isinstance(zero.get("stage"), int):
        raise UserError(f"{path}: zero_optimization.stage: {zero.get('stage')} is no number; give 2 or 3.", "stage")
    for part, keys in ((raw, ("bf16", "fp16")), (zero, ("offload_optimizer", "offload_param"))):
        for key in keys:
            if not isinstance(part.get(key) or {}, dict):
                raise UserError(f'{path}: {key}: {part[key]} is no mapping, such as {{"{MAPS[key]}}}.', key)
    return raw


def find_deepspeed_file() -> None:
    """Before TrainingArguments reads it: tells accelerate where the file of this launch is. Raises UserError for one
    that cannot be read, and for keys of the accelerate file that do not count beside it."""
    given, fields = os.environ.get(FILE, "none"), os.environ.get(FIELDS, "").split(",")
    refuse_strangers(fields)
    if given == "none":
        return
    path = deepspeed_file(given)
    read_deepspeed_file(path)
    refuse_beside(fields)
    os.environ[FILE] = str(path)


def refuse_strangers(keys, where: str = "the accelerate file") -> None:
    """Raises UserError for a key of deepspeed_config that accelerate passes over."""
    if strangers := sorted(set(keys) - OF_ACCELERATE - {""}):
        advice = "true under ZeRO-2 and ZeRO-3 without it" if strangers[0] == "overlap_comm" else "of DeepSpeed's own"
        raise UserError(
            f"{strangers[0]}: accelerate reads no such key under deepspeed_config in {where}; it is {advice}. For "
            f"a value of yours give the whole DeepSpeed configuration as {KEY} (docs/clusters.md).",
            strangers[0],
        )


def refuse_beside(keys, where: str = "the accelerate file") -> None:
    """Raises UserError for a key of an accelerate file that a DeepSpeed file takes the place of."""
    if key := next((key for key in BESIDE if key in keys), None):
        message = f"{key}: in {where} does not count beside {KEY}, and is refused by accelerate. Leave it out; in the "
        raise UserError(f"{message}DeepSpeed file it is {BESIDE[key]}.", key)


def refuse_engine(args: Any) -> None:
    """Raises UserError for what a DeepSpeed configuration, however it was given, says otherwise than the arguments,
    and for parts of DeepSpeed that have never been run here."""
    engine = getattr(args.deepspeed_plugin, "deepspeed_config", None) or {}
    zero = engine.get("zero_optimization") or {}
    for key, (own, without) in OF_THE_RECIPE.items() if engine else ():
        value, wanted = engine.get(key, without), getattr(args, own)
        if value != "auto" and (value or 0) != (wanted or 0):
            said = f"is {value} in" if key in engine else "is missing in"
            raise UserError(
                f'{key}: {said} the DeepSpeed configuration, but {own} is {wanted}. Write {key}: "auto" there.', key
            )
    for key in ("bf16", "fp16"):
        enabled = (engine.get(key) or {}).get("enabled", "auto")
        if enabled != "auto" and bool(enabled) != (args.mixed_precision == key):
            raise UserError(
                f"{key}: enabled is {enabled} in the DeepSpeed configuration, but the recipe computes in "
                f'{args.mixed_precision}. Write {key}: {{"enabled": "auto"}} there.',
                key,
            )
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    if engine.get("train_batch_size", "auto") not in ("auto", batch):
        raise UserError(
            f"train_batch_size: is {engine['train_batch_size']} in the DeepSpeed configuration, but the recipe's is "
            f'{batch}. Write train_batch_size: "auto" there.',
            "train_batch_size",
        )
    for key, reason in UNTESTED.items():
        if zero.get(key):
            raise UserError(f"{key}: {reason}. Leave it out.", key)
    if (zero.get("offload_optimizer") or {}).get("super_offload"):
        raise UserError(SUPER_OFFLOAD, "super_offload")
    for where, given, taken in (("", engine, TAKEN), ("zero_optimization.", zero, TAKEN_OF_ZERO)):
        for key in sorted(key for key, value in given.items() if key not in taken and not _is_off(value)):
            own = f"the recipe's {INSTEAD[key]} would not count" if key in INSTEAD else "it has not been run here"
            raise UserError(f"{key}: {where}{key} of the DeepSpeed configuration: {own}. Leave it out.", key)
    refuse_secondary(zero, args.world_size, int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size)))


def _is_off(value: Any) -> bool:
    if isinstance(value, dict):
        return not value or value.get("enabled") is False
    return value in (None, False) or (value == 1 and value is not True)


def refuse_secondary(zero: dict[str, Any], processes: int, of_machine: int) -> None:
    """Raises UserError for a zero_hpz_partition_size that DeepSpeed passes over or stops at, and for groups that do not
    fit into a machine of `of_machine` of the `processes`."""
    size, stage, key = zero.get("zero_hpz_partition_size", 1), zero.get("stage"), "zero_hpz_partition_size"
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise UserError(f"{key}: {size} is no number of GPUs; give those of one machine.", key)
    if size > 1 and stage != 3:
        raise UserError(f"{key}: {size} has no effect under ZeRO-{stage}; under ZeRO-3 it has.", key)
    if processes % min(size, processes):
        raise UserError(f"{key}: {size} does not divide {processes} processes; give the GPUs of one machine.", key)
    if of_machine % min(size, processes):
        raise UserError(
            f"{key}: groups of {size} reach across machines of {of_machine} processes, and would take memory for "
            f"nothing. Give {of_machine}.",
            key,
        )
