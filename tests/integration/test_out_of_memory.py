"""What a user reads when memory runs out: recognized from real errors, with changes that apply, in order of cost."""

import json
import os
import resource
import subprocess
import sys
import types

import pytest
import torch
from datasets import Dataset
from errors import refused
from plans import SIZES, recipe_for
from repository import ROOT
from transformers import Qwen3Config

from mdpo.config.recipe import load_recipe
from mdpo.forward.collators import PackedCollator, PairCollator
from mdpo.memory.breakdown import GB, MemoryPlan
from mdpo.memory.oom import (
    OFFLOAD,
    PARALLEL,
    ZERO3,
    MemorySnapshot,
    describe_batch,
    explain,
    explained,
    is_out_of_memory,
    next_changes,
    report,
)
from mdpo.memory.sharding import Sharding

RECIPE = ROOT / "recipes/gemma-7b-it/dpo/config_full.yaml"
EIGHT = Sharding(2, 8, precision="bf16")


def raised_from(inner):
    error = RuntimeError("the engine failed")
    error.__cause__ = inner
    return error


@pytest.mark.parametrize(
    ("error", "ran_out"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB."), True),
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"),
            True,
        ),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:116] data. DefaultCPUAllocator: not enough memory: you tried"),
            True,
        ),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (raised_from(torch.OutOfMemoryError("CUDA out of memory.")), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (ValueError("the template ran out of memory cells"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (raised_from(ValueError("no")), False),
    ],
)
def test_errors(error, ran_out):
    assert is_out_of_memory(error) is ran_out


@pytest.mark.slow
def test_a_step_that_really_runs_out():
    """Under a limit of addresses; with room for it the same step ends well."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def step(spare: int) -> dict:
        command = [sys.executable, ROOT / "tests/helpers/out_of_memory_worker.py", str(spare)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
        return json.loads(done.stdout.splitlines()[-1])

    died = step(200_000_000)
    assert died["type"] == "RuntimeError" and "DefaultCPUAllocator" in died["text"]
    assert is_out_of_memory(RuntimeError(died["text"]))
    assert step(20 << 30)["type"] is None


def pair(prefix: int, chosen: int, rejected: int, row: int) -> dict:
    """Tokens of one pair; all behind the prefix are supervised."""
    ids = {"chosen": [5] * prefix + [6] * chosen, "rejected": [5] * prefix + [7] * rejected}
    masks = {f"{side}_mask": [0] * prefix + [1] * (len(ids[side]) - prefix) for side in ids}
    return {**{f"{side}_ids": x for side, x in ids.items()}, **masks, "row": row, "margin": None}


ROWS = [pair(4, 3, 2, 2), pair(10, 5, 6, 0)]  # 4+3 + 4+2 = 13 tokens, 15 + 16 = 31; all begin with 4 fives


def test_batches_in_both_layouts():
    keys = ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"]
    packed = describe_batch(PackedCollator()(ROWS), keys)
    assert packed == "2 pairs, 44 tokens (26 computed, shared ones once); the longest pair has 31: a.jsonl:1"
    padded = describe_batch(PairCollator(0)(ROWS))  # four rows of 16
    assert padded == "2 pairs, 44 tokens (64 computed, padding included); the longest pair has 31: row 0"


def changes(sharding=EIGHT, plan=None, gb=80.0, **keys) -> list[str]:
    argv = [str(RECIPE.relative_to(ROOT)), *(f"--{key}={value}" for key, value in keys.items())]
    return next_changes(load_recipe(argv), sharding, plan, gb, argv)


def plan_of(gb: float, length=2048, longest=1536) -> MemoryPlan:
    """A plan that needs `gb` at `length`, as much for each token, and as much as a recipe allows at `longest`."""
    return MemoryPlan(
        {"a training step": {"activations": gb * GB}}, length, 0.0, 8192, lambda n: plan_of(gb * n / length, n, longest)
    )


def test_all_changes_in_order_of_cost():
    keys = {"precompute_ref_log_probs": "false", "gradient_checkpointing": "false", "per_device_train_batch_size": 4}
    found = changes(**keys)
    starts = ["--precompute_ref", "--gradient_ch", "--per_device", "accelerate", "--max_length", "accelerate"]
    assert [line[: len(start)] for line, start in zip(found, starts, strict=True)] == starts
    assert ZERO3 in found[3] and OFFLOAD in found[5]


def test_further_shares_of_the_weights_are_named():
    plan = MemoryPlan(
        {"a training step": {"secondary weights": 2.13 * GB, "weights": GB}}, 2048, 0.0, 8192, lambda n: plan
    )
    for given, size in ((plan, " 2.13 GB "), (None, "")):
        found = [line for line in changes(plan=given, sharding=Sharding(3, 16, secondary=8)) if "zero_hpz" in line]
        assert len(found) == 1 and size in found[0]
    assert not [line for line in changes(plan=None, sharding=Sharding(3, 16)) if "zero_hpz" in line]


@pytest.mark.parametrize(
    ("pairs", "steps", "says"),
    [
        (
            4,
            4,
            "--per_device_train_batch_size=2 --gradient_accumulation_steps=8: the same global batch, 2 × 8 × 8 = 128",
        ),
        (
            3,
            2,
            "--per_device_train_batch_size=1 --gradient_accumulation_steps=6: the same global batch, 1 × 6 × 8 = 48",
        ),
        (
            7,
            3,
            "--per_device_train_batch_size=3 --gradient_accumulation_steps=7: the same global batch, 3 × 7 × 8 = 168",
        ),
        (
            5,
            1,
            "--per_device_train_batch_size=1 --gradient_accumulation_steps=5: the same global batch, 1 × 5 × 8 = 40",
        ),
    ],
)
def test_the_global_batch_stays(pairs, steps, says):
    [line] = [
        line
        for line in changes(per_device_train_batch_size=pairs, gradient_accumulation_steps=steps)
        if line.startswith("--per_device")
    ]
    assert line == says + " pairs."


def test_ranks_that_share_rows_stay_so():
    """Of 8 ranks in two groups: the batch is that of two, and no file is named in which each rank has its own rows."""
    found = changes(Sharding(3, 8, precision="bf16", row_ranks=4), per_device_train_batch_size=2)
    assert found[0].endswith("1 × 2 × 2 = 4 pairs.")
    assert not any(".yaml" in line.partition(" run_dpo.py")[0] for line in found)


def test_what_is_on_or_cannot_apply_is_left_out():
    left = changes(per_device_train_batch_size=1)  # the recipe: precomputed, checkpointed
    assert [line.partition("=")[0].partition(" --")[0] for line in left] == [
        "accelerate launch",
        "--max_length",
        "accelerate launch",
        "accelerate launch",
    ]
    assert [name for line in left for name in (ZERO3, PARALLEL, OFFLOAD) if name in line] == [ZERO3, PARALLEL, OFFLOAD]
    assert f"{PARALLEL} --num_processes 8 " in left[2] and "--gradient_accumulation_steps=8, with sp_size 8" in left[2]
    adapter = changes(precompute_ref_log_probs="false", use_peft="true")
    assert not any(line.startswith("--precompute") for line in adapter)  # the policy without adapter is the reference
    sharded = changes(Sharding(3, 8, precision="bf16"))
    assert not any(ZERO3 in line for line in sharded) and any(OFFLOAD in line for line in sharded)
    assert not any(ZERO3 in line for line in changes(Sharding(0, 1)))  # nothing to share with
    assert not any(".yaml" in line for line in changes(EIGHT, load_in_4bit="true", use_peft="true"))
    everything = Sharding(3, 8, 1, True, True, "bf16")
    assert changes(everything, plan_of(100, length=2), per_device_train_batch_size=1) == [
        "LoRA (--use_peft=true), a smaller model, or more memory: nothing cheaper is left."
    ]


def test_commands_repeat_the_command_line():
    [zero3] = [line for line in changes(beta=0.2) if ZERO3 in line]
    command = "run_dpo.py recipes/gemma-7b-it/dpo/config_full.yaml --beta=0.2"
    assert zero3.startswith(f"accelerate launch --config_file {ZERO3} --num_processes 8 {command}:")
    assert (ROOT / ZERO3).exists()


def test_max_length_is_the_planner_s():
    assert any(
        line.startswith("--max_length=1600:") for line in changes(plan=plan_of(100), gb=80)
    )  # 1638 in steps of 64
    assert any(line.startswith("--max_length=1536:") for line in changes(plan=plan_of(40), gb=80))  # it had said: fits


def test_report():
    batch = PackedCollator()(ROWS)
    recipe = load_recipe([str(RECIPE), "--per_device_train_batch_size=1"])
    seen = MemorySnapshot(79 * 10**9, 80 * 10**9, 79_500_000_000, "GPU")
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.\nmore")
    lines = report(error, batch, recipe, EIGHT, seen, plan_of(100), ["x:1"], ["r.yaml"]).splitlines()
    assert lines[0] == "Out of memory: CUDA out of memory. Tried to allocate 3.00 GiB"
    assert lines[1] == "  seen: 79.00 GB in use, at most 79.50 GB before, of 80.00 GB (GPU)"
    assert lines[2].endswith("the longest pair has 31: x:1")
    assert lines[3] == "  planned for the longest pairs: 100.00 GB = activations 100.00"
    assert lines[5].startswith("  1. accelerate launch") and "run_dpo.py r.yaml: " in lines[5]


def test_fragments(monkeypatch):
    """A GPU of 80 GB, 60 in use, 79 reserved: 19 GB lie in pieces that were too small. The allocator's setting comes
    first, as it costs nothing, unless it is there already under either of its names."""
    [first] = allocator_advice(60, 79, None, monkeypatch)
    assert first == "  1. PYTORCH_ALLOC_CONF=expandable_segments:True before the command: fewer fragments, at no cost."
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        assert not allocator_advice(60, 79, "max_split_size_mb:128,expandable_segments:True", monkeypatch, name)
    assert "PYTORCH_ALLOC_CONF" in allocator_advice(60, 79, "max_split_size_mb:128", monkeypatch)[0]
    assert not allocator_advice(76, 79, None, monkeypatch)  # 3 GB are below a twentieth
    seen = MemorySnapshot(60 * 10**9, 80 * 10**9, 61 * 10**9, "GPU", 79 * 10**9)
    assert str(seen).endswith("of 80.00 GB (GPU); 79.00 GB reserved, of which 19.00 GB lie in fragments")
    assert "reserved" not in str(MemorySnapshot.now())


def allocator_advice(used, reserved, set_to, monkeypatch, name="PYTORCH_ALLOC_CONF") -> list[str]:
    for known in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(known, raising=False)
    if set_to is not None:
        monkeypatch.setenv(name, set_to)
    seen = MemorySnapshot(int(used * GB), 80 * 10**9, int(used * GB), "GPU", int(reserved * GB))
    text = report(torch.OutOfMemoryError("CUDA out of memory."), None, load_recipe([str(RECIPE)]), EIGHT, seen)
    return [line for line in text.splitlines() if "expandable" in line]


def test_explain_plans_or_says_why_not(tmp_path):
    recipe = recipe_for(tmp_path, Qwen3Config(**{**SIZES, "num_hidden_layers": 1}), per_device_train_batch_size=2)
    text = explain(MemoryError(), None, recipe, Sharding(cpu=True), "cpu")
    assert text.startswith("Out of memory: MemoryError\n  seen: ")
    assert "optimizer states" in text and "--per_device_train_batch_size=1" in text
    (tmp_path / "model/config.json").unlink()
    assert "not planned: " in explain(MemoryError(), None, recipe, Sharding(cpu=True), "cpu")


def test_memory_of_this_process():
    before = MemorySnapshot.now()
    ballast = torch.zeros(50_000_000)
    after = MemorySnapshot.now()
    assert after.used - before.used > 0.9 * ballast.nbytes and after.peak >= after.used
    assert after.limit <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_a_limit_of_addresses_is_seen(monkeypatch):
    """Then mapped memory counts, not the resident part of it."""
    resident = MemorySnapshot.now()
    monkeypatch.setattr(resource, "getrlimit", lambda what: (10**9, resource.RLIM_INFINITY))
    mapped = MemorySnapshot.now()
    assert mapped.limit == 10**9 and "ulimit -v" in mapped.where
    assert mapped.used > resident.used


def test_a_run_that_runs_out_ends_in_the_explanation(tmp_path):
    """With the key of the longest pair in the batch that was in hand; other errors pass as they are."""
    trainer = types.SimpleNamespace(
        batch_in_hand=PackedCollator()(ROWS),
        train_dataset=Dataset.from_dict({"key": ["pairs.jsonl:1", "pairs.jsonl:2", "pairs.jsonl:3"]}),
        model=torch.nn.Linear(1, 1).train(),
        accelerator=types.SimpleNamespace(
            state=types.SimpleNamespace(deepspeed_plugin=None),
            num_processes=1,
            mixed_precision="no",
            device=torch.device("cpu"),
        ),
    )
    recipe = recipe_for(tmp_path, Qwen3Config(**{**SIZES, "num_hidden_layers": 1}))
    with refused("memory", "pairs.jsonl:1", "What to try next"):
        with explained(recipe, lambda: trainer, []):
            raise MemoryError
    with pytest.raises(ZeroDivisionError), explained(recipe, lambda: None, []):
        raise ZeroDivisionError
