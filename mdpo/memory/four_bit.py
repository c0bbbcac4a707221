"""Weights that bitsandbytes packs into four bits."""

from torch import nn

from mdpo.forward.modes import base_model


def four_bit(weight: nn.Parameter, nested: bool) -> float:
    """Bytes of bitsandbytes' form: 4 bits each and a float32 scale for 64; with nested quantization a byte for 64 and a
    float32 for 256 of those."""
    blocks = weight.numel() / 64
    return weight.numel() / 2 + (blocks * (1 + 4 / 256) if nested else 4 * blocks)


def four_bit_weights(model: nn.Module) -> list[nn.Parameter]:
    """Those that bitsandbytes packs: frozen matrices of linear layers, all but the LM head's."""
    head = base_model(model).get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    return [m.weight for m in linear if not m.weight.requires_grad]
