"""Ways of splitting one model or one sequence among devices. Sequence parallel is supported; all others are refused by
name."""

import os
from typing import Any

from mdpo.errors import UserError
from mdpo.forward.packed_attention import other_layers
from mdpo.forward.sequence_parallel import head_shares
from mdpo.ranks import row_ranks

ADVICE = (
    "is not supported. To split a model or its sequences there are ZeRO-3 (training_configs/zero3_for_dpo.yaml) "
    "and sequence parallel (training_configs/zero3_sequence_parallel.yaml)"
)
SIZES = ("DP_REPLICATE_SIZE", "DP_SHARD_SIZE", "TP_SIZE", "CP_SIZE")
IN_USE = "ACCELERATE_USE_PARALLELISM_CONFIG"
# Keys of a DeepSpeed configuration, and of model_init_kwargs, that split a model or a sequence.
OF_DEEPSPEED = ("sequence_parallel_size", "tensor_parallel", "pipeline", "expert_parallel_size", "expert_parallel")
OF_THE_MODEL = ("tp_plan", "tp_size", "device_mesh", "distributed_config")


def refuse_parallelism(args: Any) -> None:
    """Raises UserError for parallelism_config of the arguments or of the accelerate file (whose launcher passes it in
    the environment), for Megatron-LM, and for a DeepSpeed configuration's or model_init_kwargs' keys of that kind."""
    if args.parallelism_config is not None:
        raise UserError(f"parallelism_config: among the arguments it {ADVICE}.")
    if _says_true(IN_USE) and row_ranks() == 1:
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
    if row_ranks() > 1:
        _refuse_with_shared_rows(args)


def _refuse_with_shared_rows(args: Any) -> None:
    """Raises UserError for what sequence parallel cannot go with. Else accelerate learns nothing of it: it would cut
    batches along their rows, whatever is in them."""
    size, backend, plugin = row_ranks(), os.environ.get("PARALLELISM_CONFIG_SP_BACKEND"), args.deepspeed_plugin
    where = f"parallelism_config: sp_size {size}"
    if backend not in (None, "", "None", "deepspeed"):
        raise UserError(f"parallelism_config: sp_backend: {backend} is not supported, deepspeed is.")
    if plugin is not None and plugin.zero_stage not in (2, 3):
        raise UserError(f"{where} needs ZeRO-2 or ZeRO-3, not ZeRO-{plugin.zero_stage}.", "parallelism_config")
    if args.world_size % size:
        raise UserError(
            f"{where} does not divide the number of processes, {args.world_size}. Take one that does.",
            "parallelism_config",
        )
    for key, wrong in (
        ("disable_dropout", not args.disable_dropout),
        ("neftune_noise_alpha", bool(args.neftune_noise_alpha)),
        ("torch_compile", bool(args.torch_compile)),
        ("pad_to_multiple_of", bool(args.pad_to_multiple_of)),
        ("include_num_input_tokens_seen", args.include_num_input_tokens_seen not in (False, "no")),
        ("train_sampling_strategy", args.train_sampling_strategy not in ("random", "sequential")),
    ):
        if wrong:
            raise UserError(f"{key}: {getattr(args, key)} does not go with sequence parallel ({where}).", key)
    os.environ[IN_USE] = "false"


def _says_true(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def refuse_model(config: Any) -> list[str]:
    """Raises UserError where ranks cannot share the rows of a model, by its configuration (None is unknown); where they
    do, a line on how even their work is."""
    if row_ranks() == 1 or config is None:
        return []
    if reason := other_layers(config):
        raise UserError(f"parallelism_config: {config.model_type} cannot share rows: {reason}.", "parallelism_config")
    heads = getattr(config.get_text_config(), "num_attention_heads", None)
    if heads is None:
        raise UserError(f"parallelism_config: {config.model_type} has no heads of attention.", "parallelism_config")
    key_heads = getattr(config.get_text_config(), "num_key_value_heads", None) or heads
    counts = [share.queries.stop - share.queries.start for share in head_shares(heads, key_heads, row_ranks())]
    each = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else f"{counts[0]}"
    return [
        f"sequence parallel: {row_ranks()} ranks for each row, with {each} of {heads} heads of attention each (at most "
        f"{max(counts) * len(counts) / heads:.2f} × the mean) and as many tokens and scored positions"
    ]
