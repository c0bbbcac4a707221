"""A model within its wrappers; one that is deterministic for a while, then as it was."""

from contextlib import contextmanager

from torch import nn


def base_model(model):
    """What a PEFT model was put on; any other model as it is."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


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
