"""Run by test_launch.py on two ranks: ZeRO-3, no persistent parameters, rank 1 scores no token at all. Counts how
often the LM head's weight is gathered, and prints loss and gradient norms. Then packed rows and compiled modules
under ZeRO-2 and ZeRO-3 against padded rows and plain modules in one process. Argument: an output file."""

import json
import sys

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import safe_get_full_grad
from tiny import CHATML, tiny_llama, tokenizer_for

import mdpo.forward.compiled_ops
import mdpo.forward.token_logps
from mdpo.forward.collators import PackedCollator, PairCollator
from mdpo.forward.compiled_ops import fuse
from mdpo.forward.token_logps import enable_scoring, score_tokens
from mdpo.runs.entrypoint import run

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    # Nothing stays gathered between forward and backward, so that each gather is seen.
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
    },
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


VARIANTS = [(3, False), (3, True), (2, False), (2, True)]  # stage, bfloat16


def pair(n: int) -> dict:
    """A pair of 40 tokens a side of which the last `n` are supervised."""
    ids = [(7 * i) % 90 + 5 for i in range(40)]
    mask = [0] * (40 - n) + [1] * n
    return {"chosen_ids": ids, "chosen_mask": mask, "rejected_ids": ids[::-1], "rejected_mask": mask}


def branching(n: int, length: int, again: int = 0) -> dict:
    """A pair that shares `n` tokens, of `length` a side; on rank 1 (n = 0, length 12) it is a short one. Chosen has a
    second sequence, its first `again` tokens and six others, if that is not 0."""
    ids = [(7 * i) % 90 + 5 for i in range(length)]
    rejected = ids[:n] + [(t + 3) % 90 + 5 for t in ids[n:]]
    mask = [0] + [1] * (length - 1)
    row = {"chosen_ids": ids, "chosen_mask": mask, "rejected_ids": rejected, "rejected_mask": mask}
    if again:
        second = ids[:again] + [4] * 6
        row |= {"chosen_ids": ids + second, "chosen_mask": mask + [0] * again + [1] * 6}
        row["chosen_lengths"] = [length, len(second)]
    return row


def packed_and_fused(rank: int, stage: int, half: bool) -> dict[str, float]:
    """The largest difference of a gradient under ZeRO from one process's in float32, relative to its norm."""
    mdpo.forward.compiled_ops.MIN_WIDTH = 1
    rows = [branching(25, 40, again=12), branching(0, 12)]
    model = tiny_llama(tokenizer_for(CHATML))
    fused = fuse(model, torch.device("cpu"))
    enable_scoring(model, fused[0])
    config = {**CONFIG, "zero_optimization": {**CONFIG["zero_optimization"], "stage": stage}, "bf16": {"enabled": half}}
    engine, *_ = deepspeed.initialize(model=model, config=config)
    batch = PackedCollator()([rows[rank]])
    engine.backward(-score_tokens(engine, batch).logps.sum())
    plain = tiny_llama(tokenizer_for(CHATML))
    enable_scoring(plain)
    for row in rows:
        (-score_tokens(plain, PairCollator(0)([row])).logps.sum() / 2).backward()  # ZeRO takes the mean of ranks
    errors = []
    for weight, reference in zip(model.parameters(), plain.parameters(), strict=True):
        gradient = safe_get_full_grad(weight)
        errors.append(((gradient - reference.grad).norm() / reference.grad.norm()).item())
    return {"fused": fused == (True, None), "tokens": batch["input_ids"].numel(), "error": max(errors)}


def main(argv: list[str]) -> None:
    [out] = argv
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    rank = dist.get_rank()
    mdpo.forward.token_logps.CHUNK_BYTES = {"cpu": 1}  # chunks of 64 tokens
    model = tiny_llama(tokenizer_for(CHATML))
    enable_scoring(model)
    engine, *_ = deepspeed.initialize(model=model, config=CONFIG)
    head, gathers = model.lm_head.weight, []
    name = "_PartitionedParameterCoordinator__all_gather_params"
    gather = getattr(PartitionedParameterCoordinator, name)

    def counted(self, params, forward):
        gathers.extend(["forward" if forward else "backward"] * sum(p.ds_id == head.ds_id for p in params))
        return gather(self, params, forward)

    setattr(PartitionedParameterCoordinator, name, counted)
    steps = []
    for counts in ((39, 0), (39, 5), (0, 0)):  # supervised tokens a side on rank 0 and rank 1: 78 are two chunks
        gathers.clear()
        batch = PairCollator(0)([pair(counts[rank])])
        logps = score_tokens(engine, batch).logps
        engine.backward(-logps.sum())
        gradient = safe_get_full_grad(head)
        steps.append(
            {
                "tokens": len(logps),
                "gathers": list(gathers),
                "loss": -logps.sum().item(),
                "norm": gradient.norm().item(),
            }
        )
        engine.step()
    everyone = [None, None]
    setattr(PartitionedParameterCoordinator, name, gather)
    dist.all_gather_object(everyone, {"steps": steps, "packed": [packed_and_fused(rank, *x) for x in VARIANTS]})
    if rank == 0:
        with open(out, "w", encoding="utf-8") as file:
            json.dump(everyone, file)


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
