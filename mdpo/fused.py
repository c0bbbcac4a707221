"""Elementwise work in one pass over memory: RMS norms and gated activations of the model's own code, compiled.

What a compiled module computes is its class's own forward; a look at one of each kind, in values and gradients, decides
at the start whether it is used. Matrix products stay where they are, so ZeRO-3's hooks and PEFT see the same modules.
"""

import copy
import types
from collections.abc import Callable
from functools import cache

import torch
from torch import nn

MIN_WIDTH = 256  # hidden sizes below are not bound by memory traffic; a call of compiled code costs more than it saves
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@cache
def compiled(function: Callable) -> Callable:
    """The function compiled once, for any sizes."""
    return torch.compile(function, dynamic=True)


@cache
def _gate(activation: type[nn.Module]) -> Callable:
    """(gate, up) → activation(gate) · up."""
    act = activation()
    return compiled(lambda gate, up: act(gate) * up)


def _gated_forward(self, x):
    """Of what backward needs, gate and up are kept, and their product is computed again. Inside non-reentrant gradient
    checkpointing nothing is kept anyway, and hooks of ours would take the place of its own."""
    product, gate, up = _gate(type(self.act_fn)), self.gate_proj(x), self.up_proj(x)
    inner = product(gate, up)
    if not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return self.down_proj(inner)
    version, address, size = inner._version, inner.data_ptr(), inner.numel()

    def pack(tensor):
        same = tensor.data_ptr() == address and tensor.numel() == size and tensor._version == version
        return tensor.shape if same and tensor.is_contiguous() else tensor

    def unpack(kept):
        if isinstance(kept, torch.Tensor):
            return kept
        with torch.no_grad():
            return product(gate.detach(), up.detach()).view(kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return self.down_proj(inner)


def fuse(model, device) -> tuple[bool, str | None]:
    """Gives norms and gated MLPs of the model, before any PEFT wrapping, their compiled forward, on `device`. Returns
    whether all is compiled, and where it cannot be, a line for the terminal; models of less than MIN_WIDTH stay as they
    are without one."""
    if model.config.get_text_config().hidden_size < MIN_WIDTH:
        return False, None
    kinds: dict[type, list[nn.Module]] = {}
    for module in model.modules():
        if is_norm(module) or is_gated(module):
            kinds.setdefault(type(module), []).append(module)
    for kind, modules in kinds.items():
        try:
            forward = compiled(kind.forward) if is_norm(modules[0]) else _gated_forward
            same = agrees(modules[0], forward, device)
        except Exception as error:  # no compiler, or a compiler's own trouble: training goes on without it
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
            return False, f"fused_ops: off for {kind.__name__}: {why}"
        if not same:
            return False, f"fused_ops: off for {kind.__name__}: compiled, it does not give the same numbers."
        for module in modules:
            module.forward = types.MethodType(forward, module)
    return True, None


def is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("RMSNorm") and [n for n, _ in module.named_parameters()] == ["weight"]


def is_gated(module: nn.Module) -> bool:
    """Also where the projections carry an adapter already."""
    parts = [getattr(module, part, None) for part in ("gate_proj", "up_proj", "down_proj")]
    if not all(isinstance(part, nn.Module) and hasattr(part, "weight") for part in parts):
        return False
    return isinstance(getattr(module, "act_fn", None), nn.Module) and not list(module.act_fn.parameters())


def agrees(module: nn.Module, forward: Callable, device) -> bool:
    """Whether `forward` gives a stand-in for the module, with random weights, what its class's forward gives it."""
    stand_in = copy.copy(module)
    stand_in._parameters, stand_in._modules = dict(module._parameters), dict(module._modules)
    weight = module.weight if is_norm(module) else module.gate_proj.weight
    width = getattr(weight, "ds_shape", weight.shape)[0 if is_norm(module) else 1]
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(device, weight.dtype).requires_grad_()

    if is_norm(module):
        stand_in._parameters["weight"] = nn.Parameter(random(width).detach())
    else:
        for name, shape in (("gate_proj", (24, width)), ("up_proj", (24, width)), ("down_proj", (width, 24))):
            stand_in._modules[name] = nn.Linear(shape[1], shape[0], bias=False, device=device, dtype=weight.dtype)
            stand_in._modules[name].weight = nn.Parameter(random(*shape).detach() / width**0.5)
    x, upstream = random(2, 7, width), random(2, 7, width).detach()
    inputs, results = [x, *stand_in.parameters()], []
    for function in (type(module).forward, forward):
        with torch.enable_grad():
            out = function(stand_in, x)
            results.append([out.detach(), *torch.autograd.grad(out, inputs, upstream)])
    limit = TOLERANCE.get(weight.dtype, 5e-2)
    return all((a - b).norm() <= limit * a.norm() for a, b in zip(*results, strict=True))
