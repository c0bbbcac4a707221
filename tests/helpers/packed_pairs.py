"""Tiny models of many families, pairs of awkward lengths and branches, and their loss and gradients in both layouts."""

from itertools import combinations

import torch
import transformers

from mdpo.forward.collators import PackedCollator, PairCollator
from mdpo.forward.pair_logps import sum_by_pair
from mdpo.forward.token_logps import enable_scoring, score_tokens
from mdpo.loss.registry import LossSettings, PairTerms, pair_losses
from mdpo.types import SIDES, sequence_lengths, split

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
    return row_of([sides[0]], [sides[1]], seed, supervised_from)


def row_of(chosen: list[list[int]], rejected: list[list[int]], number: int = 0, supervised_from: int = 1) -> dict:
    """A tokenized row whose sides are these sequences; of each half of the tokens and the last one are supervised."""
    row: dict = {"row": number}
    for side, sequences in zip(SIDES, (chosen, rejected), strict=True):
        row[f"{side}_ids"] = [i for ids in sequences for i in ids]
        row[f"{side}_mask"] = [int(t >= supervised_from and (t % 4 < 2 or t == len(ids) - 1))
                               for ids in sequences for t in range(len(ids))]  # fmt: skip
        row[f"{side}_lengths"] = [len(ids) for ids in sequences] if len(sequences) > 1 else []
    return row


def sequences(rows: list[dict]) -> list[tuple[list[int], list[int]]]:
    """(ids, mask) of each sequence of a batch, in its order."""
    return [
        pair
        for side in SIDES
        for row in rows
        for pair in zip(
            *(split(row[f"{side}_{name}"], sequence_lengths(row, side)) for name in ("ids", "mask")), strict=True
        )
    ]


def random_ids(n: int, seed: int) -> list[int]:
    return torch.randint(3, VOCAB - 1, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def answers_of_one_prompt(prompt: int, lengths: list[int], pairs: int) -> list[dict]:
    """Pairs of answers of these lengths to one prompt, an earlier one the better: each answer is in several."""
    sides = [random_ids(prompt, 0) + random_ids(n, 1 + i) for i, n in enumerate(lengths)]
    ranked = sorted(combinations(sides, 2), key=lambda pair: sides.index(pair[1]) - sides.index(pair[0]))
    return [row_of([better], [worse], i, prompt) for i, (better, worse) in enumerate(ranked[:pairs])]


def thinking(turns: int, seed: int) -> list[list[int]]:
    """Sequences of a side whose thoughts leave the history: each turn is sampled behind earlier answers alone."""
    history, out = random_ids(5, 0), []
    for turn in range(turns):
        thought, answer, user = (random_ids(n, 100 * seed + 10 * turn + n) for n in (4, 3, 2))
        out.append(history + thought + answer)
        history = history + answer + user
    return out


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
    "8 answers, 16 pairs": answers_of_one_prompt(12, [9, 3, 1, 6, 2, 2, 5, 14], 16),
    "equal sides in two pairs": [row_of([[5, 6, 7, 8]], [[5, 6, 9]]), row_of([[5, 6, 9]], [[5, 6, 10]], 1)],
    "equal sides in one pair": [row_of([[5, 6, 7, 8]], [[5, 6, 7, 8]]), pair(3, 2, 2)],
    "beginnings of one another": [row_of([[5, 6, 7, 8]], [[5, 6]]), row_of([[5, 6, 7]], [[5, 6, 7, 8, 9, 10]], 1)],
    "sequences of one token": [row_of([[5], [5, 6, 7]], [[9, 4, 4, 4], [7]])],
    "one token in common": [pair(1, 20, 14), row_of([random_ids(1, 0) + random_ids(25, 7)], [[3, 4]], 1)],
    "several sequences": [row_of(thinking(3, 1), thinking(2, 2)), pair(4, 3, 5, 1),
                          row_of(thinking(1, 1), thinking(4, 3), 2)],
    "branches of branches": [row_of([ids[:n] + random_ids(3, n) for n in (20, 14, 8)], [ids[:17], ids[:9] + ids[2:9]])
                             for ids in [random_ids(20, 5)]],
}  # fmt: skip


EVERYTHING = [
    row
    for name in ("seven", "8 answers, 16 pairs", "several sequences", "branches of branches")
    for row in AWKWARD[name]
]


def not_causal(self, sizes, before, window, like):
    """In place of `Forest.mask`."""
    return like.new_zeros(sum(sizes), before + sum(sizes))


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
