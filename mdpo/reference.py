"""The frozen reference: where it comes from, and its log-probs of the same tokens."""

import copy
from contextlib import contextmanager, nullcontext

import torch
from transformers import AutoModelForCausalLM

from mdpo.logprobs import TokenScores, enable_scoring, score_tokens
from mdpo.types import UserError


def load_model(name_or_path: str, **kwargs):
    """A causal language model for training or as reference. Raises UserError where it cannot be had."""
    try:
        return AutoModelForCausalLM.from_pretrained(name_or_path, **kwargs)
    except (OSError, ValueError, ImportError) as e:
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise UserError(
            f"model {name_or_path!r} cannot be loaded: {reason}\n"
            "Where the hub cannot be reached, set model_name_or_path (or ref_model_name_or_path) to a local folder."
        ) from e


def build_reference(model, name_or_path: str | None, init_kwargs: dict):
    """The reference beside a fully trained policy, on the policy's dtype and attention: from `name_or_path`, else from
    the path that the policy was loaded from (under ZeRO-3 its weights are already partitioned), else a copy."""
    path = name_or_path or getattr(model.config, "_name_or_path", "")
    if path:
        if name_or_path:  # the revision is the policy's
            init_kwargs = {k: v for k, v in init_kwargs.items() if k != "revision"}
        kwargs = {"dtype": model.dtype, "attn_implementation": model.config._attn_implementation, **init_kwargs}
        return load_model(path, **kwargs)
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        raise UserError("Under ZeRO-3 the reference needs a path: set ref_model_name_or_path, or pass ref_model.")
    return copy.deepcopy(model)


def place_reference(model, accelerator):
    """Frozen, in evaluation mode, ready to score: sharded by its own engine under ZeRO-3, whole on the device else."""
    model.requires_grad_(False).eval()
    enable_scoring(model)
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None or plugin.zero_stage != 3:
        return model.to(accelerator.device)
    import deepspeed

    config = copy.deepcopy(plugin.deepspeed_config)
    for training_only in ("optimizer", "scheduler"):
        config.pop(training_only, None)
    config["zero_optimization"].pop("offload_optimizer", None)
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()  # returns None
    return engine


@contextmanager
def _without_checkpointing(model, kwargs):
    """Gradient checkpointing recomputes nothing without gradients, and warns when it is asked to."""
    on = model.is_gradient_checkpointing
    if on:
        model.gradient_checkpointing_disable()
    try:
        yield
    finally:
        if on:
            model.gradient_checkpointing_enable(kwargs)


def score_reference(reference, policy, accelerator, batch, checkpointing_kwargs=None) -> TokenScores:
    """The reference's scores of the batch's supervised tokens, without gradient, in the policy's precision.
    `reference` None means that the policy is a PEFT model and its own reference; `policy` is then called as it was
    wrapped for training."""
    own, unwrapped = reference is None, accelerator.unwrap_model(policy)
    with (
        torch.no_grad(),
        accelerator.autocast(),
        unwrapped.disable_adapter() if own else nullcontext(),
        _without_checkpointing(unwrapped, checkpointing_kwargs) if own else nullcontext(),
    ):
        return score_tokens(policy if own else reference, batch)
