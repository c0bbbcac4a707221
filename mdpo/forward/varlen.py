"""Varlen kernels: one call of attention for all runs of a packed row, on a GPU, and whether there is a usable one.

A kernel is `kernel(query, key, value, forest, scaling, window, softcap, dropout)` on (1, heads, N, D), and returns
(1, N, heads, D).
"""

from collections.abc import Callable
from functools import cache
from importlib import metadata, util
from typing import Any, cast

import torch

from mdpo.console import first_line, say
from mdpo.forward.forest import Forest

FLASH_ATTN = ((2, 6), (3,))  # from the first version with soft-caps up to the next interface
AGREES = 3e-2  # of the norm, with float32: a half-precision kernel rounds its scores and its output


@cache
def flash_attn() -> tuple[Callable | None, str | None]:
    """flash-attn's varlen function, imported once; or None, and why it cannot be loaded. A build for another torch
    fails when it is imported, and flash-attn 4 has a package of this name without that function."""
    if util.find_spec("flash_attn") is None:
        return None, "flash-attn is not installed"
    try:
        version = metadata.version("flash-attn")
        from flash_attn import flash_attn_varlen_func
    except Exception as error:  # ImportError, OSError of a library, whatever a package's own code raises
        return None, f"flash-attn cannot be imported ({first_line(error, innermost=False)})"
    least, below = FLASH_ATTN
    if not least <= _numbers(version) < below:
        versions = ".".join(map(str, least)), ".".join(map(str, below))
        return None, f"flash-attn is of version {version}; from {versions[0]} up to {versions[1]} is known here"
    return flash_attn_varlen_func, None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())


@cache
def kernels(device: torch.device) -> dict[str, Callable]:
    """The kernels that run on the device and give what plain attention gives, flash-attn's first. Says in one line what
    is installed and not used. Both want an Ampere GPU or a newer one."""
    if torch.cuda.get_device_capability(device) < (8, 0):
        return {}
    usable, unused = {}, []
    for name, kernel, reason in (
        ("flash-attn", flash, flash_attn()[1]),
        ("torch's varlen attention", torch_varlen, None),
    ):
        reason = reason or _fails(kernel, device)
        if reason is None:
            usable[name] = kernel
        elif "not installed" not in reason:
            unused.append(f"{name} is not used: {reason}")
    if unused:
        say(f"attention: {'; '.join(unused)}. {next(iter(usable), 'Attention by run')} is.")
    return usable


A_PAIR = [12, -1], [10, 3]  # runs of the pair that a kernel is tried on: prefix 4, chosen 8, rejected 10


def _fails(kernel: Callable, device: torch.device) -> str | None:
    """What goes wrong with random numbers for A_PAIR; None if nothing does."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 22, 64, generator=generator).to(device, torch.bfloat16) for heads in (4, 2, 2))
    try:
        with torch.no_grad():
            out = kernel(q, k, v, Forest(A_PAIR), 0.125, None, None, 0.0).float()
        expected = torch.nn.functional.scaled_dot_product_attention(
            q.float(), k.float(), v.float(), attn_mask=_seen(device), scale=0.125, enable_gqa=True
        )
    except Exception as error:  # no kernel for this GPU, or an interface of another version
        return first_line(error, innermost=False)
    if (out - expected.transpose(1, 2)).norm() <= AGREES * expected.norm():
        return None
    return "it does not give what plain attention gives"


def _seen(device: torch.device) -> torch.Tensor:
    """(22, 22): which keys a query of A_PAIR sees."""
    at = torch.arange(22, device=device)
    return (at[:, None] >= at) & ~((at[:, None] >= 12) & (at >= 4) & (at < 12))


def _gathered(query, key, value, forest):
    """Queries (N, heads, D), keys and values (K, key heads, D) with ancestors before each run, where runs begin, and
    the longest ones."""
    index, q_begins, k_begins = forest.on(query.device)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if index is not None:
        k, v = k.index_select(0, index), v.index_select(0, index)
    return q, k, v, q_begins, k_begins, max(forest.sizes), max(forest.key_sizes)


def flash(query, key, value, forest, scaling, window, softcap, dropout):
    call, reason = flash_attn()
    if call is None:
        raise RuntimeError(reason)
    options: dict[str, Any] = {
        "softmax_scale": scaling,
        "causal": True,
        "dropout_p": dropout,
        "softcap": softcap or 0.0,
    }
    options["window_size"] = (-1, -1) if window is None else (window - 1, 0)
    return call(*_gathered(query, key, value, forest), **options)[None]


def torch_varlen(query, key, value, forest, scaling, window, softcap, dropout):
    """Supports neither soft-caps nor dropout."""
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"scale": scaling, "window_size": (-1 if window is None else window - 1, 0)}
    options["enable_gqa"] = query.size(1) != key.size(1)
    out = varlen_attn(*_gathered(query, key, value, forest), **options)
    return cast(torch.Tensor, out)[None]  # more than a tensor only where it is asked for
