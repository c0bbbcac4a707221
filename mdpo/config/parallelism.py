"""Ways of splitting one model or one sequence among devices, none of them supported: refused by name."""

import os
from typing import Any

from mdpo.errors import UserError

ADVICE = "is not supported: every process holds whole pairs. training_configs/zero3_for_dpo.yaml shards the weights"
SIZES = ("DP_REPLICATE_SIZE", "DP_SHARD_SIZE", "TP_SIZE", "CP_SIZE", "SP_SIZE")
# Keys of a DeepSpeed configuration, and of model_init_kwargs, that split a model or a sequence.
OF_DEEPSPEED = ("sequence_parallel_size", "tensor_parallel", "pipeline", "expert_parallel_size")
OF_THE_MODEL = ("tp_plan", "tp_size", "device_mesh", "distributed_config")


def refuse_parallelism(args: Any) -> None:
    """Raises UserError for parallelism_config of the arguments or of the accelerate file (whose launcher passes it in
    the environment), for Megatron-LM, and for a DeepSpeed configuration's or model_init_kwargs' keys of that kind."""
    if args.parallelism_config is not None:
        raise UserError(f"parallelism_config: {ADVICE}.")
    if _says_true("ACCELERATE_USE_PARALLELISM_CONFIG"):
        raise UserError(f"parallelism_config: the accelerate file's {ADVICE}.")
    for size in SIZES:
        value = os.environ.get(name := f"PARALLELISM_CONFIG_{size}", "1")
        if value not in ("", "1", "None"):
            raise UserError(f"parallelism_config: {name} is {value}, which {ADVICE}.")
    if _says_true("ACCELERATE_USE_MEGATRON_LM"):
        raise UserError("megatron_lm_config: the accelerate file's distributed_type: MEGATRON_LM is not supported.")
    engine = args.deepspeed_plugin.deepspeed_config if args.deepspeed_plugin is not None else {}
    for key in OF_DEEPSPEED:
        if engine.get(key) not in (None, 1, False, {}):
            raise UserError(f"deepspeed: its {key} {ADVICE}.")
    for key in OF_THE_MODEL:
        if (args.model_init_kwargs or {}).get(key) is not None:
            raise UserError(f"model_init_kwargs: {key} {ADVICE}.")


def _says_true(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")
