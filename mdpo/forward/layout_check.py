"""Checks what the packed layout changes, and nothing else, on one real batch: positions, the queries and keys that
follow from them, and attention itself, ours beside the model's own on the same numbers in float32."""

import math
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mdpo.console import first_line
from mdpo.forward.forest import Forest
from mdpo.forward.packed_attention import NAME, noting_refusals
from mdpo.forward.scoring_head import own_attention
from mdpo.types import PairBatch

SAME_ATTENTION = 1e-5  # of the norm, float32
KERNEL = {torch.float16: 1e-2, torch.bfloat16: 3e-2}  # a kernel's own rounding, one layer's
SAME_QUERIES = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}  # of each token, in the first layer
QUERIES = 256  # of `plain_attention` at a time
GROUPS = 2  # of heads that share a key head: those checked in float32
IN_FLOAT32 = ("eager", "sdpa")  # own attention that takes it, with a mask of its own


def misplaced(batch: PairBatch) -> str | None:
    """Why a packed batch's positions are wrong, where a token's is not its depth in the forest."""
    expected = Forest(batch.runs).positions.tolist()
    positions = batch.position_ids[0].tolist()
    return None if positions == expected else "its row's positions are not those of its sequences"


def shifted(batch: PairBatch, pad_token_id: int, padding: int = 3) -> PairBatch:
    """A padded batch with padding before its rows: the same log-probs, rounded otherwise."""
    length = batch.input_ids.size(1)
    ids, mask = (
        torch.nn.functional.pad(batch[name], (padding, 0), value=value)
        for name, value in (("input_ids", pad_token_id), ("attention_mask", 0))
    )
    index = batch.logp_position
    moved = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    return batch | moved | {"logp_position": index + (index // length + 1) * padding}


class Watch:
    """Checks a model's attention in a call with B pairs padded, then packed. `reason` is the first thing wrong."""

    def __init__(self, model, batch: PairBatch):
        self.forest = Forest(batch.runs, batch.ends)
        self.own = own_attention(model)
        self.reason: str | None = None
        self.calls = {True: 0, False: 0}  # by whether it was packed
        self._first: list[torch.Tensor] = []  # query and key of the first layer, padded

    @contextmanager
    def looking(self):
        """Within it the model's attention calls are checked. A check that fails ends no forward: that would upset
        ZeRO-3's hooks."""
        find = ALL_ATTENTION_FUNCTIONS.get_interface

        def get_interface(name, *default, **kwargs):
            attend, packed = find(name, *default, **kwargs), name == NAME

            def watched(module, query, key, value, attention_mask=None, *args, **kwargs):
                self._look(attend, packed, module, query, key, value, attention_mask, args, kwargs)
                return attend(module, query, key, value, attention_mask, *args, **kwargs)

            return watched

        # Beside its class's own, until it is deleted.
        ALL_ATTENTION_FUNCTIONS.get_interface = get_interface  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            del ALL_ATTENTION_FUNCTIONS.get_interface

    def _look(self, attend, packed, module, query, key, value, mask, args, kwargs) -> None:
        self.calls[packed] += 1
        if self.reason is not None:
            return
        try:
            if self.calls[packed] == 1:
                self._compare_queries(packed, query, key, kwargs.get("forest"))
            if not packed:
                self.reason = self.reason or self._compare(attend, module, query, key, value, mask, args, kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self.reason = f"its attention cannot be checked: {first_line(error)}"

    def _compare_queries(self, packed: bool, query, key, forest: Forest | None) -> None:
        """In the first layer nothing but RoPE tells queries and keys of one token in both layouts apart. Of a row that
        ranks share, each compares its own tokens."""
        if not packed:
            self._first = [self._row(x) for x in (query, key)]
            return
        limit, spread = SAME_QUERIES.get(_computed(query), 3e-2), getattr(forest, "spread", None)
        for a, b in zip((query, key), self._first, strict=True):
            a, b = (x[0].transpose(0, 1).flatten(1).float() for x in (a, b))
            if spread is not None:
                a, b = a[: len(spread.own)], b[spread.own]
            if not len(a):
                continue
            worst = ((a - b).norm(dim=1) / b.norm(dim=1).clamp(min=1e-6)).max().item()
            if not worst <= limit:
                self.reason = f"a token's query or key differs by {worst:.1e} of its norm, more than {limit:g}"

    def _compare(self, attend, module, query, key, value, mask, args, kwargs) -> str | None:
        """Ours and the model's own attention on one sequence after another, the first GROUPS of heads."""
        if args:
            return "it passes attention more than a mask by position"
        heads, groups = query.size(1), key.size(1)
        key_heads = min(GROUPS, groups)
        q, k, v = query[:, : key_heads * heads // groups], key[:, :key_heads], value[:, :key_heads]
        q, k, v = (self._row(x) for x in (q, k, v))
        ours = ALL_ATTENTION_FUNCTIONS[NAME]
        places = np.concatenate(self.forest.paths)
        with noting_refusals() as unknown, _float32(query.device):
            result = ours(module, q.float(), k.float(), v.float(), None, **kwargs, forest=self.forest)[0][:, places]
        if unknown:
            return unknown[0]
        with _float32(query.device):
            expected = self._own(attend, module, q, k, v, mask, kwargs)
        if (reason := _differs(result, expected, SAME_ATTENTION)) or _computed(query) == torch.float32:
            return reason
        with noting_refusals():
            in_use = ours(module, q, k, v, None, **kwargs, forest=self.forest)[0][:, places]
        return _differs(in_use.float(), expected, KERNEL.get(_computed(query), 3e-2))

    def _own(self, attend, module, q, k, v, mask, kwargs) -> torch.Tensor:
        """Each sequence in full, one behind the other, by the model's own attention and mask."""
        out = []
        for row, path in enumerate(self.forest.paths):
            query, key, value = (x[:, :, path].float() for x in (q, k, v))
            if self.own in IN_FLOAT32:
                part = _part(mask, row, len(path), query.size(1))
                out.append(attend(module, query, key, value, part, **kwargs)[0])
            else:
                out.append(plain_attention(query, key, value, kwargs))
        return torch.cat(out, 1)

    def _row(self, x: torch.Tensor) -> torch.Tensor:
        """(M, heads, T, D) of the padded layout → (1, heads, N, D) of the packed one, of each token its first
        sequence's."""
        place = np.empty((sum(self.forest.sizes), 2), np.int64)
        for row, path in reversed(list(enumerate(self.forest.paths))):
            place[path] = np.stack([np.full(len(path), row), np.arange(len(path))], 1)
        return x[place[:, 0], :, place[:, 1]].transpose(0, 1)[None]


def plain_attention(q, k, v, kwargs: dict) -> torch.Tensor:
    """The reference implementation: causal attention of one sequence, (1, T, heads, D) from (1, heads, T, D), QUERIES
    at a time: whole matrices of 16k tokens would take more memory than the step that they are to vouch for."""
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    scaling, softcap, window = (kwargs.get(name) for name in ("scaling", "softcap", "sliding_window"))
    positions = torch.arange(q.size(2), device=q.device)
    out: list[torch.Tensor] = []
    for rows in positions.split(QUERIES):
        keys = slice(0, int(rows.numel() + len(out) * QUERIES))
        scores = q[:, :, rows] @ k[:, :, keys].transpose(2, 3) * (q.size(-1) ** -0.5 if scaling is None else scaling)
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        distance = rows[:, None] - positions[keys]
        seen = (distance >= 0) & (distance < (math.inf if window is None else window))
        out.append(scores.masked_fill(~seen, -math.inf).softmax(-1) @ v[:, :, keys])
    return torch.cat(out, 2).transpose(1, 2)


def _part(mask: torch.Tensor | None, row: int, length: int, heads: int) -> torch.Tensor | None:
    """Of a mask (M or 1, heads or 1, T, T), or none, what one unpadded sequence sees."""
    if mask is None:
        return None
    mask = mask[row if mask.size(0) > 1 else 0][None, :heads, :length, :length]
    return mask if mask.dtype == torch.bool else mask.float()


def _computed(x: torch.Tensor) -> torch.dtype:
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype


@contextmanager
def _float32(device):
    """Products in it, not in TensorFloat32, and no autocast."""
    own = torch.backends.cuda.matmul  # torch's older switch fails where somebody has used this one (`tf32: true`)
    before, own.fp32_precision = own.fp32_precision, "ieee"
    try:
        with (
            torch.autocast(device.type, enabled=False)
            if torch.amp.is_autocast_available(device.type)
            else nullcontext()
        ):
            yield
    finally:
        own.fp32_precision = before


def _differs(result: torch.Tensor, expected: torch.Tensor, limit: float) -> str | None:
    difference = ((result - expected).norm() / expected.norm().clamp(min=1e-30)).item()
    if difference <= limit:
        return None
    return f"its packed attention differs by {difference:.1e} of the norm, more than {limit:g}"
