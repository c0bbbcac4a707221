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
# What the recipe decides: the argument that transformers fills in for "auto", and what DeepSpeed takes without the key.
OF_THE_RECIPE = {
    "train_micro_batch_size_per_gpu": ("per_device_train_batch_size", None),
    "gradient_accumulation_steps": ("gradient_accumulation_steps", 1),
    "gradient_clipping": ("max_grad_norm", 0.0),
}


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
    return raw


def find_deepspeed_file() -> None:
    """Before TrainingArguments reads it: tells accelerate where the file of this launch is. Raises UserError for one
    that cannot be read, and for keys of the accelerate file that do not count beside it."""
    given = os.environ.get(FILE, "none")
    if given == "none":
        return
    path = deepspeed_file(given)
    read_deepspeed_file(path)
    refuse_beside(os.environ.get(FIELDS, "").split(","))
    os.environ[FILE] = str(path)


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
    for key, reason in UNTESTED.items():
        if zero.get(key):
            raise UserError(f"{key}: {reason}. Leave it out.", key)
    if (zero.get("offload_optimizer") or {}).get("super_offload"):
        raise UserError(SUPER_OFFLOAD, "super_offload")
    refuse_secondary(zero, args.world_size)


def refuse_secondary(zero: dict[str, Any], processes: int) -> None:
    """Raises UserError for a zero_hpz_partition_size that DeepSpeed passes over or stops at."""
    size, stage, key = zero.get("zero_hpz_partition_size", 1), zero.get("stage"), "zero_hpz_partition_size"
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise UserError(f"{key}: {size} is no number of GPUs; give those of one machine.", key)
    if size > 1 and stage != 3:
        raise UserError(f"{key}: {size} has no effect under ZeRO-{stage}; under ZeRO-3 it has.", key)
    if processes % min(size, processes):
        raise UserError(f"{key}: {size} does not divide {processes} processes; give the GPUs of one machine.", key)
