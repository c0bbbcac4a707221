"""What the varlen kernels of a GPU compute, token by token, in place of them."""

import torch


def slow_varlen(q, k, v, q_begins, k_begins, scale, window, softcap=0.0):
    """What varlen kernels compute, token by token: runs' queries are the last ones of their keys; a query sees
    `window[0]` keys before itself, all where that is −1."""
    out = []
    for (a, b), (c, d) in zip(*(zip(x[:-1].tolist(), x[1:].tolist(), strict=True) for x in (q_begins, k_begins)),
                              strict=True):  # fmt: skip
        for i in range(a, b):
            last = d - (b - i)
            first = c if window[0] == -1 else max(c, last - window[0])
            scores = torch.einsum("hd,khd->hk", q[i], repeat(k[first : last + 1], q)) * scale
            scores = softcap * torch.tanh(scores / softcap) if softcap else scores
            out.append(torch.einsum("hk,khd->hd", scores.softmax(-1), repeat(v[first : last + 1], q)))
    return torch.stack(out)


def repeat(x, like):
    return x.repeat_interleave(like.size(1) // x.size(1), dim=1)


def flash_stand_in(q, k, v, q_begins, k_begins, max_q, max_k, softmax_scale, causal, dropout_p, softcap, window_size):
    assert causal and dropout_p == 0.0
    assert (max_q, max_k) == tuple(int((x[1:] - x[:-1]).max()) for x in (q_begins, k_begins))
    return slow_varlen(q, k, v, q_begins, k_begins, softmax_scale, window_size, softcap)


def torch_stand_in(q, k, v, q_begins, k_begins, max_q, max_k, scale, window_size, enable_gqa):
    assert enable_gqa and window_size[1] == 0 and q_begins.dtype == k_begins.dtype == torch.int32
    return slow_varlen(q, k, v, q_begins, k_begins, scale, window_size)
