"""Compiled (torch.compile) RMS norms and gated activations: the model's own code, in one pass over memory.

A compiled module computes its class's own forward; at the start one of each kind is compared with it, in values and
gradients, to decide whether it is used. Matrix products are not moved, so ZeRO-3's hooks and PEFT see the same modules.
"""

import copy
import functools
import types
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit

from mdpo.console import first_line, say
from mdpo.forward.lm_head import chunk_statistics, logits_gradient

MIN_WIDTH = 256  # hidden sizes below are not bound by memory traffic; a call of compiled code costs more than it saves
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Compiled forms of one function that a run may need: dtypes, with gradients and without, of inputs and of weights,
# widths (Qwen3's heads have norms too), one row or more. Torch's own limit is 8, beyond which it says nothing.
VARIANTS = 64


@cache
def compiled(function: Callable) -> Callable:
    """The function compiled once, for any sizes. Past VARIANTS forms it runs uncompiled, and one line says so."""
    options: dict[str, Any] = {"recompile_limit": VARIANTS, "isolate_recompiles": True}
    fast = torch.compile(function, dynamic=True, fullgraph=True, **options)
    slow: list[bool] = []

    @functools.wraps(function)
    def call(*args):
        if not slow:
            try:
                return fast(*args)
            except FailOnRecompileLimitHit:
                slow.append(True)
                name = function.__qualname__
                say(f"fused_ops: {name} met more than {VARIANTS} kinds of input; it now runs uncompiled.")
        return function(*args)

    return call


def by_rows(function: Callable, *tensors: torch.Tensor) -> torch.Tensor:
    """function of tensors (…, H) of one shape as (N, H), so that one compiled form serves each number of dimensions. In
    the memory order of the first: Gemma-3's heads have been transposed."""
    like = tensors[0]
    order = sorted(range(like.dim() - 1), key=like.stride, reverse=True)
    inverse = [order.index(i) for i in range(like.dim() - 1)]
    ordered = [x.permute(*order, -1) for x in tensors]
    out = function(*(x.reshape(-1, x.size(-1)) for x in ordered))
    return out.view(*ordered[0].shape[:-1], -1).permute(*inverse, -1)


@cache
def _norm(kind: type[nn.Module]) -> Callable:
    """The class's forward, compiled."""
    function = compiled(kind.forward)

    def forward(self, x, *extra):
        return kind.forward(self, x, *extra) if extra else by_rows(lambda rows: function(self, rows), x)

    return forward


@cache
def _gate(activation: type[nn.Module]) -> Callable:
    """(gate, up) → activation(gate) · up."""
    act = activation()
    product = compiled(lambda gate, up: act(gate) * up)
    return lambda gate, up: by_rows(product, gate, up)


def _gated_forward(self, x):
    """For backward only gate and up are saved, and their product is recomputed. Inside non-reentrant gradient
    checkpointing nothing is saved anyway, and our hooks would replace its own."""
    product = _gate(type(self.act_fn))  # type: ignore[arg-type]  # as in `_same`
    gate, up = self.gate_proj(x), self.up_proj(x)
    inner = product(gate, up)
    if not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return self.down_proj(inner)
    version, address, size = inner._version, inner.data_ptr(), inner.numel()

    def pack(tensor):
        same = tensor.data_ptr() == address and tensor.numel() == size and tensor._version == version
        return tensor.shape if same and tensor.is_contiguous() else tensor

    def unpack(saved):
        if isinstance(saved, torch.Tensor):
            return saved
        with torch.no_grad():
            return product(gate.detach(), up.detach()).view(saved)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return self.down_proj(inner)


def fuse(model, device, together: bool = True) -> tuple[bool, str | None]:
    """Gives norms and gated MLPs of the model, before any PEFT wrapping, their compiled forward, on `device`. Returns
    whether they and the head's functions are compiled, and where they cannot be, a line for the terminal; models of
    less than MIN_WIDTH stay as they are without one. `together`: all ranks call it, and decide alike."""
    if model.config.get_text_config().hidden_size < MIN_WIDTH:
        return False, None
    kinds: dict[type, list[nn.Module]] = {}
    for module in model.modules():
        if is_norm(module) or is_gated(module):
            kinds.setdefault(type(module), []).append(module)
    line = _cannot(kinds, device, model.dtype)
    if together and not _on_all_ranks(line is None, device):
        return False, line or "fused_ops: off: another rank cannot compile."
    if line:
        return False, line
    for kind, modules in kinds.items():
        for module in modules:
            module.forward = types.MethodType(_norm(kind) if is_norm(module) else _gated_forward, module)
    return True, None


def _cannot(kinds: dict[type, list[nn.Module]], device, dtype: torch.dtype) -> str | None:
    """Why one of the kinds of modules, or the head, stays uncompiled, as a line."""
    if torch._dynamo.config.disable:
        return "fused_ops: off: torch.compile is switched off (TORCHDYNAMO_DISABLE)."
    checks = {kind.__name__: functools.partial(_same, modules[0], device, dtype) for kind, modules in kinds.items()}
    for name, check in {**checks, "the LM head": functools.partial(_head_agrees, device)}.items():
        try:
            same = check()
        except Exception as error:  # no compiler, or a compiler's own trouble: training continues without it
            return f"fused_ops: off for {name}: {first_line(error, innermost=False)}"
        if not same:
            return f"fused_ops: off for {name}: compiled, it does not give the same numbers."
    return None


def _same(module: nn.Module, device, dtype: torch.dtype) -> bool:
    forward = _norm(type(module)) if is_norm(module) else _gated_forward  # type: ignore[arg-type]  # a class is hashable
    return agrees(module, forward, device, dtype)


def _on_all_ranks(done: bool, device) -> bool:
    if not (dist.is_available() and dist.is_initialized()):
        return done
    all_done = torch.tensor(float(done), device=device)
    dist.all_reduce(all_done, op=dist.ReduceOp.MIN)
    return bool(all_done.item())


def is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("RMSNorm") and [n for n, _ in module.named_parameters()] == ["weight"]


def is_gated(module: nn.Module) -> bool:
    """Also where the projections carry an adapter already."""
    parts = [getattr(module, part, None) for part in ("gate_proj", "up_proj", "down_proj")]
    if not all(isinstance(part, nn.Module) and hasattr(part, "weight") for part in parts):
        return False
    activation = getattr(module, "act_fn", None)
    return isinstance(activation, nn.Module) and not list(activation.parameters())


def agrees(module: nn.Module, forward: Callable, device, dtype: torch.dtype | None = None) -> bool:
    """Whether `forward` gives the same as the class's own on a stand-in for the module, with random weights. Where the
    module's weights are quantized the stand-in's are of `dtype`."""
    stand_in = copy.copy(module)
    stand_in._parameters, stand_in._modules = dict(module._parameters), dict(module._modules)
    if is_norm(module):
        weight = cast(torch.Tensor, module.weight)
        width = getattr(weight, "ds_shape", weight.shape)[0]
    else:
        gate = cast(nn.Linear, module.gate_proj)  # or PEFT's layer around it; a quantized weight has another shape
        weight = gate.weight
        width = getattr(gate, "in_features", None) or getattr(weight, "ds_shape", weight.shape)[1]
    dtype = weight.dtype if weight.dtype.is_floating_point and weight.dtype.itemsize > 1 else dtype
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()

    if is_norm(module):
        stand_in._parameters["weight"] = nn.Parameter(random(width).detach())
    else:
        for name, shape in (("gate_proj", (24, width)), ("up_proj", (24, width)), ("down_proj", (width, 24))):
            projection = nn.Linear(shape[1], shape[0], bias=False, device=device, dtype=dtype)
            projection.weight = nn.Parameter(random(*shape).detach() / width**0.5)
            stand_in._modules[name] = projection
    x, upstream = random(2, 7, width), random(2, 7, width).detach()
    inputs, results = [x, *stand_in.parameters()], []
    for function in (type(module).forward, forward):
        with torch.enable_grad():
            out = function(stand_in, x)
            results.append([out.detach(), *torch.autograd.grad(out, inputs, upstream)])
    limit = TOLERANCE.get(dtype, 5e-2) if dtype is not None else 5e-2
    return all((a - b).norm() <= limit * a.norm() for a, b in zip(*results, strict=True))


def _head_agrees(device) -> bool:
    """Whether the head's compiled functions give what they give uncompiled, on float32 logits (5, 37)."""
    generator = torch.Generator().manual_seed(0)
    raw, grad = (torch.randn(shape, generator=generator).to(device) for shape in ((5, 37), (5,)))
    target = torch.arange(5, device=device)
    statistics = [f(raw, target, 1.0, None, False) for f in (chunk_statistics, compiled(chunk_statistics))]
    lse = statistics[0][1]
    gradients = [f(raw, target, grad, lse, 1.0, None) for f in (logits_gradient, compiled(logits_gradient))]
    return all((a - b).norm() <= TOLERANCE[torch.float32] * a.norm() for a, b in (statistics, gradients))
