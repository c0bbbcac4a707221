"""From a recipe and an accelerate file to the memory of the run, without weights or a GPU.

plan = plan_memory(load_recipe(["RECIPE.yaml"]), Sharding.read("training_configs/zero3_for_dpo.yaml"))
plan.parts, plan.total, plan.fits(80), plan.longest(80), plan.markdown()
"""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from mdpo.config.adapters import adapter_config
from mdpo.config.precision import HALF, without_master
from mdpo.console import first_line
from mdpo.errors import UserError
from mdpo.masking.tokenizer import refuse_missing_folder
from mdpo.memory.breakdown import MemoryModel, MemoryPlan
from mdpo.memory.fake_step import FakeModel
from mdpo.memory.layers import SHALLOW, DeepModel, alike, with_layers
from mdpo.memory.sharding import Sharding

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MIXED = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": None}


def plan_memory(recipe, sharding: Sharding, sequences: int = 1) -> MemoryPlan:
    """Of a recipe from `config.recipe.load_recipe`, as it is written: what this machine lacks does not matter, unless
    the accelerate file says use_cpu. A side has `sequences`, each of max_length. Raises UserError that names what
    cannot be planned."""
    args, values = recipe.training, recipe.values if sharding.cpu else recipe.written
    _refuse(recipe, sharding)
    config = _model_config(recipe.model.model_name_or_path, recipe)
    half = "bf16" if values.get("bf16", not values.get("fp16")) else "fp16" if values.get("fp16") else None
    mixed = MIXED[half or sharding.precision]
    flash = str(values.get("attn_implementation") or "").startswith(("flash", "kernels"))
    peft, other, depth = adapter_config(recipe.model), config, config.get_text_config().num_hidden_layers
    if args.ref_model_name_or_path and not args.precompute_ref_log_probs:
        other = _model_config(args.ref_model_name_or_path, recipe)
    scored = not args.precompute_ref_log_probs and (peft is None or args.ref_model_name_or_path)
    options = {
        "engine_dtype": mixed if sharding.stage else None,
        "autocast": None if sharding.stage else mixed,
        "attention": None if sharding.cpu else "flash" if flash else "torch",
        "zero3": sharding.stage == 3,
        "sequences": sequences,
        "row_ranks": sharding.row_ranks,
    }

    def models(n: int) -> tuple:
        """What a FakeModel of `n` layers is made from: policy, arguments, adapter, reference."""
        policy, reference = (_maker(c if n == depth else with_layers(c, n), recipe, values) for c in (config, other))
        # An adapter of its own for each: PEFT writes the names of the modules that it adapts into the configuration.
        return policy, args, copy.deepcopy(peft), reference if scored else None

    try:
        # Autocast's copies grow with the layers and are gone at the LM head, so that with depth the peak moves.
        if other is config and options["autocast"] is None and alike(config, models(depth)[0], peft):
            shallow = [FakeModel(*models(n), **options) for n in SHALLOW]
            skeleton: FakeModel = DeepModel(shallow, depth, *models(depth), **options)
        else:
            skeleton = FakeModel(*models(depth), **options)
        if sharding.row_ranks > 1 and not skeleton.packed:
            raise UserError(f"parallelism_config: ranks cannot share rows of {config.model_type}.")
        if getattr(skeleton.policy, "_is_stateful", False):
            raise UserError(
                f"{config.model_type} cannot be planned: it carries a state, whose kernels are not known here.",
                key="model_type",
            )
        if not sharding.stage:
            _refuse_no_master(args, skeleton.policy)
        nested = recipe.model.use_bnb_nested_quant if recipe.model.load_in_4bit else None
        return MemoryModel(skeleton, sharding, args, _evaluates(recipe.data), nested).plan(args.max_length)
    except UserError:
        raise
    except (NotImplementedError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{config.model_type} cannot be planned: {first_line(error)}", "model_type") from error


def _evaluates(data) -> bool:
    """Whether there will be held-out pairs; they are evaluated at the end of a run at the latest."""
    return bool(data.test_split_size or data.eval_dataset_mixer or any("train" not in s for s in data.dataset_splits))


def _refuse(recipe, sharding: Sharding) -> None:
    args, model = recipe.training, recipe.model
    optim = getattr(args.optim, "value", args.optim)
    if optim not in ("adamw_torch", "adamw_torch_fused"):
        raise UserError(f"optim: {optim} cannot be planned; adamw_torch and adamw_torch_fused can.")
    if args.max_length is None:
        raise UserError("max_length: null has no longest pair to plan for; give --max_length=TOKENS.")
    if args.deepspeed or args.fsdp or args.torch_compile:
        raise UserError("deepspeed, fsdp and torch_compile in a recipe cannot be planned; the accelerate file's can.")
    if model.load_in_8bit:
        raise UserError("load_in_8bit cannot be planned; load_in_4bit can.")
    if model.load_in_4bit and not model.use_peft:
        raise UserError("load_in_4bit: needs use_peft: true, as weights of 4 bits cannot be trained.")
    if model.load_in_4bit and sharding.stage == 3:
        raise UserError("load_in_4bit under ZeRO-3 cannot be planned; under ZeRO-2 or without DeepSpeed it can.")
    if (args.gradient_checkpointing_kwargs or {}).get("offload"):
        raise UserError("gradient_checkpointing_kwargs: offload cannot be planned; leave it out.")
    if "gguf_file" in (args.model_init_kwargs or {}):
        raise UserError("gguf_file cannot be planned; give a folder with config.json: --model_name_or_path=FOLDER.")


def _refuse_no_master(args, policy: nn.Module) -> None:
    """As a run does."""
    halves = [weight for weight in policy.parameters() if weight.requires_grad and weight.dtype in HALF]
    if halves and (reason := without_master(args, halves[0].dtype, f"{sum(p.numel() for p in halves):,}")):
        raise UserError(reason)


def _model_config(name: str, recipe):
    """From the hub or a folder; no weights are read. Raises UserError."""
    options = {"revision": recipe.model.model_revision, **(recipe.training.model_init_kwargs or {})}
    options = {key: options[key] for key in ("revision", "subfolder") if key in options}
    refuse_missing_folder("model_name_or_path", name)
    if Path(name, "adapter_config.json").is_file():
        raise UserError(
            f"model_name_or_path: {name} contains an adapter; plan with the folder or name of its base model."
        )
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=recipe.training.trust_remote_code, **options)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"model_name_or_path: the configuration of {name!r} cannot be loaded: {first_line(error)}\n"
            "Where the hub cannot be reached, give a local folder with its config.json, no weights are needed: "
            "--model_name_or_path=FOLDER"
        ) from error


def _maker(config, recipe, values: dict) -> Callable[[], nn.Module]:
    """A function that builds the model in the dtype that it is loaded in."""
    dtype_name = (recipe.training.model_init_kwargs or {}).get("dtype") or values.get("dtype") or recipe.model.dtype
    dtype = DTYPES.get(str(dtype_name)) or getattr(config, "dtype", None) or torch.float32
    attention = values.get("attn_implementation")
    attention = None if attention is None or attention.startswith(("flash", "kernels")) else attention
    options = {"trust_remote_code": recipe.training.trust_remote_code, "attn_implementation": attention, "dtype": dtype}
    return lambda: AutoModelForCausalLM.from_config(copy.deepcopy(config), **options)
