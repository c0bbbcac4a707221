"""What the LM head computes on a chunk of hidden states: logits, statistics of them, and their gradient."""

from dataclasses import dataclass
from functools import cache

import torch


@dataclass
class HeadTransform:
    """What the architecture does to logits after the head: softcap · tanh(scale · x / softcap)."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config) -> "HeadTransform":
        """From a text config. Cohere multiplies by `logit_scale`, Granite divides by `logits_scaling`, Falcon-H1
        multiplies by `lm_head_multiplier`; Gemma-2 caps at `final_logit_softcapping`."""
        scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
        if getattr(config, "logits_scaling", None):
            divisor = config.logits_scaling
            scale = divisor if config.model_type == "hyperclovax" else 1 / divisor
        return cls(float(scale), getattr(config, "final_logit_softcapping", None))

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        logits = logits * self.scale if self.scale != 1.0 else logits
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits


class Head:
    """The head in the dtype that it computes in; its output is one buffer, overwritten by each chunk."""

    def __init__(self, weight, bias, dtype: torch.dtype, rows: int):
        self.weight, self.bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        self.buffer = self.weight.new_empty(rows, self.weight.size(0))

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        out = self.buffer[: hidden.size(0)]
        if self.bias is None:
            return torch.mm(hidden, self.weight.T, out=out)
        return torch.addmm(self.bias, hidden, self.weight.T, out=out)


def plus(total: torch.Tensor | None, part: torch.Tensor) -> torch.Tensor:
    return part.float() if total is None else total.add_(part)


def plus_product(total: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """total + a @ b in float32, in place where there is a total."""
    if a.dtype == torch.float32:
        return a @ b if total is None else total.addmm_(a, b)
    if not adds_in_float32(a.device, a.dtype):
        return plus(total, a @ b)
    if total is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


@cache
def adds_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device multiplies matrices of half precision into a float32 sum, in place, without a product in half
    precision first. Tried once; CPUs do not."""
    if device.type != "cuda":
        return False
    a, b = (torch.arange(64, device=device, dtype=dtype).view(8, 8) / 64 for _ in range(2))
    total = torch.ones(8, 8, device=device)
    try:
        with torch.no_grad():
            torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    except RuntimeError:  # NotImplementedError is one
        return False
    return torch.allclose(total, 1 + a.float() @ b.float(), rtol=1e-3)


def chunk_statistics(raw, target, scale: float, softcap: float | None, collision: bool) -> torch.Tensor:
    """(6, C), float32, of raw head outputs (C, V): logp of the target, log-sum-exp, entropy H = lse − Σ p·x, mean
    logit, whether the target is the likeliest, and log Σ p² (0 unless `collision`)."""
    logits = HeadTransform(scale, softcap)(raw.float())
    picked = logits.gather(1, target[:, None]).squeeze(1)
    highest = logits.amax(-1)
    odds = torch.exp(logits - highest[:, None])
    total = odds.sum(-1)
    lse = highest + total.log()
    entropy = lse - (odds * logits).sum(-1) / total
    log_sum_p_squared = (odds * odds).sum(-1).log() - 2 * total.log() if collision else torch.zeros_like(lse)
    return torch.stack([picked - lse, lse, entropy, logits.mean(-1), (picked >= highest).float(), log_sum_p_squared])


def logits_gradient(raw, target, grad, lse, scale: float, softcap: float | None) -> torch.Tensor:
    """d logp / d raw head output, times grad (C,): (1[v = target] − softmax(x)_v) · dx/d raw. (C, V), float32."""
    logits = HeadTransform(scale, softcap)(raw.float())
    hit = torch.arange(logits.size(1), device=target.device)[None] == target[:, None]
    out = (hit.float() - torch.exp(logits - lse[:, None])) * grad[:, None].float()
    if softcap:
        out = out * (1 - (logits / softcap) ** 2)
    return out * scale if scale != 1.0 else out


def slices(n: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]
