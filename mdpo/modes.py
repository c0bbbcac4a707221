"""A model that is deterministic for a while, and generators that stand afterwards where they stood."""

from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module):
    """Within it no module of the model is in training mode; then each is again in the mode that it was in."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def generators_kept(device: torch.device):
    """A context whose draws from torch's generators, of the CPU and of `device`, no one sees afterwards."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])
