"""Attention of continuous batching on a CPU, where no flash attention is: transformers gives `sdpa` the tokens of all
conversations of a batch as one row with a mask, so that each attends to the keys of all. Here each conversation attends
to its own, which gives the same (tests/unit/test_by_conversation.py compares both)."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


@contextmanager
def attention_by_conversation() -> Iterator[None]:
    """`sdpa` attention of paged caches is computed by conversation within."""
    ALL_ATTENTION_FUNCTIONS["sdpa"] = by_conversation
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def by_conversation(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache=None,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention in transformers' interface. `query` (1, heads, new tokens, head dim), `key` and `value` (1, key heads,
    new tokens, head dim); `cu_seq_lens_q` and `cu_seq_lens_k` say where each conversation begins among the new tokens
    and among the keys that the cache gives back, and `attention_mask` (1, 1, new tokens, keys) has what else a token
    does not see, such as what a sliding window has left behind. Returns ((1, new tokens, heads, head dim), None)."""
    theirs = any(kwargs.get(name) is not None for name in ("position_bias", "softcap"))  # the latter they refuse
    if cache is None or attention_mask is None or theirs:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, cache=cache, **kwargs)
    key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
    news, keys = kwargs["cu_seq_lens_q"].tolist(), kwargs["cu_seq_lens_k"].tolist()
    groups, parts = query.shape[1] // key.shape[1], []
    for (q, q_end), (k, k_end) in zip(pairwise(news), pairwise(keys), strict=True):
        own_query, own_key, own_value = query[:, :, q:q_end], key[:, :, k:k_end], value[:, :, k:k_end]
        one = q_end - q == 1  # the heads of a key head are then rows of one query: nothing is repeated
        if one:
            own_query = own_query.reshape(1, key.shape[1], groups, -1)
        else:
            own_key, own_value = repeat_kv(own_key, groups), repeat_kv(own_value, groups)
        mask = attention_mask[:, :, q:q_end, k:k_end]
        part = scaled_dot_product_attention(own_query, own_key, own_value, attn_mask=mask, scale=scaling)
        parts.append(part.reshape(1, query.shape[1], q_end - q, -1))
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None
