"""Unwraps a PEFT model; puts a model into evaluation mode for a while."""

from contextlib import contextmanager

from torch import nn


def base_model(model):
    """The model inside a PEFT model; any other model as it is."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


@contextmanager
def evaluating(model: nn.Module):
    """Within it no module of the model is in training mode; afterwards each has its old mode back."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
