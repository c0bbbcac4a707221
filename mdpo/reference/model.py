"""The reference: where it comes from, its log-probs of the same tokens, and reference sync (TR-DPO)."""

import copy
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from mdpo.config.precision import HALF, cast_weights
from mdpo.errors import UserError
from mdpo.forward.compiled_ops import fuse
from mdpo.forward.modes import base_model, evaluating
from mdpo.forward.scoring_head import own_attention
from mdpo.forward.token_logps import TokenScores, enable_scoring, score_tokens
from mdpo.reference.fingerprint import OWN_ADAPTER
from mdpo.reference.loading import load_model

MOVED = "reference"  # folder inside a checkpoint


def partitioned(model) -> bool:
    """Whether ZeRO-3 has spread the model's weights over the ranks."""
    return any(hasattr(weight, "ds_id") for weight in model.parameters())


def build_reference(model, name_or_path: str | None, init_kwargs: dict, made_by_caller: bool = False):
    """The reference beside a fully trained policy, with the policy's dtype and attention: from `name_or_path`, else
    from the path that the policy was loaded from (under ZeRO-3 its weights are already partitioned), else a copy. A
    caller may have changed a model since it was loaded (`merge_and_unload` leaves the base's path): it is copied."""
    path = name_or_path or getattr(model.config, "_name_or_path", "")
    sharded = partitioned(model)
    if name_or_path or (path and (sharded or not made_by_caller)):
        if name_or_path:  # the revision is the policy's
            init_kwargs = {k: v for k, v in init_kwargs.items() if k != "revision"}
        inner = base_model(model)
        kwargs = {"dtype": inner.dtype, "attn_implementation": own_attention(inner), **init_kwargs}
        return load_model(path, **kwargs)
    if sharded:
        raise UserError("Under ZeRO-3 the reference needs a path: set ref_model_name_or_path, or pass ref_model.")
    reference = copy.deepcopy(model)
    if hasattr(reference, "peft_config"):
        if reference.active_peft_config.is_prompt_learning:
            return reference.get_base_model()
        reference.base_model.disable_adapter_layers()  # for good: the model that the adapter was put on
    return reference


def place_reference(model, accelerator, fused: bool = False, dtype: torch.dtype | None = None):
    """Frozen, in evaluation mode, ready to score: sharded by its own engine under ZeRO-3, else whole on the device.
    `dtype` is what DeepSpeed casts the policy to; the reference then computes in it too."""
    model.requires_grad_(False).eval()
    cast_weights(model, dtype)
    inner = base_model(model)
    enable_scoring(inner, fused and fuse(inner, accelerator.device, together=False)[0])
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


def drop_weights(reference) -> None:
    """Frees a reference's shares of the weights under ZeRO-3, where dropping its engine does not: DeepSpeed keeps
    each model that it has sharded in a list and in a cache of its own."""
    for weight in reference.parameters() if reference is not None else ():
        if hasattr(weight, "ds_tensor"):
            weight.ds_tensor.data, weight.ds_secondary_tensor = weight.ds_tensor.data.new_empty(0), None


@contextmanager
def _without_checkpointing(model, kwargs):
    """Gradient checkpointing recomputes nothing without gradients, and warns about it."""
    enabled = model.is_activation_checkpointing
    if enabled:
        model.gradient_checkpointing_disable()
    try:
        yield
    finally:
        if enabled:
            model.gradient_checkpointing_enable(kwargs)


def score_reference(
    reference, policy, accelerator, batch, layout, checkpointing_kwargs=None, noisy=True
) -> TokenScores:
    """The reference's scores of the batch's supervised tokens, without gradient or noise, in the policy's precision.
    `reference` None means that the policy is its own: a PEFT model, or any before training. `policy` is then called as
    it was wrapped for training, and where it may be `noisy` there, in evaluation mode; not otherwise, as RWKV changes
    its weights with the mode, between the policy's forward and its backward."""
    own, unwrapped = reference is None, accelerator.unwrap_model(policy)
    with (
        torch.no_grad(),
        accelerator.autocast(),
        as_reference(unwrapped) if own else nullcontext(),
        evaluating(unwrapped) if own and noisy else nullcontext(),
        _without_checkpointing(unwrapped, checkpointing_kwargs) if own else nullcontext(),
    ):
        model = policy if own else reference
        return score_tokens(model, layout.fit(model, batch))


@contextmanager
def as_reference(model):
    """Within it a PEFT model is what it was when training began: its own adapter's copy, or no adapter."""
    if not hasattr(model, "peft_config"):
        yield
    elif OWN_ADAPTER in model.peft_config:
        trained = model.active_adapter
        model.set_adapter(OWN_ADAPTER)
        try:
            yield
        finally:
            model.set_adapter(trained)
    else:
        with model.disable_adapter():
            yield


def keep_own_adapter(model) -> None:
    """Gives a PEFT policy a frozen copy of the adapter that it came with; that copy is the reference. Raises UserError
    where the copy would not be complete."""
    trained, before = model.active_adapter, {name for name, _ in model.named_parameters()}
    model.add_adapter(OWN_ADAPTER, model.peft_config[trained])
    weights = dict(model.named_parameters())
    copies = set(weights) - before
    for name in before:
        parts = name.split(".")
        # The adapter's name is one part, the last one of parameters that PEFT keeps in a dict; others may equal it.
        indices = [i for i, part in enumerate(parts) if part == trained]
        for copy_name in (".".join([*parts[:i], OWN_ADAPTER, *parts[i + 1 :]]) for i in indices):
            if copy_name in copies:
                weights[copy_name].data.copy_(weights[name].data)
                weights[copy_name].requires_grad_(False)
                copies.remove(copy_name)
    if copies:
        raise UserError(
            f"The policy's adapter {trained!r} cannot be copied as its own reference ({sorted(copies)[0]} has no "
            "counterpart). Merge it into the model, or set ref_model_name_or_path."
        )


# ------------------------------------------------------------------------------------------------- reference sync


def refuse_sync(policy) -> None:
    if hasattr(policy, "peft_config"):
        raise UserError("sync_ref_model: an adapter's weights cannot be mixed into a whole reference. Leave one out.")


def lost_in_sync(reference, alpha: float) -> list[str]:
    """A line where mixing rounds away what it should add up: at α = 1 the reference becomes the policy, whatever the
    dtype, else a weight moves by whole steps of its precision or not at all."""
    dtype = next(reference.parameters()).dtype
    if alpha == 1 or dtype not in HALF:
        return []
    return [
        f"warning: sync_ref_model mixes weights in {str(dtype).removeprefix('torch.')}, whose rounding makes small "
        f"differences times ref_model_mixup_alpha {alpha} nothing or a whole step. With ref_model_mixup_alpha: 1.0 the "
        "reference becomes the policy exactly."
    ]


class SyncReference(TrainerCallback):
    """Every `ref_model_sync_steps` steps π_ref ← α π + (1 − α) π_ref with α = `ref_model_mixup_alpha`, weight by weight
    (TR-DPO, arXiv 2404.09656)."""

    def __init__(self, reference, accelerator):
        self.reference, self.accelerator = reference, accelerator

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % args.ref_model_sync_steps:
            return
        policy = self.accelerator.unwrap_model(model).parameters()
        for own, moved in zip(policy, self.accelerator.unwrap_model(self.reference).parameters(), strict=True):
            with whole(own), whole(moved, writes=True):
                moved.data.lerp_(own.data.to(moved.dtype), args.ref_model_mixup_alpha)


@contextmanager
def whole(parameter, writes: bool = False):
    """Within it a parameter that ZeRO-3 has partitioned is whole on every rank. With `writes` rank 0's value stays."""
    if not hasattr(parameter, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if writes else None):
        yield


def save_moved(reference, accelerator, folder: str) -> None:
    """The synced reference as safetensors inside a checkpoint. All ranks call it together."""
    state = accelerator.get_state_dict(reference)
    if accelerator.is_main_process:
        accelerator.unwrap_model(reference).save_pretrained(Path(folder, MOVED), state_dict=state)


def load_moved(reference, accelerator, folder: str) -> None:
    """Puts the reference back to where it had moved. Raises UserError where the checkpoint does not contain it."""
    files = sorted(Path(folder, MOVED).glob("*.safetensors"))
    if not files:
        raise UserError(
            f"resume_from_checkpoint: {folder} does not contain the reference that sync_ref_model had moved. Resume "
            "from a checkpoint of a run with sync_ref_model, or start afresh."
        )
    saved = {name: weight for file in files for name, weight in load_file(file).items()}
    missing = []
    for name, weight in accelerator.unwrap_model(reference).named_parameters():
        with whole(weight, writes=True):
            if name in saved:
                weight.data.copy_(saved[name])
            else:
                missing.append(name)
    if missing:
        raise UserError(f"resume_from_checkpoint: {folder}/{MOVED} lacks {len(missing)} weights, such as {missing[0]}.")
