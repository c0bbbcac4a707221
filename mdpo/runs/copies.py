"""Copies of a model's weights, apart from the engine that trains it."""

import torch


def copied(model) -> dict[str, torch.Tensor]:
    """A model's weights in CPU memory, apart from the buffers of an engine that they are views of. Tied ones stay one
    tensor, so that they are written once; of a PEFT model only what is trained is copied."""
    copies: dict[tuple, torch.Tensor] = {}
    weights, adapted = {}, hasattr(model, "peft_config")
    for name, weight in model.state_dict(keep_vars=True).items():
        if not isinstance(weight, torch.Tensor) or (adapted and not weight.requires_grad):
            weights[name] = weight
            continue
        storage = (weight.data_ptr(), weight.shape, weight.stride(), weight.dtype) if weight.numel() else (name,)
        if storage not in copies:
            copies[storage] = weight.detach().to("cpu", copy=True)
        weights[name] = copies[storage]
    return weights
