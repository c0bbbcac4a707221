"""Planned bytes of a checkpoint against the files of a real one."""

import json

import pytest
import yaml
from launches import launch
from plans import BF16, TINY, recipe_for
from repository import ROOT
from tiny import CHATML, agent_rows, tiny_llama, tokenizer_for

from mdpo.config.recipe import load_recipe
from mdpo.memory.breakdown import GB
from mdpo.memory.estimate import plan_memory
from mdpo.memory.sharding import Sharding

FULL, LORA = {"dtype": "bfloat16"}, {"dtype": "bfloat16", "use_peft": True, "lora_r": 128, "lora_dropout": 0.0}
LORA["lora_target_modules"] = "all-linear"
SINGLE = {"dtype": "float32", "bf16": False}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """Pairs, and a model of 3 million weights: little beside which the files of a few kB would count."""
    folder = tmp_path_factory.mktemp("workshop")
    tokenizer = tokenizer_for(CHATML, "byte", eos="<|im_end|>")
    tiny_llama(tokenizer, layers=3, hidden_size=256, intermediate_size=1024).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in agent_rows(4)))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "keys", "sharding"),
    [
        ("zero2_cpu", FULL, Sharding(2, 2, precision="bf16")),
        ("zero3_cpu", FULL, Sharding(3, 2, precision="bf16")),
        ("zero2_cpu", LORA, Sharding(2, 2, precision="bf16")),
        ("cpu", SINGLE, Sharding()),
    ],
    ids=["zero2", "zero3", "zero2-lora", "one-process"],
)
def test_files_of_a_real_run(name, keys, sharding, workshop, extensions, tmp_path):
    """Within 2 %, and another sharding's size would not be."""
    raw = yaml.safe_load((ROOT / f"training_configs/{name}.yaml").read_text())
    config = tmp_path / "accelerate.yaml"
    config.write_text(yaml.safe_dump({**raw, "mixed_precision": sharding.precision}))
    values = {"model_name_or_path": f"{workshop}/model", "dataset_mixer": {f"{workshop}/pairs.jsonl": 1.0}, **keys}
    values |= {"max_length": 300, "per_device_train_batch_size": 1, "max_steps": 1, "save_steps": 1}
    values |= {"report_to": "none", "shared_prefix": False, "fused_ops": False, "save_total_limit": 2}
    (workshop / "recipe.yaml").write_text(yaml.safe_dump(values))
    code, text = launch(config, workshop, extensions, tmp_path / "out", env={"MDPO_CPU_BF16": "1"})
    assert code == 0, text[-4000:]
    files = [path for path in (tmp_path / "out/checkpoint-1").rglob("*") if path.is_file()]
    real = sum(path.stat().st_size for path in files)
    recipe = load_recipe([str(workshop / "recipe.yaml")])
    assert plan_memory(recipe, sharding).checkpoint == pytest.approx(real, rel=0.02)
    if keys is not SINGLE:
        other = plan_memory(recipe, Sharding(5 - sharding.stage, 2, precision="bf16")).checkpoint
        assert other != pytest.approx(real, rel=0.02)


def test_bytes_a_weight(tmp_path):
    """16-bit weights for users, under ZeRO-2 once more in DeepSpeed's file, 4 of float32 weights and 8 of moments.
    Without DeepSpeed float32 weights and moments. save_only_model leaves the weights; a reference that moves is
    saved too."""
    zero2, zero3, one = Sharding(2, 8, precision="bf16"), Sharding(3, 8, precision="bf16"), Sharding()
    mixed = {**BF16, "dtype": "float32"}

    def planned(sharding, **keys):
        return plan_memory(recipe_for(tmp_path, TINY, **keys), sharding)

    weights = planned(zero2, **BF16).parts["weights"] / 2
    assert planned(zero2, **BF16).checkpoint == 16 * weights
    assert planned(zero3, **BF16).checkpoint == 14 * weights
    assert planned(one, **mixed).checkpoint == 12 * weights
    assert planned(zero2, **BF16, save_only_model=True).checkpoint == 2 * weights
    moving = {"precompute_ref_log_probs": False, "sync_ref_model": True}
    assert planned(zero2, **{**BF16, **moving}).checkpoint == 18 * weights


def test_in_words(tmp_path):
    plan = plan_memory(recipe_for(tmp_path, TINY, **BF16, save_total_limit=2), Sharding(2, 8, precision="bf16"))
    plan.checkpoint = 100 * GB
    assert plan.on_disk() == (
        "A checkpoint: 100.0 GB on disk, 100.0 s at 1 GB/s, 20.0 s at 5 GB/s; with save_total_limit 2 at most "
        "300.0 GB at once."
    )
    plan.kept = None
    assert plan.on_disk().endswith("20.0 s at 5 GB/s.")
