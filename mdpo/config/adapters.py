"""LoRA's targets are checked against the modules of the model, built without weights, before these are loaded."""

import inspect
import re
from copy import deepcopy
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel
from transformers.models.auto import auto_factory
from trl import get_peft_config

from mdpo.config.parsing import nearest
from mdpo.errors import UserError

ALL_LINEAR = "all-linear"
MODULE_NAME = re.compile(r"[\w.]+")


def adapter_config(model: Any) -> PeftConfig | None:
    """PEFT's configuration of a trl.ModelConfig, None without use_peft. Raises UserError."""
    if model.use_peft and not model.lora_alpha:
        raise UserError("lora_alpha: 0 makes the adapter's share of the model 0, and nothing would be learned.")
    try:
        return get_peft_config(model)
    except (ValueError, TypeError) as error:
        raise UserError(f"{_at_fault(str(error), None)}: {error}") from error


def one_entry(model: Any) -> None:
    """trl.ModelConfig turns a list of one entry into a text, and PEFT takes a text as a pattern, which has to match a
    module's whole path. A module's name goes back into a list, where PEFT takes it as the end of a path."""
    target = model.lora_target_modules
    if isinstance(target, str) and target != ALL_LINEAR and MODULE_NAME.fullmatch(target):
        model.lora_target_modules = [target]


def bare_model(config: Any) -> torch.nn.Module | None:
    """The model of a configuration with weights that have no data; None where transformers itself has no such class,
    or cannot build it so."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    config = deepcopy(config)
    config._attn_implementation = "eager"  # nothing is computed, and any other may ask for a GPU
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    try:
        with torch.device("meta"):
            return (kind[0] if isinstance(kind, tuple) else kind)(config)
    except Exception:  # loading says what is wrong with it
        return None


def refuse_unknown_kwargs(kwargs: dict[str, Any], config: Any) -> None:
    """Raises UserError for a key of model_init_kwargs that is neither a value of the model's configuration nor named
    anywhere in transformers' loading: it would be passed on to the model's class, which refuses it."""
    source = inspect.getsource(PreTrainedModel.from_pretrained) + inspect.getsource(auto_factory)
    for key in kwargs:
        if not (hasattr(config, key) or re.search(rf"\b{re.escape(key)}\b", source)):
            near = nearest(key, [name for name in config.to_dict() if len(name) > 3])
            meant = f" Did you mean {near}?" if near else ""
            raise UserError(f"model_init_kwargs: {key!r} is no value of {type(config).__name__}.{meant}")


def refuse_targets(model: torch.nn.Module, peft_config: PeftConfig) -> None:
    """Raises UserError, with the name that was probably meant, for each target that is no part of `model`; and for what
    PEFT refuses when it puts the adapter on, which happens here: `model` is changed. Experts' layers may have the names
    that they have in checkpoints (gate_proj, w1), which PEFT turns into those of the stacked weights."""
    modules = [name for name, _ in model.named_modules() if name]
    wanted = deepcopy(peft_config)
    try:
        convert_peft_config_for_transformers(wanted, model, None)
    except ValueError as error:
        raise UserError(f"lora_target_modules: {error}") from error
    _refuse_strangers("lora_target_modules", wanted.target_modules, modules)
    _refuse_strangers("lora_modules_to_save", wanted.modules_to_save, modules)
    parameters = [name for name, _ in model.named_parameters()]
    _refuse_strangers("lora_target_parameters", getattr(wanted, "target_parameters", None), parameters)
    if peft_config.task_type != "CAUSAL_LM":
        raise UserError(f"lora_task_type: {peft_config.task_type} is not supported; leave it out.")
    try:
        get_peft_model(model, deepcopy(peft_config), autocast_adapter_dtype=False)
    except Exception as error:  # of a foreign part, which raises whatever it likes at a value
        key = _at_fault(str(error), peft_config)
        words = " ".join(str(error).split())[:160]
        raise UserError(f"{key}: PEFT cannot put this adapter on {type(model).__name__}: {words}") from error


def _refuse_strangers(key: str, wanted: Any, names: list[str]) -> None:
    if isinstance(wanted, str) and wanted != ALL_LINEAR:
        try:
            matched = any(re.fullmatch(wanted, name) for name in names)
        except re.error as error:
            raise UserError(f"{key}: {wanted!r} is no pattern: {error}.") from None
        if not matched:
            raise UserError(f"{key}: the pattern {wanted!r} matches no whole path of a module, such as {names[-1]}.")
    for entry in [] if wanted is None or isinstance(wanted, str) else sorted(wanted):
        if not any(name == entry or name.endswith(f".{entry}") for name in names):
            deep = 2 if key == "lora_target_parameters" else 1
            ends = dict.fromkeys(".".join(name.split(".")[-deep:]) for name in names if not name[-1].isdigit())
            near = ALL_LINEAR if entry.lower() == "all_linear" else nearest(entry, ends)
            known = f"Did you mean {near}?" if near else f"It has {', '.join(ends)}."
            raise UserError(f"{key}: {entry!r} is no part of the model. {known}")


def _at_fault(message: str, peft_config: PeftConfig | None) -> str:
    """The key that a refusal of PEFT is about, as far as its words tell."""
    words = {
        "`r`": "lora_r",
        "rank": "lora_r",
        "dropout": "lora_dropout",
        "dora": "use_dora",
        "task type": "lora_task_type",
    }
    keys = [key for word, key in words.items() if word in message.lower()]
    if keys:
        return keys[0]
    return "lora_target_parameters" if getattr(peft_config, "target_parameters", None) else "lora_target_modules"
