"""ZeRO++'s secondary partition under real ZeRO-3: four CPU processes in two groups, against one process. Each group
gathers the weights from further shares that the first gather of a step leaves in it, and that are stale once the
optimizer has stepped, a checkpoint is loaded or the reference has moved."""

import json
import math
import re

import pytest
import torch
from launches import compare, launch_several, losses, plus_on_cpus
from safetensors.torch import load_file

from mdpo.config.recipe import load_recipe
from mdpo.memory.breakdown import STEP
from mdpo.memory.estimate import plan_memory
from mdpo.memory.sharding import Sharding

LN2 = torch.tensor(math.log(2)).item()  # as a float32
HALF = ["--bf16=true", "--dtype=bfloat16", "--learning_rate=0.0"]
LORA = ["--use_peft", "--lora_r=4", "--lora_target_modules=all-linear", "--lora_dropout=0.0"]
MOVE = ["--sync_ref_model", "--ref_model_sync_steps=1", "--ref_model_mixup_alpha=0.3"]
SAVE = ["--save_strategy=steps", "--save_steps=2"]


@pytest.fixture(scope="module")
def plus(workshop, extensions, tmp_path_factory):
    """(folder, what was printed) of runs in four processes."""
    folder = tmp_path_factory.mktemp("plus")
    held_out = [f"--eval_dataset_mixer={{{workshop}/pairs.jsonl: 1.0}}", "--eval_on_start", "--show_answers=1"]
    held_out += ["--eval_strategy=steps", "--eval_steps=2"]
    nothing = [*HALF, f"--ref_model_name_or_path={workshop}/model", "--gradient_accumulation_steps=2"]
    runs = {
        "run": [*held_out, *SAVE],
        "resumed": [f"--resume_from_checkpoint={folder}/run/checkpoint-2"],
        "moving": [*MOVE, *SAVE],
        "moving-resumed": [*MOVE, f"--resume_from_checkpoint={folder}/moving/checkpoint-2"],
        "nothing": nothing,
        "nothing-ahead": [*nothing, "--precompute_ref_log_probs=true", f"--reference_cache_dir={folder}/cache"],
        "nothing-lora": ["lora.yaml", *HALF, *LORA, "--max_steps=2"],
        "wrong": [],
    }
    (workshop / "lora.yaml").write_text(
        (workshop / "recipe.yaml").read_text().replace("ref_model_name_or_path", "# ref_model_name_or_path")
    )
    one = "--per_device_train_batch_size=1"
    given = {
        name: [*flags, one] if flags and flags[0].endswith(".yaml") else ["recipe.yaml", *flags, one]
        for name, flags in runs.items()
    }
    more = {"worker": "plus_worker", "env": {"MDPO_CPU_BF16": "1"}}
    code, text = launch_several(plus_on_cpus(folder), given, workshop, extensions, folder, **more)
    assert code == 0, text[-4000:]
    return folder, text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run", "resumed"])
def test_groups_of_two_equal_one_process(name, plus, one_process, workshop):
    """With evaluation and greedy answers between the steps; and after a checkpoint is loaded."""
    compare(plus[0] / name, one_process, workshop, tokens=name != "resumed")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nothing", "nothing-ahead", "nothing-lora"])
def test_nothing_learned_is_ln_2_in_bfloat16(name, plus):
    """The DeepSpeed file leaves the precision to the recipe: these runs are of the same launch."""
    steps = losses(plus[0] / name)
    assert [step["loss"] for step in steps] == [LN2] * 2
    assert all(step["rewards/margins"] == 0 for step in steps)
    assert plus[1].count("dtypes: policy bfloat16, reference bfloat16, gradients bfloat16, master weights float32") == 3


@pytest.mark.slow
def test_shares_that_outlive_a_step_would_be_seen(plus, one_process, workshop):
    """Gradients are then those of the weights before training."""
    with pytest.raises(AssertionError):
        compare(plus[0] / "wrong", one_process, workshop)
    first, wanted = (losses(out)[0]["loss"] for out in (plus[0] / "wrong", one_process))
    assert first == pytest.approx(wanted, abs=1e-5)


@pytest.mark.slow
def test_a_moving_reference(plus, workshop, extensions, tmp_path):
    """Whose further shares are written anew at each step, and when it is loaded from a checkpoint."""
    flags = ["recipe.yaml", "--per_device_train_batch_size=4", *MOVE, *SAVE]
    code, text = launch_several("cpu", {"moving": flags}, workshop, extensions, tmp_path)
    assert code == 0, text[-4000:]
    compare(plus[0] / "moving", tmp_path / "moving", workshop)
    compare(plus[0] / "moving-resumed", tmp_path / "moving", workshop, tokens=False)
    base = load_file(workshop / "reference" / "model.safetensors")
    moved, wanted = (
        load_file(out / "moving" / "checkpoint-4" / "reference" / "model.safetensors") for out in (plus[0], tmp_path)
    )
    for name, weight in wanted.items():
        assert (moved[name] - weight).norm() <= 1e-3 * (weight - base[name]).norm(), name


@pytest.mark.slow
def test_the_plan_is_what_deepspeed_holds(plus, workshop):
    """In float32: a fourth of policy and reference on each process, and half of both once more; of a reference that is
    freed before training, neither. Shares are padded to a multiple of the ranks."""
    folder, text = plus
    shares = [[int(n) for n in line.split()[1:]] for line in re.findall(r"^shares: .*$", text, re.MULTILINE)]
    recipe = load_recipe([str(workshop / "recipe.yaml"), f"--output_dir={folder}/none"])
    parts = plan_memory(recipe, Sharding.read(folder / "plus.yaml")).phases[STEP]
    weights = sum(w.numel() for w in load_file(workshop / "model" / "model.safetensors").values())
    assert parts["weights"] == parts["reference"] == weights * 4 / 4
    assert parts["secondary weights"] == 2 * weights * 4 / 2
    own, again, reference, reference_again = shares[0]
    assert (own, reference) == pytest.approx((parts["weights"], parts["reference"]), rel=1e-3)
    assert again + reference_again == pytest.approx(parts["secondary weights"], rel=1e-3)
    assert [len(run) for run in shares] == [4, 4, 4, 4, 4, 2, 2, 4]
    own, again = shares[5]  # bfloat16
    assert (own, again) == pytest.approx((weights * 2 / 4, weights * 2 / 2), rel=1e-3)
    assert "ZeRO++: from a step's first forward pass" in text
    assert json.loads((folder / "run" / "run_report.json").read_text())["after"]["eval_pairs"] == 16
