"""A mixture of experts from the recipes of qwen3-30b-a3b, in small: ZeRO-3 with two CPU processes against one process,
experts saved, loaded and merged."""

import json
import runpy

import pytest
import torch
from launches import launch_several, losses, on_two_cpus
from peft import PeftModel
from repository import ROOT
from safetensors.torch import load_file
from tiny import agent_rows
from transformers import AutoModelForCausalLM
from twins import small_twin

FAMILY = "qwen3-30b-a3b"
NAMES = ("full", "lora")
# Adam divides by the gradients' size, and at some experts they are rounding errors: a larger epsilon keeps those small.
FLAGS = "--dtype=float32 --bf16=false --report_to=none --warmup_steps=0 --learning_rate=1e-3 --adam_epsilon=1e-4"


@pytest.fixture(scope="module")
def trained(extensions, tmp_path_factory):
    """Folders of the policy at the start, and of what ZeRO-3 and one process made of it: two steps of four pairs."""
    folder = tmp_path_factory.mktemp("experts")
    base = small_twin(FAMILY, folder / "base", 0)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in agent_rows(10)))
    flags = [f"--dataset_mixer={{{folder}/pairs.jsonl: 1.0}}", "--test_split_size=2", f"--model_name_or_path={base}"]
    found = [base]
    for processes, accelerate in ((2, on_two_cpus("zero3_two_nodes", folder, num_machines=1)), (1, "cpu")):
        out = folder / str(processes)
        out.mkdir()
        flags_here = [*flags, *FLAGS.split(), f"--per_device_train_batch_size={4 // processes}"]
        own = {"full": ["--router_aux_loss_coef=0", f"--reference_cache_dir={out}/cache"], "lora": []}
        runs = {n: [str(ROOT / f"recipes/{FAMILY}/dpo/config_{n}.yaml"), *flags_here, *own[n]] for n in NAMES}
        code, text = launch_several(accelerate, runs, folder, extensions, out)
        assert code == 0, text[-4000:]
        found.append(out)
    return found


def weights(folder, name):
    return load_file(folder / name / ("adapter_model.safetensors" if name == "lora" else "model.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_zero3_equals_one_process(name, trained):
    base, two, one = trained
    found, wanted = weights(two, name), weights(one, name)
    assert found.keys() == wanted.keys()
    if name == "full":
        start = load_file(base / "model.safetensors")
        assert found.keys() == start.keys() and any(".experts.7.up_proj.weight" in key for key in found)
    else:  # the experts' two stacked matrices, of all of them
        start = {key: torch.zeros_like(w) if "lora_B" in key else w for key, w in wanted.items()}
        assert sum(".mlp.experts." in key for key in found) == 2 * 2 * 2
    for key, w in wanted.items():
        if "lora_A" not in key:
            assert (found[key] - w).norm() <= 1e-3 * (w - start[key]).norm(), key
    for a, b in zip(losses(two / name), losses(one / name), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    assert losses(one / name)[0]["loss"] == pytest.approx(0.693147, abs=1e-5) != losses(one / name)[1]["loss"]


@pytest.mark.slow
def test_the_merged_experts_are_the_trained_ones(trained, tmp_path):
    base, two, _ = trained
    runpy.run_path(str(ROOT / "scripts/merge_adapter.py"))["main"]([str(two / "lora"), str(tmp_path / "merged")])
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(two / "lora"))
    merged, plain = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "merged", base))
    ids = torch.arange(40)[None]
    with torch.no_grad():
        found, wanted, before = (model.eval()(ids).logits for model in (merged, adapted, plain))
    assert (found - wanted).abs().max() <= 1e-3 < 1e-2 < (before - wanted).abs().max()
    assert load_file(tmp_path / "merged/model.safetensors").keys() == load_file(base / "model.safetensors").keys()
