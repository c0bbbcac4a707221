"""Attention over a packed row, a token forest: a token sees its ancestors and itself. Registered with transformers
under NAME; a ScoringHead switches to it.

    prompt p0 p1 and chosen c0 c1 are one run, rejected r0 another    c1 sees p0 p1 c0 c1, r0 sees p0 p1 r0
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mdpo.errors import UserError
from mdpo.forward.forest import Forest, Unit
from mdpo.forward.varlen import kernels

NAME = "shared_prefix"
KNOWN_LAYERS = {"full_attention", "sliding_attention"}
# Keywords that models hand to attention and that change nothing in it; any other one that is set means padded batches.
HARMLESS = {"position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "return_dict"}
HARMLESS |= {"output_router_logits", "position_embeddings", "past_key_values", "is_causal"}
_refusals: list[str] | None = None  # what `noting_refusals` collects


def refused(model) -> str | None:
    """Why the model cannot be given packed rows, as far as its configuration tells; None where it can."""
    if reason := other_layers(model.config):
        return reason
    if getattr(model, "_is_stateful", False):
        return "it carries a state from token to token"
    if not getattr(model, "_supports_attention_backend", False):
        return "its attention does not go through transformers' interface"
    return None


def other_layers(config) -> str | None:
    """As `refused`, by the configuration alone."""
    config = config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or KNOWN_LAYERS)
    return None if layers <= KNOWN_LAYERS else f"it has layers of the kind {', '.join(sorted(layers - KNOWN_LAYERS))}"


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
    module, query, key, value, attention_mask, forest: Forest | None = None, dropout=0.0, scaling=None, **kwargs
) -> tuple[torch.Tensor, None]:
    """(1, N, heads, D) from query (1, heads, N, D), key and value (1, key heads, N, D). Raises UserError for a model
    that passes keywords unknown here, or no forest; within `noting_refusals` that is noted and the result is
    meaningless."""
    window, softcap = (kwargs.pop(name, None) for name in ("sliding_window", "softcap"))
    unknown = [name for name, setting in kwargs.items() if setting is not None and name not in HARMLESS]
    if window is None and _window_in_mask_only(module):
        unknown.append("a window that only its mask has")
    unknown = [f"its attention takes {name}" for name in unknown]
    if forest is None:
        unknown.append("its layers hand no keywords on to attention")
    if unknown:
        if _refusals is None:
            raise UserError(f"shared_prefix: of {type(module).__name__}, {unknown[0]}. Set shared_prefix: false.")
        _refusals.extend(unknown)
    if forest is None:
        return query.new_zeros(1, query.size(2), query.size(1), value.size(-1)), None
    scaling = query.size(-1) ** -0.5 if scaling is None else scaling
    dropout = dropout if module.training else 0.0
    if torch.is_autocast_enabled(query.device.type):  # as its products would; RoPE may have promoted queries and keys
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    heads, spread = query.size(1), forest.spread
    if spread is not None:  # a rank has tokens of all heads, and attends with all tokens of some
        query, key, value = spread.heads_of_row(query, key, value)
    attend = _varlen(query, value, dropout, softcap) or _by_unit
    out = attend(query, key, value, forest, scaling, window, softcap, dropout)
    return (out if spread is None else spread.all_heads(out, heads)), None


def _by_unit(query, key, value, forest: Forest, *options) -> torch.Tensor:
    """A call of attention for each unit, with the keys of its ancestors before its own."""
    sizes = [sum(unit.sizes) for unit in forest.units]
    queries, *own = (x.split(sizes, dim=2) for x in (query, key, value))
    seen: dict[int, tuple] = {}  # keys and values of units that others hang on, their ancestors' first
    common: dict[tuple[int, int], list] = {}  # of units that hang on one token, the ancestors'
    out = []
    for i, unit in enumerate(forest.units):
        keys, values = own[0][i], own[1][i]
        if unit.before:
            place = unit.parent, unit.before
            if place not in common:
                common[place] = [x[:, :, : unit.before] for x in seen[unit.parent]]
            keys, values = (torch.cat(x, 2) for x in zip(common[place], (keys, values), strict=True))
        if unit.grows:
            seen[i] = keys, values
        out.append(_attend(queries[i], keys, values, forest, unit, *options))
    return torch.cat([part.transpose(1, 2) for part in out], 1)


ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)


def _window_in_mask_only(module) -> bool:
    """Whether a layer that hands over no window has one by its configuration: then only its mask knew (PhiMoE)."""
    config = getattr(module, "config", None)
    layers = getattr(config, "layer_types", None)
    if layers and getattr(module, "layer_idx", None) is not None:
        return layers[module.layer_idx] == "sliding_attention"
    return bool(getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True))


def _attend(q, k, v, forest: Forest, unit: Unit, scaling, window, softcap, dropout) -> torch.Tensor:
    """A unit's attention, (1, heads, Q, D)."""
    queries, before = q.size(2), unit.before
    if window is not None and window >= before + max(unit.sizes):
        window = None
    if softcap is not None:
        return _capped(q, k, v, forest, unit, scaling, window, softcap, dropout)
    options = {"dropout_p": dropout, "scale": scaling, "enable_gqa": q.size(1) != k.size(1)}
    plain = window is None and len(unit.sizes) == 1
    if plain and 2 * before <= queries:
        # Queries in the few ancestors' place, any will do, cost less than a mask, with which no score is skipped.
        q = F.pad(q, (0, 0, before, 0)) if before else q
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)
        return out[:, :, before:] if before else out
    mask = None if plain and queries == 1 else forest.mask(unit.sizes, before, window, q)
    if mask is not None and options["enable_gqa"] and q.device.type == "cuda":  # else torch takes its slowest kernel
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
        options["enable_gqa"] = False
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)


def _capped(q, k, v, forest: Forest, unit: Unit, scaling, window, softcap, dropout) -> torch.Tensor:
    """With scores s as softcap · tanh(s / softcap) before the mask (Gemma-2)."""
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    scores = softcap * torch.tanh(q @ k.transpose(2, 3) * (scaling / softcap))
    scores = scores + forest.mask(unit.sizes, unit.before, window, q)
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
