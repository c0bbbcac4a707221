"""Options of the trainer that contradict each other or have no effect, refused before anything is loaded."""

import os

from datasets import Dataset, IterableDataset
from peft import PeftConfig
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig

from mdpo.config.deepspeed_file import refuse_engine
from mdpo.config.effects import contradicted, is_set, refuse_other_runs, without_effect
from mdpo.config.parallelism import refuse_parallelism
from mdpo.config.precision import HALF, without_master
from mdpo.config.schema import MDPOConfig
from mdpo.errors import UserError
from mdpo.loss.registry import LOSSES, OF_TRL

# Losses of the difference of rewards: another f-divergence's normalizer cancels in them alone.
OF_DIFFERENCE = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}
TOWARDS_MARGIN = {"kl", "rev_kl", "tv", "hellinger"}
# Options that only some losses read.
ONLY_WITH = {
    "label_smoothing": {"robust", "exo_pair", "aot", "aot_unpaired"},
    "discopop_tau": {"discopop"},
    "margin_scale": {"sigmoid", "hinge", *TOWARDS_MARGIN},
    "length_penalty": {"sigmoid"},
    "ld_alpha": set(LOSSES) - {"sft", "raft"},
}
# Keys of trl.ModelConfig that nothing reads without another one.
ONLY_BESIDE = {
    "use_peft": ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters",
                 "lora_modules_to_save", "lora_task_type", "use_rslora", "use_dora"),
    "load_in_4bit": ("bnb_4bit_quant_type", "bnb_4bit_quant_storage", "use_bnb_nested_quant"),
}  # fmt: skip
# Options that are not offered, with the value that they have to keep and what to use instead.
INSTEAD = {
    "padding_free": "leave it out; shared_prefix, on by default in recipes, pads nothing",
    "use_liger_kernel": "leave it out; the LM head already runs in chunks",
    "activation_offloading": "use gradient_checkpointing, which is on by default",
    "auto_find_batch_size": "set per_device_train_batch_size; the longest pairs come first, so that it shows at once",
    "ignore_data_skip": "a resumed run trains on the pairs that it has not seen",
    "restore_callback_states_from_checkpoint": "what the trainer needs is restored without it",
    "enable_jit_checkpoint": "a signal ends in a checkpoint without it",
    **dict.fromkeys(
        ("bf16_full_eval", "fp16_full_eval"),
        "it would round the policy, and not its reference, and the final model with it",
    ),
    **dict.fromkeys(
        ("torch_compile_mode", "torch_compile", "torch_compile_backend"),
        "leave it out; fused_ops, on by default in recipes, compiles what gains by it",
    ),
    "save_on_each_node": "output_dir has to be on a file system that all nodes share",
}


def check_options(args: DPOConfig, peft_config: PeftConfig | None = None, recipe: dict | None = None) -> list[str]:
    """Raises UserError for what no run could honor. Options that ask for something else than what happens are errors
    under MDPOConfig, which recipes use; under a plain trl.DPOConfig, where TRL lets them pass, they are returned, a
    line each, as are other options without effect. `recipe` has the keys that were set and their values."""
    args = MDPOConfig.with_trl_behaviour(args)
    own = not args.of_trl
    for switch, keys in ONLY_BESIDE.items():
        for key in (key for key in keys if key in (recipe or {}) and not recipe.get(switch)):
            raise UserError(f"{key}: has no effect without {switch}: true.")
    if (recipe or {}).get("allow_different_prompts") and not args.mask_user_turns:
        raise UserError("allow_different_prompts: has no effect with mask_user_turns: false, whose prompts TRL finds.")
    if (recipe or {}).get("turns_without_reasoning", "keep") != "keep" and not args.mask_user_turns:
        raise UserError("turns_without_reasoning: has no effect with mask_user_turns: false, which knows no turns.")
    refuse_other_runs(args, recipe or {})
    refuse_parallelism(args)
    refuse_engine(args)
    _check_losses(args, own)
    for key, advice in INSTEAD.items():
        if getattr(args, key):
            key = next((name for name in INSTEAD if name.startswith(key) and (recipe or {}).get(name)), key)
            raise UserError(f"{key}: is not supported; {advice}.")
    dynamo = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if dynamo not in ("no", ""):
        raise UserError(f"dynamo_backend: {dynamo} in the accelerate file is not supported; leave dynamo_config out.")
    if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true"):
        raise UserError(
            "fsdp: is not supported; training_configs/zero3_for_dpo.yaml shards the same with DeepSpeed. (accelerate "
            "shards with FSDP on GPUs alone, where it has not been compared with one process.)"
        )
    if (recipe or {}).get("fsdp_config"):
        raise UserError("fsdp_config: fsdp is not supported; leave it out.")
    if own and args.train_sampling_strategy not in ("random", "sequential"):
        raise UserError(f"train_sampling_strategy: {args.train_sampling_strategy} is not supported; leave it out.")
    if args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 0:
        raise UserError(
            "zero_stage: 0 is not supported; take ZeRO-2 or ZeRO-3, or an accelerate file without DeepSpeed."
        )
    if args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3:
        _refuse_scattered_weights(args.deepspeed_plugin.deepspeed_config)
    modes = ("drop", "keep_start") if own else ("keep_start",)
    if args.truncation_mode not in modes:
        raise UserError(f"truncation_mode: {args.truncation_mode!r} is not one of {', '.join(modes)}.")
    if args.sync_ref_model and args.precompute_ref_log_probs:
        raise UserError("sync_ref_model: moves the reference, precompute_ref_log_probs fixes it. Choose one.")
    lines = [*_without_effect(args), *contradicted(args)]
    if own and lines:
        raise UserError(lines[0])
    lines += without_effect(args)
    dropout = getattr(peft_config, "lora_dropout", 0.0)  # not an error: 0.05 is trl.ModelConfig's default
    if args.disable_dropout and dropout:
        lines.append(f"lora_dropout: {dropout} has no effect with disable_dropout, which is on.")
    return lines


def _refuse_scattered_weights(engine: dict) -> None:
    """Under ZeRO-3 weights are written by the first rank, if DeepSpeed is told to gather them. Without it the run
    would fail at its first checkpoint."""
    if not engine.get("zero_optimization", {}).get("stage3_gather_16bit_weights_on_model_save"):
        raise UserError(
            "zero3_save_16bit_model: true is needed in the accelerate file under ZeRO-3, in a deepspeed_config_file "
            "stage3_gather_16bit_weights_on_model_save: true; else no model could be written."
        )


def _check_losses(args: DPOConfig, own: bool) -> None:
    known, types = LOSSES if own else OF_TRL, args.loss_type
    for name in types:
        if name not in known:
            needs = " needs MDPOConfig" if name in LOSSES else f" is not one of {', '.join(known)}"
            raise UserError(f"loss_type: {name!r}{needs}.")
    if len(set(types)) < len(types):
        raise UserError("loss_type: names a loss twice; add their loss_weights up.")
    if args.f_divergence_type not in ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"):
        raise UserError(f"f_divergence_type: {args.f_divergence_type!r} is not known.")
    if args.f_divergence_type != "reverse_kl" and not set(types) <= OF_DIFFERENCE:
        raise UserError(
            f"f_divergence_type: {args.f_divergence_type} has no meaning for {', '.join(set(types) - OF_DIFFERENCE)}; "
            f"it works with {', '.join(sorted(OF_DIFFERENCE))}."
        )
    if args.use_weighting and {"aot", "aot_unpaired"} & set(types):
        raise UserError("use_weighting: aot losses sort the batch, and weights would meet other pairs. Leave one out.")
    if not 0 <= args.label_smoothing < (0.5 if "robust" in types else 1):
        raise UserError(
            f"label_smoothing: {args.label_smoothing} is out of range; robust takes [0, 0.5), others [0, 1)."
        )
    if "exo_pair" in types and not args.label_smoothing:
        raise UserError("label_smoothing: exo_pair needs more than 0; its paper takes 1e-3.")
    if args.ld_alpha is not None and not 0 <= args.ld_alpha <= 1:
        raise UserError(f"ld_alpha: {args.ld_alpha} is out of range; give a number in [0, 1].")
    if TOWARDS_MARGIN & set(types) and not args.margin_scale:
        raise UserError(
            f"margin_scale: {', '.join(TOWARDS_MARGIN & set(types))} pulls the preference towards σ(margin_scale · "
            "margin); with 0 that is a coin's. Set it, and give each row a `margin`."
        )


def _without_effect(args: DPOConfig):
    """Yields a sentence for each option that is set and changes nothing."""
    for key, losses in ONLY_WITH.items():
        if is_set(args, key) and not losses & set(args.loss_type):
            types, takes = ", ".join(args.loss_type), ", ".join(sorted(losses))
            yield f"{key}: has no effect with loss_type {types}; it takes {takes}."
    needs = {
        "f_alpha_divergence_coef": args.f_divergence_type == "alpha_divergence" or "f_divergence_type alpha_divergence",
        "ref_model_mixup_alpha": args.sync_ref_model or "sync_ref_model: true",
        "ref_model_sync_steps": args.sync_ref_model or "sync_ref_model: true",
        **dict.fromkeys(
            ("precompute_ref_batch_size", "reference_cache_dir"),
            args.precompute_ref_log_probs or "precompute_ref_log_probs: true",
        ),
    }
    for key, met in needs.items():
        if is_set(args, key) and met is not True:
            yield f"{key}: has no effect without {met}."
    if args.pad_to_multiple_of and args.shared_prefix:
        yield "pad_to_multiple_of: has no effect with shared_prefix, which pads nothing; set one of the two off."


def refuse_lost_steps(model, args: DPOConfig) -> list[str]:
    """For weights that are trained in half precision without a float32 copy: raises UserError under MDPOConfig; under a
    plain DPOConfig, as TRL lets them pass, a line."""
    halves = [p for p in model.parameters() if p.requires_grad and p.dtype in HALF]
    why = without_master(args, halves[0].dtype, f"{sum(p.numel() for p in halves):,}") if halves else None
    if why and not args.of_trl:
        raise UserError(why)
    return [f"warning: {why}"] if why else []


def refuse_inputs(model, ref_model, args: DPOConfig, train_dataset, processing_class) -> None:
    """What this trainer cannot take is an error here, before anything is loaded."""
    if train_dataset is None:
        raise UserError("train_dataset is required.")
    if not isinstance(train_dataset, Dataset | IterableDataset):
        raise UserError(f"train_dataset must be a Dataset or IterableDataset, not {type(train_dataset).__name__}.")
    if {"image", "images"} & set(next(iter(train_dataset))):
        raise UserError(
            "The rows have images; this trainer takes text. Use trl.DPOTrainer for vision models.", "train_dataset"
        )
    if processing_class is not None and not isinstance(processing_class, PreTrainedTokenizerBase):
        raise UserError(f"processing_class must be a tokenizer, not {type(processing_class).__name__}.")
    if ref_model is not None and ref_model is model:
        message = "model and ref_model are the same object: leave ref_model out, and a copy is made."
        raise UserError(message, "ref_model")
    if ref_model is not None and args.ref_model_name_or_path:
        raise UserError("ref_model_name_or_path: a ref_model was given too. Give one of the two.")
