"""Attention by conversation against transformers' over the whole batch with its mask."""

from types import SimpleNamespace

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mdpo.rollouts.by_conversation import attention_by_conversation, by_conversation

NEW, KEYS = (1, 5, 1, 3), (7, 5, 1, 9)  # tokens: of a decode, a prompt, a prompt of one token, a part of one
KEY_HEADS, WIDTH = 2, 8
WINDOW = 4


def batch(groups: int, window: int | None) -> dict:
    """What the attention is called with."""
    generator = torch.Generator().manual_seed(0)
    heads, new, keys = KEY_HEADS * groups, sum(NEW), sum(KEYS)
    query = torch.randn(1, heads, new, WIDTH, generator=generator)
    key, value = torch.randn(2, 1, KEY_HEADS, keys, WIDTH, generator=generator)
    mask = torch.full((new, keys), torch.finfo(torch.float32).min)
    for n, (own, seen) in enumerate(zip(NEW, KEYS, strict=True)):
        for row in range(own):
            end = seen - own + row + 1
            begin = max(0, end - window) if window else 0
            first = sum(KEYS[:n])
            mask[sum(NEW[:n]) + row, first + begin : first + end] = 0
    return {"query": query, "key": key, "value": value, "attention_mask": mask[None, None], "scaling": 0.3}


class Cache:
    """Of the pages only what attention asks for."""

    def update(self, key_states, value_states, layer_idx, kwargs):
        kwargs["cu_seq_lens_k"] = kwargs["cu_seq_lens_k"]["full_attention"]
        return key_states, value_states


def bounds(lengths) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("window", [None, WINDOW])
def test_each_conversation_sees_what_the_batch_s_mask_shows_it(groups, window):
    kwargs = batch(groups, window)
    module = SimpleNamespace(layer_idx=0, num_key_value_groups=groups, is_causal=True)
    ends = {"cu_seq_lens_q": bounds(NEW), "cu_seq_lens_k": {"full_attention": bounds(KEYS)}}
    ours, _ = by_conversation(module, cache=Cache(), **kwargs, **ends)
    theirs, _ = sdpa_attention_forward(module, **kwargs)
    assert ours.shape == theirs.shape == (1, sum(NEW), KEY_HEADS * groups, WIDTH)
    assert torch.allclose(ours, theirs, atol=1e-6)
    # The wrong twin: one key later.
    shifted = {**ends, "cu_seq_lens_k": {"full_attention": bounds(KEYS) + torch.tensor([0, 1, 1, 1, 0])}}
    wrong, _ = by_conversation(module, cache=Cache(), **kwargs, **shifted)
    assert not torch.allclose(wrong, theirs, atol=1e-3)


def test_without_pages_it_is_transformers_own():
    kwargs = batch(3, None)
    module = SimpleNamespace(layer_idx=0, num_key_value_groups=3, is_causal=True)
    assert torch.equal(by_conversation(module, **kwargs)[0], sdpa_attention_forward(module, **kwargs)[0])


def test_a_softcap_is_refused_as_transformers_does():
    module = SimpleNamespace(layer_idx=0, num_key_value_groups=3, is_causal=True)
    with pytest.raises(ValueError, match="softcap"):
        by_conversation(module, cache=Cache(), softcap=30.0, **batch(3, None))


def test_sdpa_is_transformers_own_again_afterwards():
    with attention_by_conversation():
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is by_conversation
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
