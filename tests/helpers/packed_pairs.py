"""Tiny models of many families, pairs of awkward lengths, and their loss and gradients in both layouts."""

import torch
import transformers

from mdpo.forward.collators import PackedCollator, PairCollator
from mdpo.forward.pair_logps import sum_by_pair
from mdpo.forward.token_logps import enable_scoring, score_tokens
from mdpo.loss.registry import LossSettings, PairTerms, pair_losses
from mdpo.types import common_prefix

VOCAB = 97
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
WINDOW = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}
FAMILIES = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Gemma": {"head_dim": 8},
    "Gemma2": {"head_dim": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0, **WINDOW},
    "Gemma3": {"head_dim": 8, **WINDOW},
    "Mistral": {"sliding_window": 5},
    "Phi3": {"sliding_window": None},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2Moe": {**EXPERTS, "shared_expert_intermediate_size": 24},
    "Qwen3Moe": {**EXPERTS, "head_dim": 8},
    "GraniteMoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 3.0},
}


def tiny(family: str, **config):
    """A random model of a family; eager attention, as every family has it, soft-caps included."""
    name = "Gemma3Text" if family == "Gemma3" else family
    settings = getattr(transformers, f"{name}Config")(**{**SIZES, **FAMILIES.get(family, {}), **config})
    settings._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(settings).eval()
    enable_scoring(model)
    return model


def pair(shared: int, chosen: int, rejected: int, seed: int = 0, supervised_from: int = 1) -> dict:
    """A pair of the given lengths, whose own tokens differ from the first one on; half of its tokens supervised."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB - 1, (shared + chosen + rejected,), generator=generator).tolist()
    sides = [ids[: shared + chosen], ids[:shared] + ids[shared + chosen :]]
    if min(chosen, rejected) and shared < min(map(len, sides)):
        sides[1][shared] = sides[0][shared] + 1
    masks = [[int(t >= supervised_from and (t % 4 < 2 or t == len(s) - 1)) for t in range(len(s))] for s in sides]
    tokens = [list(zip(s, m, strict=True)) for s, m in zip(sides, masks, strict=True)]
    return {
        **{"chosen_ids": sides[0], "chosen_mask": masks[0], "rejected_ids": sides[1], "rejected_mask": masks[1]},
        "shared_len": common_prefix(*tokens),
        "row": seed,
    }


AWKWARD = {
    "seven": [pair(n, m, k, seed) for seed, (n, m, k) in enumerate(
        [(9, 7, 5), (0, 4, 6), (1, 5, 3), (12, 1, 9), (6, 8, 1), (20, 3, 3), (2, 30, 4)])],
    "one": [pair(9, 7, 5)],
    "no prefix": [pair(0, 4, 6)],
    "prefix of one": [pair(1, 4, 6, supervised_from=1)],
    "suffixes of one": [pair(9, 1, 1)],
    "rejected is chosen's beginning": [pair(9, 5, 0)],
    "chosen is rejected's beginning": [pair(9, 0, 5)],
    "nothing supervised before the branch": [pair(9, 7, 5, supervised_from=9)],
    "one side of two tokens": [pair(1, 1, 12)],
}  # fmt: skip


def batches(rows):
    return PackedCollator()(rows), PairCollator(0)(rows)


def loss_and_gradients(model, batch, aux_loss=False):
    """DPO's loss of a batch against fixed reference values, its log-probs, and every gradient."""
    scores = score_tokens(model, batch, aux_loss=aux_loss)
    policy = sum_by_pair(scores.logps, batch)
    reference = sum_by_pair(scores.logps.detach() + torch.linspace(-0.1, 0.1, len(scores.logps)), batch)
    loss = pair_losses(PairTerms.of(policy, reference, policy, LossSettings(loss_type=["sigmoid", "ipo"]))).mean()
    loss = loss + scores.aux_loss if aux_loss else loss
    model.zero_grad()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), scores, gradients


class Alone:
    """What Layout asks of an accelerator, for one process."""

    device = torch.device("cpu")
    unwrap_model = staticmethod(lambda model: model)
    reduce = staticmethod(lambda value, how: value)
    autocast = staticmethod(torch.no_grad)
