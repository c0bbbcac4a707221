"""Values of a recipe that transformers, torch and accelerate refuse only when they use them, tried before anything is
loaded, on parts without weights. Each is a UserError that begins with its key."""

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from importlib.util import find_spec
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import Trainer, get_scheduler
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_bitsandbytes_available

from mdpo.config.adapters import bare_model, refuse_targets, refuse_unknown_kwargs
from mdpo.config.effects import reads_targets
from mdpo.config.parsing import nearest
from mdpo.console import first_line, is_main_process
from mdpo.errors import UserError
from mdpo.loss.health import health_names
from mdpo.loss.metrics import COLUMNS, averages
from mdpo.ranks import row_ranks

OF_TRAINER = {"loss", "pairs", "num_tokens", "runtime", "samples_per_second", "steps_per_second"}
MEANT = {"accuracy": "rewards/accuracies", "margin": "rewards/margins"}  # what DPO calls them
OF_TURNS = re.compile(r"(margins|pairs)/turn_[1-9]\d*|(accuracies|margins|pairs)/[1-9]\d*_turns")
UNLISTED = {"flyte": "flytekit", "azure_ml": "azureml"}  # transformers' list of what is installed may lack them
READ_BY_SOME = ("optim_args", "adam_beta1", "adam_beta2", "adam_epsilon")


def refuse_late_values(args: Any, model: Any) -> list[str]:
    """The checks without a model; `args` is MDPOConfig, `model` trl.ModelConfig. Returns lines. Raises UserError."""
    _refuse_trackers(args.report_to or [])
    _refuse_login(args)
    _refuse_best_model(args)
    _refuse_kwargs(args)
    _refuse_loader(args)
    _refuse_model_values(model)
    targeted = args.optim_target_modules and reads_targets(args.optim)  # such an optimizer is made for a model
    _refuse_schedule(args, _plain_optimizer(args) if targeted else _dummy_optimizer(args))
    return [] if targeted else list(_unread(args))


def metric_names(args: Any) -> set[str]:
    """What an evaluation yields, without `eval_` and without metrics by turn, whose number depends on the data."""
    names = set(averages(torch.zeros(1, len(COLUMNS), dtype=torch.float64)))
    names -= set() if args.nll_coefficient else {"nll_loss"}
    return names | health_names() | OF_TRAINER


def _refuse_best_model(args: Any) -> None:
    name = args.metric_for_best_model
    if name is None:
        if args.save_strategy == "best":
            raise UserError("save_strategy: best needs metric_for_best_model, such as rewards/accuracies or loss.")
        return
    plain, known = name.removeprefix("eval_"), metric_names(args)
    if plain not in known and not OF_TURNS.fullmatch(plain):
        near = MEANT.get(plain.removeprefix("eval_")) or nearest(plain.removeprefix("eval_"), known)
        meant = f" Did you mean {near}?" if near else ""
        raise UserError(f"metric_for_best_model: {name!r} is not one of {', '.join(sorted(known))}.{meant}")
    if args.eval_strategy == "no" and (args.save_strategy == "best" or args.load_best_model_at_end):
        key = "save_strategy: best" if args.save_strategy == "best" else "load_best_model_at_end: it"
        raise UserError(f"{key} needs evaluations; set eval_strategy.")
    if args.deepspeed_plugin is not None and args.save_only_model and args.load_best_model_at_end:
        raise UserError(
            "save_only_model: under DeepSpeed load_best_model_at_end needs complete checkpoints. Leave it out."
        )


def _refuse_trackers(names: list[str]) -> None:
    installed = get_available_reporting_integrations()
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise UserError(f"report_to: {name!r} is not one of none, all, {', '.join(INTEGRATION_TO_CALLBACK)}.")
        if name not in installed and not (name in UNLISTED and find_spec(UNLISTED[name])):
            raise UserError(f"report_to: {name}: its package is not installed. Install it, or leave it out.")


def _refuse_login(args: Any) -> None:
    """push_to_hub without a login would fail after the data, or after training."""
    if not args.push_to_hub or not is_main_process():
        return
    from huggingface_hub import constants, get_token, whoami

    if constants.HF_HUB_OFFLINE:
        raise UserError("push_to_hub: HF_HUB_OFFLINE is set, so that nothing can be pushed. Leave one of the two out.")
    if not (token := args.hub_token or get_token()):
        raise UserError("push_to_hub: there is no login. Type `hf auth login`, or set HF_TOKEN.")
    try:
        whoami(token)
    except Exception as error:  # the hub's own, a proxy's, a socket's
        raise UserError(f"push_to_hub: the hub does not take this login: {first_line(error)}") from error


def _refuse_kwargs(args: Any) -> None:
    """gradient_checkpointing_kwargs go to torch.utils.checkpoint at the first step."""
    if "torch_dtype" in (args.model_init_kwargs or {}):
        raise UserError("model_init_kwargs: torch_dtype is called dtype, which is a key of its own; set that.")
    known = set(inspect.signature(checkpoint).parameters) - {"function", "args", "kwargs"}
    known |= {"every_n_layers", "offload"}  # Trainer's
    for key, value in (args.gradient_checkpointing_kwargs or {}).items():
        if key not in known:
            raise UserError(f"gradient_checkpointing_kwargs: {key!r} is not one of {', '.join(sorted(known))}.")
        if key in ("use_reentrant", "preserve_rng_state", "offload") and not isinstance(value, bool):
            raise UserError(f"gradient_checkpointing_kwargs: {key}: {value!r} is not true or false.")
    config = args.accelerator_config
    for key, wanted in (("split_batches", False), ("dispatch_batches", None), ("even_batches", True)):
        if getattr(config, key) not in (wanted, wanted or False):
            raise UserError(f"accelerator_config: {key}: {getattr(config, key)} is not supported; leave it out.")
    if "num_steps" in (config.gradient_accumulation_kwargs or {}):
        raise UserError("accelerator_config: num_steps: use gradient_accumulation_steps.")


def _refuse_loader(args: Any) -> None:
    """torch knows which options need workers."""
    if args.dataloader_persistent_workers and not args.dataloader_num_workers:
        raise UserError("dataloader_persistent_workers: needs dataloader_num_workers.")
    if args.dataloader_multiprocessing_context is not None and not args.dataloader_num_workers:
        raise UserError("dataloader_multiprocessing_context: needs dataloader_num_workers.")
    with _named("dataloader_multiprocessing_context"):
        DataLoader(
            [0],
            None,
            num_workers=args.dataloader_num_workers,
            multiprocessing_context=args.dataloader_multiprocessing_context,
        )


def _refuse_model_values(model: Any) -> None:
    name = model.attn_implementation
    known = {"eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()}
    if name is not None and "/" not in name and name.removeprefix("paged|") not in known:
        near = nearest(name, known)
        raise UserError(f"attn_implementation: {name!r} is not known." + (f" Did you mean {near}?" if near else ""))
    for key in ("load_in_4bit", "load_in_8bit"):
        if getattr(model, key) and not is_bitsandbytes_available():
            raise UserError(f"{key}: bitsandbytes is not installed; `pip install bitsandbytes`.")
    if model.load_in_4bit and model.bnb_4bit_quant_storage is not None:
        if not isinstance(getattr(torch, model.bnb_4bit_quant_storage, None), torch.dtype):
            raise UserError(f"bnb_4bit_quant_storage: {model.bnb_4bit_quant_storage!r} is no dtype of torch.")


# ---------------------------------------------------------------------------------------------------- the optimizer


def refuse_unfit(args: Any, peft_config: Any, config: Any) -> None:
    """Raises UserError where LoRA's targets, or those of the optimizer, are no part of the model of `config`, or
    model_init_kwargs are not for it. With `config` None (unknown) nothing is checked."""
    if config is not None:
        refuse_unknown_kwargs(args.model_init_kwargs or {}, config)
    model = bare_model(config) if config is not None and (peft_config or args.optim_target_modules) else None
    if model is None:
        return
    if peft_config:
        refuse_targets(model, peft_config)
    if args.optim_target_modules:
        with _named("optim_target_modules", f" (optim: {args.optim.value})"):
            Trainer.get_optimizer_cls_and_kwargs(args, model)


def _dummy_optimizer(args: Any) -> torch.optim.Optimizer:
    """The recipe's optimizer over one number; another, where DeepSpeed's configuration brings its own."""
    if args.deepspeed_plugin is not None and "optimizer" in args.deepspeed_plugin.deepspeed_config:
        return _plain_optimizer(args)
    for part in (args.optim_args or "").split(",") if args.optim_args else []:
        if part.count("=") != 1:
            raise UserError(f"optim_args: {part.strip()!r} is not NAME=VALUE; give them between commas.")
    key = "optim_args" if args.optim_args else "optim"
    with _named(key, f" (optim: {args.optim.value})"):
        kind, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer):
            kind([_parameter()], **{name: value for name, value in kwargs.items() if name != "model"})
    return _plain_optimizer(args)


def _plain_optimizer(args: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([_parameter()], lr=args.learning_rate)  # schedules compare their own values with it


def _parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(1))


def _unread(args: Any) -> Iterator[str]:
    """A line for each option of optimizers that this one does not read."""
    optimizer = Trainer.get_optimizer_cls_and_kwargs(args)
    for key in READ_BY_SOME:
        default = type(args).__dataclass_fields__[key].default
        if getattr(args, key) == default:
            continue
        other = copy(args)
        setattr(other, key, default)
        if Trainer.get_optimizer_cls_and_kwargs(other) == optimizer:
            yield f"{key}: has no effect with optim: {args.optim.value}."


def _refuse_schedule(args: Any, optimizer: torch.optim.Optimizer) -> None:
    kind, kwargs, steps = args.lr_scheduler_type.value, args.lr_scheduler_kwargs, max(args.max_steps, 100)
    if kwargs and kind in ("constant", "constant_with_warmup"):
        raise UserError(f"lr_scheduler_kwargs: has no effect with lr_scheduler_type: {kind}, which takes none.")
    with _named("lr_scheduler_kwargs", f" (lr_scheduler_type: {kind})"):
        schedule = get_scheduler(kind, optimizer, args.get_warmup_steps(steps), steps, dict(kwargs or {}))
        for _ in range(3):
            optimizer.step()
            if kind in ("reduce_lr_on_plateau", "greedy"):
                schedule.step(1.0)
            else:
                schedule.step()


@contextmanager
def _named(key: str, where: str = "") -> Iterator[None]:
    """Turns what is raised inside into a UserError of one line that begins with the key."""
    try:
        yield
    except Exception as error:  # of foreign parts, which raise whatever they like at a value
        key = "optim" if isinstance(error, ImportError) and key.startswith("optim") else key
        words = re.sub(r"\b\w*\.?__init__\(\) |\bget_\w+_schedule\w*\(\) ", "", first_line(error))
        raise UserError(f"{key}: {words or type(error).__name__}{where}.") from error


# ---------------------------------------------------------------------------------------------------- with the data


def check_steps(args: Any, pairs: int) -> list[str]:
    """For a training dataset of `pairs`: raises UserError where dataloader_drop_last leaves no step, and returns a line
    where warm-up outlasts training."""
    batch = args.per_device_train_batch_size * (args.world_size // row_ranks())
    if args.dataloader_drop_last and pairs < batch:
        raise UserError(
            f"dataloader_drop_last: {pairs} pairs are fewer than a batch of all processes ({batch}), and no step would "
            "be made. Leave it out, or lower per_device_train_batch_size."
        )
    batches = pairs // batch if args.dataloader_drop_last else -(-pairs // batch)
    each = max(-(-batches // args.gradient_accumulation_steps), 1)
    steps = args.max_steps if args.max_steps > 0 else int(-(-each * args.num_train_epochs // 1))
    if args.get_warmup_steps(steps) >= steps > 0 and args.warmup_steps >= 1:
        return [f"warning: warmup_steps: {args.warmup_steps:g} are not over after all {steps} steps."]
    return []
