"""Planned memory against what PyTorch and DeepSpeed really allocate, and against DeepSpeed's own estimates."""

import copy

import pytest
import torch
from datasets import Dataset
from plans import CONFIGS, LENGTH, LORA, recipe_for
from tiny import CHATML, tokenizer_for
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    TrainerCallback,
)
from trl import get_peft_config

from dpo_trainer import DPOTrainer
from mdpo.memory.breakdown import LIBRARIES, MemoryPlan
from mdpo.memory.estimate import plan_memory
from mdpo.memory.sharding import Sharding

CPU = Sharding(cpu=True)


def longest_pairs(n: int) -> Dataset:
    """Pairs that share nothing, with every token behind the first one supervised."""
    draw = torch.Generator().manual_seed(0)
    mask, rows = [0] + [1] * (LENGTH - 1), []
    for i in range(n):
        sides = [[first, *torch.randint(3, 400, (LENGTH - 1,), generator=draw).tolist()] for first in (1, 2)]
        row = {"chosen_ids": sides[0], "rejected_ids": sides[1], "chosen_mask": mask, "rejected_mask": mask}
        rows.append({**row, "distinct": 2 * LENGTH, "margin": None, "key": str(i), "digest": str(i)})
    return Dataset.from_list(rows)


class SecondStep(TrainerCallback):
    """Profiles the allocator from the begin of the second step to the optimizer's part of it."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True).__enter__()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.profile.__exit__(None, None, None)

    def peak(self) -> int:
        events = [e for e in self.profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        assert len(events) > 500
        now = highest = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            now += event.nbytes()
            highest = max(highest, now)
        return highest


def allocated(recipe, config) -> int:
    """Bytes: weights, AdamW's states, and the highest sum of what a real step allocates."""
    torch.manual_seed(0)
    args, watch = recipe.training, SecondStep()
    args.max_steps = 2
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32),
        args=args,
        train_dataset=longest_pairs(4 * args.gradient_accumulation_steps),
        processing_class=tokenizer_for(CHATML),
        peft_config=get_peft_config(recipe.model),
        callbacks=[watch],
    )
    trainer.train()
    states = trainer.optimizer.state.values()
    held = [t for state in states for t in state.values() if isinstance(t, torch.Tensor)]
    models = [m for m in (trainer.model, trainer.ref_model) if m is not None]
    return sum(t.nbytes for t in held + [p for m in models for p in m.parameters()]) + watch.peak()


def compare(folder, name, **keys) -> tuple[MemoryPlan, int]:
    recipe = recipe_for(folder, CONFIGS[name], reference_cache_dir=str(folder / "cache"), **keys)
    plan = plan_memory(recipe, CPU)
    assert plan.phase == "a training step"
    return plan, allocated(recipe, CONFIGS[name])


def agree(plan: MemoryPlan, measured: int) -> None:
    planned = plan.total - LIBRARIES["CPU"]
    assert planned == pytest.approx(measured, rel=0.05), (
        f"planned {planned / 1e6:.1f} MB, measured {measured / 1e6:.1f}"
    )


def test_a_gemma_step(tmp_path):
    """Also the wrong twin: the plan with checkpointing is not that of a step without."""
    plan, measured = compare(tmp_path, "gemma", gradient_checkpointing=False)
    agree(plan, measured)
    other = plan_memory(recipe_for(tmp_path, CONFIGS["gemma"], gradient_checkpointing=True), CPU)
    assert other.total - LIBRARIES["CPU"] < 0.8 * measured


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("gemma", {"gradient_checkpointing": True}),
        ("llama", {"gradient_checkpointing": False}),
        ("llama", {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}),
        ("qwen3", {"gradient_checkpointing": False}),
        ("qwen3", {"gradient_checkpointing": True}),
        ("qwen3", {"gradient_checkpointing": True, **LORA}),
        ("llama", {"gradient_checkpointing": False, **LORA}),
        ("qwen3", {"gradient_checkpointing": False, "fused_ops": True}),
        ("gemma", {"gradient_checkpointing": True, "shared_prefix": False}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(f"{k}={v}" for k, v in value.items()),
)
def test_a_step(tmp_path, name, keys):
    agree(*compare(tmp_path, name, **keys))


@pytest.mark.slow
def test_a_reference_in_the_step(tmp_path):
    """Its weights count, and its activations while the policy's are there."""
    recipe = recipe_for(tmp_path, CONFIGS["gemma"], precompute_ref_log_probs=False, gradient_checkpointing=True)
    plan = plan_memory(recipe, CPU)
    assert plan.parts["reference"] == plan.parts["weights"]
    agree(plan, allocated(recipe, CONFIGS["gemma"]))
