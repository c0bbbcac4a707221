"""Loads a checkpoint to be evaluated, a full model or an adapter folder, with the recipe of its run."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file
from trl import get_quantization_config

from mdpo.config.recipe import Recipe, model_init_kwargs
from mdpo.console import say
from mdpo.errors import UserError
from mdpo.forward.modes import base_model
from mdpo.masking.tokenizer import refuse_missing_folder
from mdpo.reference.loading import load_model
from mdpo.runs.saved_weights import load_adapters

OF_THE_BASE = ("revision", "subfolder", "gguf_file")  # arguments that say where the base's weights are


def adapter_config(checkpoint: str) -> PeftConfig | None:
    """An adapter's configuration; None for a full model. Raises UserError where there is neither."""
    refuse_missing_folder("CHECKPOINT", checkpoint)
    if Path(checkpoint).is_dir() and not any(Path(checkpoint).glob("*.safetensors")):
        raise UserError(f"CHECKPOINT: {checkpoint} contains no *.safetensors. Give a run's output_dir or a checkpoint.")
    try:
        return PeftConfig.from_pretrained(checkpoint) if find_adapter_config_file(checkpoint) else None
    except (OSError, ValueError) as error:
        raise UserError(f"CHECKPOINT: {checkpoint} cannot be loaded: {error}") from error


def starting_policy(model, args, quantization_config=None):
    """The policy at the start of training: loaded, where `model` is a name or a folder. Raises UserError."""
    if not isinstance(model, str):
        for value, name in ((args.model_init_kwargs, "model_init_kwargs"), (quantization_config, "quantization")):
            if value is not None:
                raise UserError(f"{name} only takes effect where the model is given by name, not as an object.")
        return model
    kwargs = {"dtype": "float32", "trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    return load_model(model, **kwargs)


def scoring_arguments(checkpoint: str, recipe: Recipe) -> dict[str, Any]:
    """DPOTrainer's arguments to score the checkpoint against the recipe's reference: the model that it names, else its
    base. Changes the recipe's training arguments accordingly. An adapter's weights are not loaded yet: the trainer
    creates it as in training, where the reference is the model without it."""
    args, base = recipe.training, recipe.model.model_name_or_path
    kwargs, quantization = model_init_kwargs(recipe.model, args), get_quantization_config(recipe.model)
    args.per_device_train_batch_size = args.per_device_eval_batch_size  # batches of evaluation's size
    if args.sync_ref_model:
        say("sync_ref_model: the run's reference moved; metrics here are against the one that it started with.")
        for field in fields(args):
            if field.name in ("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"):
                setattr(args, field.name, field.default)
    peft_config = adapter_config(checkpoint)
    if peft_config is not None:
        _tell_base(peft_config, base)
        args.model_init_kwargs = kwargs
        return {"model": base, "peft_config": peft_config, "quantization_config": quantization}
    elsewhere = {key for key in OF_THE_BASE if kwargs.get(key) not in (None, "", "main")}
    args.model_init_kwargs = {key: value for key, value in kwargs.items() if key not in elsewhere}
    reference = None
    if args.ref_model_name_or_path is None and elsewhere:  # a reference by name would be loaded without them
        reference = load_model(base, **_loading(recipe))
    elif args.ref_model_name_or_path is None:
        args.ref_model_name_or_path = base
    return {"model": checkpoint, "ref_model": reference, "quantization_config": quantization}


def load_adapter_weights(model: PeftModel, checkpoint: str) -> None:
    """Loads the checkpoint's weights into the trainer's adapter. Raises UserError where one is missing."""
    missing = model.load_adapter(checkpoint, model.active_adapter).missing_keys
    absent = [name for name in missing if f".{model.active_adapter}" in name]
    if Path(checkpoint).is_dir():  # PEFT's loader misses some that are there (Laguna)
        load_adapters(checkpoint, model)
    elif absent:
        raise UserError(f"CHECKPOINT: {checkpoint} lacks {len(absent)} of the adapter's weights, such as {absent[0]}.")
    model.eval()


def load_policy(checkpoint: str, recipe: Recipe) -> PreTrainedModel:
    """The checkpoint as a model to generate with, on the recipe's device and in its dtype. Raises UserError."""
    kwargs, peft_config = _loading(recipe), adapter_config(checkpoint)
    if peft_config is None:
        model = load_model(checkpoint, **{key: value for key, value in kwargs.items() if key not in OF_THE_BASE})
    else:
        base = load_model(recipe.model.model_name_or_path, **kwargs)
        model = PeftModel.from_pretrained(base, checkpoint)
        if Path(checkpoint).is_dir():
            load_adapters(checkpoint, model)
        model = base_model(model)
    placed = "quantization_config" in kwargs or getattr(model, "hf_device_map", None)
    return (model if placed else model.to(recipe.training.device)).eval()


def _loading(recipe: Recipe) -> dict[str, Any]:
    """Arguments of from_pretrained for the recipe's base, as the trainer passes them."""
    args, quantization = recipe.training, get_quantization_config(recipe.model)
    kwargs = {"dtype": "float32", "trust_remote_code": args.trust_remote_code, **model_init_kwargs(recipe.model, args)}
    return kwargs if quantization is None else {**kwargs, "quantization_config": quantization}


def _tell_base(peft_config: PeftConfig, base: str) -> None:
    own = peft_config.base_model_name_or_path
    if own and Path(own).name != Path(base).name:
        say(f"CHECKPOINT: the adapter was trained on {own}; the recipe's model_name_or_path, {base}, is taken.")
