"""Log-probs of supervised tokens: the backbone once, the LM head only where a token is scored, in chunks.

The head is called as a module exactly once per forward, whatever the number of chunks (0 too). Under DeepSpeed ZeRO-3
its hooks then gather the weight once in forward and once in backward, and ranks with different counts stay in step.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func  # every family's is this one
from transformers.utils import ModelOutput

from mdpo.errors import UserError
from mdpo.forward.compiled_ops import compiled
from mdpo.forward.forest import Forest
from mdpo.forward.lm_head import Head, HeadTransform, chunk_statistics, logits_gradient, plus, plus_product, slices
from mdpo.forward.scoring_head import ScoringHead
from mdpo.forward.sequence_parallel import Spread
from mdpo.types import PairBatch

# Of float32 logits in memory at a time. On a GPU each chunk's backward reads and writes the weight's float32 gradient,
# 8 bytes a weight, for 2 FLOPs a weight and token: an H100 (990 TFLOP/s, 3.35 TB/s, by its data sheet) computes for as
# long as it waits from 1200 tokens on, an A100 from 600. 512 MiB are 880 tokens of 152 000 words; a CPU's were 220.
CHUNK_BYTES = {"cpu": 1 << 27}
GPU_CHUNK_BYTES = 1 << 29


@dataclass
class TokenScores(ModelOutput):  # a mapping: what DDP, DeepSpeed and accelerate know how to pass on
    """For S scored tokens, float32 (S,): `logps` in nats, with gradient; and without gradient `entropy` of the
    predicted distribution (nats), `mean_logit` over the vocabulary, `top1` (1 where the token is the likeliest), and
    where asked for `log_sum_p_squared`, log Σ_v p_v² (nats). `aux_loss`, where asked for: a mixture of experts'
    load-balancing loss, a scalar with gradient."""

    logps: torch.Tensor
    entropy: torch.Tensor | None = None
    mean_logit: torch.Tensor | None = None
    top1: torch.Tensor | None = None
    log_sum_p_squared: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None


def full_log_probs(hidden, weight, bias, target, transform=HeadTransform()) -> torch.Tensor:  # noqa: B008
    """The reference implementation: log-probs (S,) of `target` (S,) from hidden states (S, H), logits all at once."""
    logits = transform(F.linear(hidden, weight, bias).float())
    return logits.log_softmax(-1).gather(1, target[:, None]).squeeze(1)


class ChunkedLogProbs(torch.autograd.Function):
    """`full_log_probs` without the logits in memory: chunks of tokens, float32 log-softmax, recomputed in backward.

    Returns (logps, entropy, mean_logit, top1, log_sum_p_squared), each float32 (S,), the last one None unless
    `collision`; only logps carries gradient, to hidden states, weight and bias. The weight's gradient is summed over
    chunks in float32. `fused` compiles what is done to each chunk's logits.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, target, transform, chunk, collision=False, fused=False):
        on_device = hidden.device.type
        ctx.compute = torch.get_autocast_dtype(on_device) if torch.is_autocast_enabled(on_device) else weight.dtype
        ctx.transform, ctx.chunk, ctx.fused = transform, chunk, fused
        statistics = hidden.new_empty((6, hidden.size(0)), dtype=torch.float32)
        with torch.autocast(on_device, enabled=False):
            head = Head(weight, bias, ctx.compute, min(chunk, hidden.size(0)))
            reduce = compiled(chunk_statistics) if fused else chunk_statistics
            for rows in slices(hidden.size(0), chunk):
                raw = head(hidden[rows].to(ctx.compute))
                statistics[:, rows] = reduce(raw, target[rows], transform.scale, transform.softcap, collision)
        logps, lse, entropy, mean, top1, log_sum_p_squared = statistics.unbind()
        # Saved, not copied: ZeRO-3 swaps the parameter's storage between forward and backward.
        ctx.save_for_backward(hidden, weight, bias, target, lse)
        ctx.mark_non_differentiable(entropy, mean, top1, log_sum_p_squared)
        return logps.clone(), entropy, mean, top1, log_sum_p_squared if collision else None

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
        for part in rows.split(ctx.chunk) if rows.numel() else ():
            h = hidden[part].to(ctx.compute)
            d_logits = derive(head(h), target[part], grad[part], lse[part], ctx.transform.scale, ctx.transform.softcap)
            if need_bias:
                d_bias = plus(d_bias, d_logits.sum(0))
            d_logits = d_logits.to(ctx.compute)
            if d_hidden is not None:
                d_hidden[part] = (d_logits @ head.weight).to(hidden.dtype)
            if need_weight:
                d_weight = plus_product(d_weight, d_logits.T, h)
        gradients = []
        for needed, d, like in ((need_weight, d_weight, weight), (need_bias, d_bias, bias)):
            gradients.append((torch.zeros_like(like) if d is None else d.to(like.dtype)) if needed else None)
        return d_hidden, *gradients, None, None, None, None, None


def enable_scoring(model, fused: bool = False) -> ScoringHead:
    """Lets `model(input_ids=…, logp_position=…, label=…)` return TokenScores, until the ScoringHead that is returned is
    `restore`d; a model that has one keeps it. Called without `logp_position` the model's own forward runs. Give the
    model before any PEFT wrapping, or its `get_base_model()`; errors are those of `ScoringHead.install`.

    `score_length` is T, the tokens of a row: what comes before the last T hidden states is
    prompt-learning PEFT's. `score_collision` asks for log_sum_p_squared, `output_router_logits` for aux_loss. `fused`
    as in ChunkedLogProbs."""
    scoring = ScoringHead.of(model)
    if scoring is None:
        return ScoringHead(model, _scores, fused).install()
    scoring.claim()
    scoring.fused = fused
    return scoring


def _scores(scoring: ScoringHead, *args, logp_position, label, score_length, score_collision, **kwargs) -> TokenScores:
    """TokenScores of one call of the model, whose body gets `args` and `kwargs`."""
    kwargs.pop("labels", None)  # PEFT passes labels=None
    kwargs["use_cache"] = False
    outputs = _body(scoring.model)(*args, **kwargs)
    hidden = outputs.last_hidden_state[:, -score_length:]
    hidden = hidden.reshape(-1, hidden.size(-1))[logp_position.to(hidden.device)]
    label, settings = label.to(hidden.device), _settings(scoring, hidden.device)

    def log_probs(weight, bias, hidden):
        return ChunkedLogProbs.apply(hidden, weight, bias, label, *settings, score_collision, scoring.fused)

    with scoring.lm_head_computes(log_probs) as head:
        scores = TokenScores(*head(hidden))
    if kwargs.get("output_router_logits"):
        scores.aux_loss = _balance(scoring.model.config.get_text_config(), outputs, kwargs, hidden.device)
    return scores


def _settings(scoring: ScoringHead, device: torch.device) -> tuple[HeadTransform, int]:
    """What is done to logits, and how many tokens' logits are in memory at a time."""
    vocabulary = scoring.model.config.get_text_config().vocab_size
    return scoring.transform, max(64, CHUNK_BYTES.get(device.type, GPU_CHUNK_BYTES) // (4 * vocabulary))


def _balance(config, outputs, inputs: dict, device) -> torch.Tensor:
    """A mixture of experts' load-balancing loss, a scalar; a shared token counts for each sequence."""
    forest = inputs.get("forest")
    if forest is None:
        counts = inputs.get("attention_mask")
    else:
        counts = forest.counts.to(device, non_blocking=True)
    experts = getattr(config, "num_experts", None) or config.num_local_experts
    # In float32: means over thousands of tokens, which a bfloat16 model would make in bfloat16.
    logits = tuple(layer.float() for layer in outputs.router_logits or ())
    if counts is not None and forest is not None and forest.spread is not None and logits:
        return _balance_of_part(logits, experts, config.num_experts_per_tok, counts, forest.spread)
    balance = load_balancing_loss_func(logits, experts, config.num_experts_per_tok, counts) if logits else 0.0
    return torch.as_tensor(balance, device=device)


def _balance_of_part(logits, experts: int, top_k: int, counts: torch.Tensor, spread: Spread) -> torch.Tensor:
    """`load_balancing_loss_func` of a row of which this rank has a part, and each rank's sums."""
    weights = spread.part(counts[0].float())
    chosen, probability = logits[0].new_zeros(2, experts).unbind()
    for layer in logits:
        chances = layer.softmax(-1)
        taken = chances.topk(top_k).indices.reshape(-1)
        chosen = chosen.index_add(0, taken, weights.repeat_interleave(top_k))
        probability = probability + (chances * weights[:, None]).sum(0)
    means = spread.total(torch.stack([chosen, probability])) / (len(logits) * counts.sum())
    return experts * means.prod(0).sum()


@contextmanager
def scored_beside(model, target: torch.Tensor):
    """Within it, where the model's own forward calls its LM head, the S hidden states before a row's last are also
    scored as in training, against `target` (S,); their log-probs go into the list that is yielded. They are the
    body's own: what a model does to them before its head (BERT's transform) would be missing. `model`, without
    wrappers, has a scoring head."""
    scoring = ScoringHead.of(model)
    if scoring is None:
        raise _no_scoring_head(model)
    own, logps, states = scoring.lm_head.forward, [], []
    # OPT and Bart kinds call their body's decoder past the body; where both are called, the body's output comes last.
    bodies = [part for part in (getattr(_body(model), "decoder", None), _body(model)) if part is not None]
    hooks = [part.register_forward_hook(lambda module, inputs, outputs: states.append(outputs[0])) for part in bodies]

    def both(weight, bias, hidden):
        if states and states[-1].size(-1) == weight.size(-1):
            rows = states[-1].reshape(-1, states[-1].size(-1))[-len(target) - 1 : -1]
            settings = _settings(scoring, rows.device)
            logps.append(ChunkedLogProbs.apply(rows, weight, bias, target, *settings, False, scoring.fused)[0])
        return own(hidden)

    try:
        with scoring.lm_head_computes(both):
            yield logps
    finally:
        for hook in hooks:
            hook.remove()


def _no_scoring_head(model) -> UserError:
    return UserError(f"scoring: {type(model).__name__} has no scoring head. Call `enable_scoring` on it first.")


def _body(model) -> torch.nn.Module:
    return model.model if model.base_model is model else model.base_model  # Llama-4's class misnames it


def score_tokens(model, batch: PairBatch, collision=False, aux_loss=False) -> TokenScores:
    """Scores of the batch's S supervised tokens under `model` (wrapped by DDP, DeepSpeed or PEFT, or bare). Of a packed
    batch shared tokens are computed once and returned for each sequence. Raises UserError for a model without a scoring
    head."""
    names = ("input_ids", "attention_mask", "position_ids", "logp_position", "label")
    optional = {"score_collision": collision, "output_router_logits": aux_loss}
    inputs = {name: batch[name] for name in names if name in batch} | {
        name: True for name in optional if optional[name]
    }
    if batch.is_packed:
        inputs |= {"forest": Forest(batch.runs, batch.ends, batch.spread)}
    if batch.spread is not None:
        inputs |= batch.spread.inputs
    scores = model(**inputs, score_length=inputs["input_ids"].size(1))
    if "logps" not in scores:
        raise _no_scoring_head(model)
    if not batch.is_packed:
        return scores
    if batch.spread is not None:
        scores = _of_all_ranks(scores, batch.spread)
    expanded = {name: x if name == "aux_loss" else x.index_select(0, batch.unique_index) for name, x in scores.items()}
    return TokenScores(**expanded)


def _of_all_ranks(scores: TokenScores, spread: Spread) -> TokenScores:
    """Of all U scored positions of a row that several ranks share, from this rank's."""
    names = [name for name in scores if name != "aux_loss"]
    logps, *rest = spread.collect(torch.stack([scores[name] for name in names])).unbind()
    statistics = {name: x.detach() for name, x in zip(names[1:], rest, strict=True)}
    return TokenScores(logps=logps, **statistics, aux_loss=scores.aux_loss)
