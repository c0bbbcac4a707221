"""Switches off everything random in a model's training mode: dropout layers, and rates that its own code passes on.

With dropout on, log ratios of a policy that equals its reference are noise: the first loss is not ln 2.
"""

import re
from contextlib import contextmanager

import torch
from torch import nn

from mdpo.errors import UserError
from mdpo.forward.modes import evaluating
from mdpo.forward.token_logps import score_tokens
from mdpo.types import PairBatch

RATE = re.compile(r"drop|jitter|noise")
# PhiMoE's router has a threshold of this name, in evaluation too; others copy the rate under another name.
NO_RATE = ("router_jitter_noise",)
TOKENS = 64  # of a row, whose log-probs are computed three times
BEFORE = "_mdpo_dropout_before"  # of a model: (configuration, field, value) of all that was switched off


def disable_dropout(model: nn.Module) -> None:
    """Sets every rate of dropout and of noise to 0: those of dropout modules, those that other modules keep as plain
    numbers (OPT, BioGPT, XGLM) and those of configurations, which attention reads at each call."""
    before = vars(model).setdefault(BEFORE, [])
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name in _rates(module):
            setattr(module, name, 0.0)
    for config in _configurations(model):
        for name in _rates(config):
            before.append((config, name, getattr(config, name)))
            setattr(config, name, 0.0)


def remember_cache(model: nn.Module) -> None:
    """Before Trainer sets `use_cache` for training: a saved model generates with it as the model that it came from."""
    before = vars(model).setdefault(BEFORE, [])
    before += [(c, "use_cache", c.use_cache) for c in _configurations(model) if "use_cache" in vars(c)]


@contextmanager
def configured(model: nn.Module):
    """Within it configurations have the rates and the `use_cache` that they came with, to be written beside weights."""
    before = vars(model).get(BEFORE, [])
    current = [(config, name, getattr(config, name)) for config, name, _ in before]
    for config, name, value in before:
        setattr(config, name, value)
    try:
        yield
    finally:
        for config, name, value in current:
            setattr(config, name, value)


def refuse_noise(model: nn.Module, accelerator, batch: PairBatch) -> None:
    """Raises UserError where the log-probs of a few tokens of a batch depend on the generator's state in training mode:
    then something random is left that has no rate (PhiMoE draws its experts); noise on embeddings (NEFTune) was
    requested and does not count. All ranks call it together."""
    ids = batch.input_ids[:1, :TOKENS]
    positions = torch.arange(ids.size(1) - 1, device=ids.device)
    row = PairBatch(input_ids=ids, attention_mask=torch.ones_like(ids), logp_position=positions, label=ids[0, 1:])

    def logps(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return score_tokens(model, row).logps

    device_type, inner = ids.device.type, accelerator.unwrap_model(model)
    with (
        torch.random.fork_rng([ids.device] if device_type == "cuda" else []),
        torch.no_grad(),
        accelerator.autocast(),
        evaluating(inner.get_input_embeddings()),
    ):
        base, repeated, reseeded = logps(0), logps(0), logps(1)
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else inner.dtype
    rounding, difference = ((base - x).abs().max() for x in (repeated, reseeded))  # a GPU's atomics add in any order
    allowed = 10 * rounding + torch.finfo(dtype).eps * base.abs().max()
    if accelerator.reduce((difference > allowed).float(), "sum") > 0:
        raise UserError(
            f"disable_dropout: {type(inner).__name__} draws at random in training mode by more than dropout, and no "
            f"option switches it off: log-probs of the same tokens differ by {difference.item():.1e}. It cannot be "
            "compared with a reference; disable_dropout: false trains it all the same."
        )


def _rates(owner) -> list[str]:
    """Names of the rates that an object has as plain numbers in (0, 1]."""
    numbers = {name: x for name, x in vars(owner).items() if isinstance(x, int | float) and not isinstance(x, bool)}
    return [name for name, x in numbers.items() if 0 < x <= 1 and RATE.search(name) and name not in NO_RATE]


def _configurations(model: nn.Module) -> list:
    """Of the model and its parts, each once, with the configurations inside them."""
    configs: dict[int, object] = {}
    pending = [module.config for module in model.modules() if hasattr(module, "config")]
    while pending:
        config = pending.pop()
        if id(config) not in configs and hasattr(config, "to_dict"):
            configs[id(config)] = config
            pending += [value for value in vars(config).values() if hasattr(value, "to_dict")]
    return list(configs.values())
