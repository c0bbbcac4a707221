"""Attention over packed pairs: prefix and chosen tokens are one causal sequence, rejected tokens see prefix and
rejected, and no token sees another pair. Registered with transformers under NAME; a ScoringHead switches to it.

    prefix p0 p1 | chosen c0 c1 | rejected r0     c1 sees p0 p1 c0 c1, r0 sees p0 p1 r0
"""

from contextlib import contextmanager
from functools import cached_property

import torch
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mdpo.errors import UserError
from mdpo.forward.varlen import kernels

NAME = "shared_prefix"
KNOWN_LAYERS = {"full_attention", "sliding_attention"}
# Keywords that models hand to attention and that change nothing in it; any other one that is set means padded batches.
HARMLESS = {"position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "return_dict"}
HARMLESS |= {"output_router_logits", "position_embeddings", "past_key_values", "is_causal"}
_refusals: list[str] | None = None  # what `noting_refusals` collects


class Segments:
    """The B pairs of a packed row, as (prefix, chosen, rejected) lengths in tokens, and what attention derives from
    them, once for all layers."""

    def __init__(self, lengths: list[list[int]]):
        self.lengths = [tuple(pair) for pair in lengths]
        self.sizes = [size for prefix, chosen, rejected in self.lengths for size in (prefix + chosen, rejected)]
        self._masks: dict = {}

    def mask(self, queries: int, keys: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
        """(Q, K), 0 where a query sees a key and −inf elsewhere: the queries are the last Q of K tokens, and a query
        sees itself and the `window` − 1 tokens before it (all, where that is None)."""
        key = (queries, keys, window, like.dtype, like.device)
        if key not in self._masks:
            distance = torch.arange(keys - queries, keys, device=like.device)[:, None] - torch.arange(
                keys, device=like.device
            )
            seen = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
            self._masks[key] = like.new_zeros(queries, keys).masked_fill_(~seen, float("-inf"))
        return self._masks[key]

    @cached_property
    def key_index(self) -> list[int]:
        """The indices of the keys that each segment sees: prefix and chosen, then prefix and rejected, of each pair."""
        index, start = [], 0
        for prefix, chosen, rejected in self.lengths:
            end = start + prefix + chosen
            index += [*range(start, end), *range(start, start + prefix), *range(end, end + rejected)]
            start = end + rejected
        return index

    @property
    def counts(self) -> torch.Tensor:
        """(1, N): how many tokens of the padded layout each one replaces, 2 in prefixes."""
        parts = [([2] * prefix + [1] * (chosen + rejected)) for prefix, chosen, rejected in self.lengths]
        return torch.tensor([[n for part in parts for n in part]])

    @property
    def key_sizes(self) -> list[int]:
        return [size for prefix, chosen, rejected in self.lengths for size in (prefix + chosen, prefix + rejected)]

    def on(self, device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """key_index, and where the queries' and the keys' segments begin (2B + 1, int32), on a device."""
        if device not in self._masks:
            begins = [torch.tensor([0, *sizes]).cumsum(0).int() for sizes in (self.sizes, self.key_sizes)]
            parts = (torch.tensor(self.key_index), *begins)
            self._masks[device] = tuple(x.to(device, non_blocking=True) for x in parts)  # else each waits for the GPU
        return self._masks[device]


def refused(model) -> str | None:
    """Why the model cannot be given packed rows, as far as its configuration tells; None where it can."""
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or KNOWN_LAYERS)
    if not layers <= KNOWN_LAYERS:
        return f"it has layers of the kind {', '.join(sorted(layers - KNOWN_LAYERS))}"
    if getattr(model, "_is_stateful", False):
        return "it carries a state from token to token"
    if not getattr(model, "_supports_attention_backend", False):
        return "its attention does not go through transformers' interface"
    return None


@contextmanager
def noting_refusals():
    """Within it, reasons why packed attention cannot serve a model go into the list that is yielded, and its result is
    wrong; outside of it they are errors. Leaving a forward by an exception would upset ZeRO-3's hooks."""
    global _refusals
    before, _refusals = _refusals, []
    try:
        yield _refusals
    finally:
        _refusals = before


def packed_attention(
    module, query, key, value, attention_mask, segments: Segments | None = None, dropout=0.0, scaling=None, **kwargs
) -> tuple[torch.Tensor, None]:
    """(1, N, heads, D) from query (1, heads, N, D), key and value (1, key heads, N, D). Raises UserError for a model
    that passes keywords unknown here, or no segments; within `noting_refusals` that is noted and the result is
    meaningless."""
    window, softcap = (kwargs.pop(name, None) for name in ("sliding_window", "softcap"))
    unknown = [name for name, setting in kwargs.items() if setting is not None and name not in HARMLESS]
    if window is None and _window_in_mask_only(module):
        unknown.append("a window that only its mask has")
    unknown = [f"its attention takes {name}" for name in unknown]
    if segments is None:
        unknown.append("its layers hand no keywords on to attention")
    if unknown:
        if _refusals is None:
            raise UserError(f"shared_prefix: of {type(module).__name__}, {unknown[0]}. Set shared_prefix: false.")
        _refusals.extend(unknown)
    if segments is None:
        return query.new_zeros(1, query.size(2), query.size(1), value.size(-1)), None
    scaling = query.size(-1) ** -0.5 if scaling is None else scaling
    dropout = dropout if module.training else 0.0
    if torch.is_autocast_enabled(query.device.type):  # as its products would; RoPE may have promoted queries and keys
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    varlen = _varlen(query, value, dropout, softcap)
    if varlen is not None:
        return varlen(query, key, value, segments, scaling, window, softcap, dropout), None
    out = []
    q, k, v = (x.split(segments.sizes, dim=2) for x in (query, key, value))
    for i, (prefix, _, _) in enumerate(segments.lengths):
        chosen, rejected = 2 * i, 2 * i + 1
        out.append(_attend(q[chosen], k[chosen], v[chosen], segments, scaling, window, softcap, dropout))
        keys, values = (
            torch.cat([x[chosen][:, :, :prefix], x[rejected]], 2) if prefix else x[rejected] for x in (k, v)
        )
        out.append(_attend(q[rejected], keys, values, segments, scaling, window, softcap, dropout))
    return torch.cat([part.transpose(1, 2) for part in out], 1), None


ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)


def _window_in_mask_only(module) -> bool:
    """Whether a layer that hands over no window has one by its configuration: then only its mask knew (PhiMoE)."""
    config = getattr(module, "config", None)
    layers = getattr(config, "layer_types", None)
    if layers and getattr(module, "layer_idx", None) is not None:
        return layers[module.layer_idx] == "sliding_attention"
    return bool(getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True))


def _attend(q, k, v, segments: Segments, scaling, window, softcap, dropout) -> torch.Tensor:
    """Causal attention of the last Q of K tokens, (1, heads, Q, D)."""
    queries, keys = q.size(2), k.size(2)
    if window is not None and window >= keys:
        window = None
    if softcap is not None:
        return _capped(q, k, v, segments, scaling, window, softcap, dropout)
    options = {"dropout_p": dropout, "scale": scaling, "enable_gqa": q.size(1) != k.size(1)}
    if queries == keys and window is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)
    mask = None if queries == 1 and window is None else segments.mask(queries, keys, window, q)
    if mask is not None and options["enable_gqa"] and q.device.type == "cuda":  # else torch takes its slowest kernel
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
        options["enable_gqa"] = False
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)


def _capped(q, k, v, segments: Segments, scaling, window, softcap, dropout) -> torch.Tensor:
    """With scores s as softcap · tanh(s / softcap) before the mask (Gemma-2)."""
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    scores = softcap * torch.tanh(q @ k.transpose(2, 3) * (scaling / softcap))
    scores = scores + segments.mask(q.size(2), k.size(2), window, q)
    return F.dropout(scores.softmax(-1, dtype=torch.float32).to(q.dtype), dropout) @ v


# --------------------------------------------------------------------------------------------------- varlen, on a GPU


def _varlen(query, value, dropout: float, softcap):
    """A kernel of `mdpo.forward.varlen` where there is one for these tensors, else None."""
    size = query.size(-1)
    if query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16):
        return None
    if size > 256 or size % 8 or value.size(-1) != size:
        return None
    available = kernels(query.device)
    return available.get("flash-attn") or (
        available.get("torch's varlen attention") if not softcap and not dropout else None
    )
