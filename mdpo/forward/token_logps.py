"""Log-probs of supervised tokens: the backbone once, the LM head only where a token is scored, in chunks.

The head is called as a module exactly once per forward, whatever the number of chunks (0 too). Under DeepSpeed ZeRO-3
its hooks then gather the weight once in forward and once in backward, and ranks with different counts stay in step.
"""

import functools
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func  # every family's is this one
from transformers.utils import ModelOutput

from mdpo.errors import UserError
from mdpo.forward.compiled_ops import compiled
from mdpo.forward.lm_head import Head, HeadTransform, chunk_statistics, logits_gradient, plus, plus_product, slices
from mdpo.forward.packed_attention import Segments, remember_attention, switch
from mdpo.types import PairBatch

# Of float32 logits held at a time. On a GPU each chunk's backward reads and writes the weight's float32 gradient, 8
# bytes a weight, for 2 FLOPs a weight and token: an H100 (990 TFLOP/s, 3.35 TB/s, by its data sheet) computes for as
# long as it waits from 1200 tokens on, an A100 from 600. 512 MiB are 880 tokens of 152 000 words; a CPU's were 220.
CHUNK_BYTES = {"cpu": 1 << 27}
GPU_CHUNK_BYTES = 1 << 29


@dataclass
class TokenScores(ModelOutput):  # a mapping: what DDP, DeepSpeed and accelerate know how to pass on
    """For S scored tokens, float32 (S,): `logps` in nats, with gradient; and without gradient `entropy` of the
    predicted distribution (nats), `mean_logit` over the vocabulary, `top1` (1 where the token is the likeliest), and
    where asked for `log_collision`, log Σ_v p_v² (nats). `aux_loss`, where asked for: a mixture of experts'
    load-balancing loss, a scalar with gradient."""

    logps: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    mean_logit: torch.Tensor | None = None
    top1: torch.Tensor | None = None
    log_collision: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None


def full_log_probs(hidden, weight, bias, target, transform=HeadTransform()) -> torch.Tensor:  # noqa: B008
    """The slow twin: log-probs (S,) of `target` (S,) from hidden states (S, H) through the whole float32 logits."""
    logits = transform(F.linear(hidden, weight, bias).float())
    return logits.log_softmax(-1).gather(1, target[:, None]).squeeze(1)


class ChunkedLogProbs(torch.autograd.Function):
    """`full_log_probs` without the logits in memory: chunks of tokens, float32 log-softmax, recomputed in backward.

    Returns (logps, entropy, mean_logit, top1, log_collision), each float32 (S,), the last one None unless `collision`;
    only logps carries gradient, to hidden states, weight and bias. The weight's gradient is summed over chunks in
    float32. `fused` compiles what is done to each chunk's logits.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, target, transform, chunk, collision=False, fused=False):
        on_device = hidden.device.type
        ctx.compute = torch.get_autocast_dtype(on_device) if torch.is_autocast_enabled(on_device) else weight.dtype
        ctx.transform, ctx.chunk, ctx.fused = transform, chunk, fused
        found = hidden.new_empty((6, hidden.size(0)), dtype=torch.float32)
        with torch.autocast(on_device, enabled=False):
            head = Head(weight, bias, ctx.compute, min(chunk, hidden.size(0)))
            reduce = compiled(chunk_statistics) if fused else chunk_statistics
            for at in slices(hidden.size(0), chunk):
                raw = head(hidden[at].to(ctx.compute))
                found[:, at] = reduce(raw, target[at], transform.scale, transform.softcap, collision)
        logps, lse, entropy, mean, top1, twice = found.unbind()
        # Saved, not copied: ZeRO-3 swaps the parameter's storage between forward and backward.
        ctx.save_for_backward(hidden, weight, bias, target, lse)
        ctx.mark_non_differentiable(entropy, mean, top1, twice)
        return logps.clone(), entropy, mean, top1, twice if collision else None

    @staticmethod
    def backward(ctx, grad, *_):
        hidden, weight, bias, target, lse = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.zeros_like(hidden) if need_hidden else None
        d_weight = d_bias = None
        # A shared token that both sides count alike cancels in the DPO logit: its gradient is exactly 0, its row idle.
        rows = grad.nonzero().squeeze(1)
        head = Head(weight, bias, ctx.compute, min(ctx.chunk, rows.numel()))
        derive = compiled(logits_gradient) if ctx.fused else logits_gradient
        for at in rows.split(ctx.chunk) if rows.numel() else ():
            h = hidden[at].to(ctx.compute)
            d_logits = derive(head(h), target[at], grad[at], lse[at], ctx.transform.scale, ctx.transform.softcap)
            if need_bias:
                d_bias = plus(d_bias, d_logits.sum(0))
            d_logits = d_logits.to(ctx.compute)
            if need_hidden:
                d_hidden[at] = (d_logits @ head.weight).to(hidden.dtype)
            if need_weight:
                d_weight = plus_product(d_weight, d_logits.T, h)
        gradients = []
        for needed, d, like in ((need_weight, d_weight, weight), (need_bias, d_bias, bias)):
            gradients.append((torch.zeros_like(like) if d is None else d.to(like.dtype)) if needed else None)
        return d_hidden, *gradients, None, None, None, None, None


def enable_scoring(model, fused: bool = False) -> None:
    """Lets `model(input_ids=…, logp_position=…, label=…)` return TokenScores. Called without `logp_position` the
    model's own forward runs, so generation and saving are unchanged. Give the model before any PEFT wrapping, or its
    `get_base_model()`. Raises UserError for an LM head that carries its own adapter.

    `score_length` is T, the tokens of a row: what stands before the last T hidden states comes from prompt-learning
    PEFT. `score_collision` asks for log_collision, `output_router_logits` for aux_loss. `fused` as in
    ChunkedLogProbs."""
    _plain_head(model)
    own_forward = model.forward
    config = model.config.get_text_config()
    remember_attention(model)
    transform = HeadTransform.of(config)

    def chunk(device) -> int:  # tokens
        return max(64, CHUNK_BYTES.get(device.type, GPU_CHUNK_BYTES) // (4 * config.vocab_size))

    @functools.wraps(own_forward)  # generate() checks its arguments against this signature
    def forward(*args, logp_position=None, label=None, score_length=None, score_collision=False, **kwargs):
        segments = kwargs.get("segments")
        switch(model, packed=segments is not None)
        if logp_position is None:
            return own_forward(*args, **kwargs)
        kwargs.pop("labels", None)  # PEFT passes labels=None
        kwargs["use_cache"] = False
        outputs = _body(model)(*args, **kwargs)
        hidden = outputs.last_hidden_state[:, -score_length:]
        hidden = hidden.reshape(-1, hidden.size(-1))[logp_position.to(hidden.device)]
        head = _plain_head(model)
        with _chunked(head, label.to(hidden.device), transform, chunk(hidden.device), score_collision, fused):
            scores = TokenScores(*head(hidden))
        if kwargs.get("output_router_logits"):
            counts = (
                kwargs.get("attention_mask")
                if segments is None
                else segments.counts.to(hidden.device, non_blocking=True)
            )
            experts = getattr(config, "num_experts", None) or config.num_local_experts
            # In float32: means over thousands of tokens, which a bfloat16 model would make in bfloat16.
            logits = tuple(layer.float() for layer in outputs.router_logits or ())
            balance = load_balancing_loss_func(logits, experts, config.num_experts_per_tok, counts) if logits else 0.0
            scores.aux_loss = torch.as_tensor(balance, device=hidden.device)
        return scores

    model.forward = forward
    model._head_settings = transform, chunk, fused


@contextmanager
def scored_beside(model, target: torch.Tensor):
    """Within it, where the model's own forward calls its LM head, the S hidden states before a row's last are also
    scored as in training, against `target` (S,); their log-probs come into the list that is yielded. They are the
    body's own: what a model does to them before its head (BERT's transform) would be missing. `model` is without
    wrappers."""
    head, (transform, chunk, fused) = _plain_head(model), model._head_settings
    own, before, found, states = head.forward, head.__dict__.get("forward"), [], []
    # OPT and Bart kinds call their body's decoder past the body; where both are called, the body's output comes last.
    bodies = [part for part in (getattr(_body(model), "decoder", None), _body(model)) if part is not None]
    hooks = [part.register_forward_hook(lambda module, inputs, outputs: states.append(outputs[0])) for part in bodies]

    def forward(hidden):
        weights = head.weight, getattr(head, "bias", None)
        if states and states[-1].size(-1) == weights[0].size(-1):
            rows = states[-1].reshape(-1, states[-1].size(-1))[-len(target) - 1 : -1]
            found.append(ChunkedLogProbs.apply(rows, *weights, target, transform, chunk(rows.device), False, fused)[0])
        return own(hidden)

    head.forward = forward
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
        if before is None:
            del head.forward
        else:
            head.forward = before


def _body(model) -> torch.nn.Module:
    return model.model if model.base_model is model else model.base_model  # Llama-4's class misnames it


def _plain_head(model) -> torch.nn.Module:
    head = model.get_output_embeddings()
    if hasattr(head, "modules_to_save"):  # a fully trained copy beside a LoRA adapter
        adapters = [a for a in head.active_adapters if a in head.modules_to_save]
        head = head.modules_to_save[adapters[0]] if adapters and not head.disable_adapters else head.original_module
    if isinstance(head, BaseTunerLayer):
        raise UserError("lora_target_modules: the LM head cannot carry an adapter here; take 'lm_head' out of it.")
    return head


@contextmanager
def _chunked(head, *settings):
    """Within it, calling `head(hidden)` runs ChunkedLogProbs inside the module call, where its weight is gathered."""
    before = head.__dict__.get("forward")

    def forward(hidden):
        return ChunkedLogProbs.apply(hidden, head.weight, getattr(head, "bias", None), *settings)

    head.forward = forward  # written out: torch.compile goes through this, and not through one generator in another
    try:
        yield
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before


def score_tokens(model, batch: PairBatch, collision=False, aux_loss=False) -> TokenScores:
    """Scores of the batch's S supervised tokens under `model` (wrapped by DDP, DeepSpeed or PEFT, or bare). Of a packed
    batch shared tokens are computed once and returned for each side."""
    names = ("input_ids", "attention_mask", "position_ids", "logp_position", "label")
    asked = {"score_collision": collision, "output_router_logits": aux_loss}
    inputs = {name: batch[name] for name in names if name in batch} | {name: True for name in asked if asked[name]}
    if not batch.is_packed:
        return model(**inputs, score_length=batch.input_ids.size(1))
    segments = Segments(batch.segments)
    once = model(**inputs, score_length=batch.input_ids.size(1), segments=segments)
    both = {name: x if name == "aux_loss" else x.index_select(0, batch.unique_index) for name, x in once.items()}
    return TokenScores(**both)
