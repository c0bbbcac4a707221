"""Run by test_shared_rows.py under torchrun: rows that all ranks share against the same rows whole, in every
rank: log-probs, loss and gradients of each family and each batch of awkward lengths. Argument: an output file."""

import json
import os
import sys
from contextlib import contextmanager
from itertools import accumulate
from types import SimpleNamespace

import torch
import torch.distributed as dist
from packed_pairs import AWKWARD, loss_and_gradients, pair, row_of, tiny
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaForCausalLM

import mdpo.forward.sequence_parallel as sequence_parallel
from mdpo.errors import UserError
from mdpo.forward.collators import PackedCollator
from mdpo.forward.modes import base_model
from mdpo.forward.sequence_parallel import Group, Spread
from mdpo.forward.token_logps import score_tokens
from mdpo.memory.fake_step import FakeModel
from mdpo.memory.fake_tensors import replaced
from mdpo.ranks import ROW_RANKS

FAMILIES = ["Llama", "Qwen3", "Gemma2", "Gemma3", "Mixtral", "Qwen3Moe"]
SHORT = [row_of([[5]], [[5, 6]])]  # a row of two tokens, one of them scored
# RoPE that goes by a row's largest position, with an original length between those of the ranks' own tokens.
SHORT_OF = {"max_position_embeddings": 75, "original_max_position_embeddings": 75}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
LONG_ROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "long_factor": [4.0] * 4, "short_factor": [1.0] * 4}
LENGTH = 700  # of a side whose memory is measured
LONG = [pair(70, 40, 30), pair(11, 60, 2, 1)]


def cases() -> dict[str, dict]:
    """name -> what is compared."""
    found = {f"{family} {rows}": {"family": family, "rows": rows} for family in FAMILIES for rows in ("seven", "long")}
    found |= {f"Llama {rows}": {"family": "Llama", "rows": rows} for rows in AWKWARD}
    plain = {"family": "Llama", "rows": "several sequences"}
    odd = {
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "hidden_size": 36,
        "head_dim": 4,
    }  # SmolLM2's proportions
    return found | {
        "short": {**plain, "rows": "short"},
        "not shared": {**plain, "shared": False},
        "heads that do not divide": {**plain, "config": odd},
        "dynamic RoPE": {"family": "Llama", "rows": "long", "config": {**SHORT_OF, "rope_parameters": DYNAMIC}},
        "long RoPE": {"family": "Phi3", "rows": "long", "config": {**SHORT_OF, "rope_parameters": LONG_ROPE}},
        "one key head": {**plain, "config": {"num_key_value_heads": 1}},
        "a head for each key": {**plain, "config": {"num_key_value_heads": 4}},
        "checkpointing": {**plain, "checkpointing": False},
        "reentrant checkpointing": {**plain, "checkpointing": True},
        "LoRA": {**plain, "lora": True},
        "LoRA, checkpointing": {**plain, "lora": True, "checkpointing": True},
        "sdpa": {**plain, "config": {"attn_implementation": "sdpa"}},
        "bfloat16": {**plain, "dtype": torch.bfloat16},
        "wrong: the next rank's heads": {**plain, "wrong": "heads"},
        "wrong: gradients not multiplied": {**plain, "wrong": "gradients"},
        "wrong: ranks deal the tokens out differently": {**plain, "wrong": "order"},
    }


def model_of(family: str, config=None, lora=False, checkpointing=None, dtype=torch.float32, **_):
    model = tiny(family, **(config or {})).to(dtype)
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
        model.enable_input_require_grads()
        torch.manual_seed(3)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
    if checkpointing is not None:
        base_model(model).gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.train()
    return model


@contextmanager
def broken(how: str | None):
    """Negative controls: each is a mistake that the comparison has to notice."""
    own = {name: getattr(sequence_parallel, name) for name in ("head_shares", "deal")}
    backward = sequence_parallel._Gather.backward
    if how == "heads":
        sequence_parallel.head_shares = lambda *args: [*own["head_shares"](*args)[1:], own["head_shares"](*args)[0]]
    if how == "order":
        sequence_parallel.deal = lambda *args: own["deal"](*args)[:, :: 1 - 2 * (dist.get_rank() % 2)].copy()
    if how == "gradients":
        sequence_parallel._Gather.backward = staticmethod(lambda ctx, grad: (grad[ctx.group.rank], None))
    try:
        yield
    finally:
        sequence_parallel._Gather.backward = backward
        for name, function in own.items():
            setattr(sequence_parallel, name, function)


def compared(group: Group, rows: str, shared=True, wrong=None, **case) -> dict[str, float]:
    """Largest differences: of log-probs and statistics, of the loss, of a gradient relative to its norm. And how many
    tokens and scored positions this rank had."""
    batch = PackedCollator(shared)({"short": SHORT, "long": LONG, **AWKWARD}[rows])
    model = model_of(**case)
    aux = hasattr(model.config, "output_router_logits")
    loss, scores, gradients = loss_and_gradients(model, batch, aux)
    with broken(wrong):
        spread = Spread(batch, group)
        own_loss, own_scores, own = loss_and_gradients(model, batch | {"spread": spread}, aux)
    for gradient in own.values():
        dist.all_reduce(gradient)  # and the mean over ranks, as DDP and DeepSpeed have it
    errors = [(own[name] / group.size - x).norm() / x.norm().clamp(min=1e-6) for name, x in gradients.items()]
    pairs = [(own_scores[name], scores[name]) for name in scores]
    return {
        "scores": max(float((a - b).abs().max()) if a.numel() else 0.0 for a, b in pairs),
        "loss": abs(float(own_loss - loss)),
        "gradient": float(max(errors, default=0.0)) if own.keys() == gradients.keys() else float("inf"),
        "tokens": spread.inputs["input_ids"].numel(),
        "scored": spread.inputs["label"].numel(),
        "of": [batch.input_ids.numel(), batch.logp_position.numel()],
    }


class Echo:
    """In the place of torch.distributed: every other rank has what this one has."""

    @staticmethod
    def all_to_all_single(got, sent, *args, **kwargs):
        got.copy_(sent)

    @staticmethod
    def all_gather(parts, x, *args, **kwargs):
        for part in parts:
            part.copy_(x)


def peak_of(step) -> int:
    """Bytes that PyTorch has allocated at most while `step` runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def memory(group: Group, checkpointing: bool) -> dict[str, int]:
    """Bytes of a step with a whole row, with this rank's part of it, with that where no rank answers (gloo's threads
    hold what was sent for a while, and would free it in what is measured next), and as planned."""
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "max_position_embeddings": 2048}
    batch = PackedCollator()([pair(0, LENGTH, LENGTH)])
    found = {}
    part = {"spread": Spread(batch, group)}
    for name, more in (("whole", {}), ("alone", part), ("part", part)):
        model = tiny("Llama", attn_implementation="sdpa", **sizes)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        with replaced(sequence_parallel, "dist", Echo if name == "alone" else dist):
            found[name] = peak_of(lambda m=model, more=more: score_tokens(m, batch | more).logps.sum().backward())
    config = tiny("Llama", attn_implementation="sdpa", **sizes).config
    config._attn_implementation = "sdpa"
    keys = {"shared_prefix": True, "fused_ops": False, "disable_dropout": True, "precompute_ref_log_probs": True}
    args = SimpleNamespace(**keys, gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs=None)
    planned = FakeModel(lambda: LlamaForCausalLM(config), args, row_ranks=group.size).training(1, LENGTH, True, False)
    return found | {"planned": sum(planned.values())}


def refused(group: Group, seed: int) -> bool:
    """Whether a batch is taken for another one than that of the group's other ranks."""
    try:
        group.refuse_other_rows(PackedCollator()([pair(9, 7, 5, seed)]))
    except UserError as error:
        return error.key == "parallelism_config"
    return False


def main(argv: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    os.environ[ROW_RANKS] = str(dist.get_world_size())
    group = Group.of_this_rank(60)
    found = {name: compared(group, **case) for name, case in cases().items()}
    found["memory"] = {str(checkpointing): memory(group, checkpointing) for checkpointing in (False, True)}
    found["refused"] = [refused(group, seed) for seed in (0, group.rank)]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    if dist.get_rank() == 0:
        with open(argv[0], "w", encoding="utf-8") as file:
            json.dump(everyone, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
