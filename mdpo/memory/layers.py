"""A deep model's step from those of two shallow ones: with layers that are all alike, each adds the same bytes."""

import copy
from collections.abc import Callable

import torch
from torch import nn

from mdpo.forward.modes import base_model
from mdpo.memory.fake_step import FakeModel

SHALLOW = (2, 4)  # layers


class DeepModel(FakeModel):
    """A FakeModel whose steps are counted on two `shallow` ones, of SHALLOW layers. What is saved for backward grows by
    the same with each layer, and so does every moment that could be the peak."""

    def __init__(self, shallow: list[FakeModel], layers: int, *args, **kwargs):
        self.shallow, self.layers = shallow, layers
        super().__init__(*args, **kwargs)

    def training(self, *args) -> dict[str, int]:
        return self._deep([model.training(*args) for model in self.shallow])

    def evaluation(self, *args) -> dict[str, int]:
        return self._deep([model.evaluation(*args) for model in self.shallow])

    def _deep(self, sizes: list[dict[str, int]]) -> dict[str, int]:
        first, second = sizes
        more, of = self.layers - SHALLOW[0], SHALLOW[1] - SHALLOW[0]
        return {part: first[part] + (second[part] - first[part]) * more // of for part in first}


def alike(config, make: Callable[[], nn.Module], peft) -> bool:
    """Whether all layers of a model are of one kind and shape and adapted alike, so that they may be fewer."""
    text = config.get_text_config()
    if text.num_hidden_layers <= SHALLOW[1] or len(set(getattr(text, "layer_types", None) or [0])) > 1:
        return False
    if peft is not None and any(getattr(peft, name, None) for name in ("layers_to_transform", "rank_pattern")):
        return False
    with torch.device("meta"):
        layers = getattr(getattr(base_model(make()), "model", None), "layers", None)
    if layers is None or len(layers) != text.num_hidden_layers:
        return False
    return len({tuple((name, p.shape) for name, p in layer.named_parameters()) for layer in layers}) == 1


def with_layers(config, n: int):
    """A copy of a model's configuration with `n` layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1] * n
    text.num_hidden_layers = n
    return config
