"""scripts/merge_adapter.py on adapters of our own trainer: the merged model is the adapter's, not the base."""

import json
import runpy
import shutil

import pytest
import torch
from datasets import Dataset
from errors import refused
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from repository import ROOT
from safetensors.torch import load_file, save_file
from tiny import CHATML, agent_rows, tiny_llama, tokenizer_for
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_trainer import DPOTrainer
from mdpo.config.loop import Loop
from mdpo.config.schema import MDPOConfig
from mdpo.rollouts.iterations import Iterations

SCRIPT = runpy.run_path(str(ROOT / "scripts" / "merge_adapter.py"))
merge = SCRIPT["main"]
# Whether the base's embeddings are tied, and what is trained. r * 2 of alpha: a real scaling.
COMMON = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}
ADAPTERS = {
    "LoRA": (False, {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "DoRA": (False, {"target_modules": ["q_proj", "v_proj"], "use_dora": True}),
    "rank-stabilized": (False, {"target_modules": "all-linear", "use_rslora": True}),
    "head saved whole": (False, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "tied": (True, {"target_modules": ["q_proj", "v_proj"]}),
    "tied, head saved whole": (True, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "tied, LoRA on the embedding": (True, {"target_modules": ["q_proj", "embed_tokens"]}),
}


def tokenizer():
    return tokenizer_for(CHATML, "byte", eos="<|im_end|>")


def save_base(folder, tied=False, **config):
    model = tiny_llama(tokenizer(), seed=0, tie_word_embeddings=tied, **config)
    model.generation_config.top_k = 7
    model.generation_config.do_sample = True
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def train(folder, base, lora):
    """Two steps of our trainer; the adapter that it saves."""
    args = MDPOConfig(
        str(folder / "run"), per_device_train_batch_size=4, max_steps=2, report_to="none", use_cpu=True, bf16=False,
        max_length=300, disable_tqdm=True, learning_rate=2e-2, save_strategy="no",
    )  # fmt: skip
    data = Dataset.from_list(agent_rows(8))
    trainer = DPOTrainer(base, None, args, train_dataset=data, processing_class=tokenizer(), peft_config=lora)
    trainer.train()
    trainer.save_model()
    return folder / "run"


def log_probs(model):
    """In float64, where all that is left is the rounding of merged weights."""
    ids = torch.tensor([tokenizer()("What is 3 * 4? The answer is \\boxed{12}.")["input_ids"]])
    with torch.no_grad():
        return model.double().eval()(input_ids=ids).logits.log_softmax(-1)


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_merged_model_is_the_trained_one(name, tmp_path):
    tied, options = ADAPTERS[name]
    base = save_base(tmp_path / "base", tied)
    adapter = train(tmp_path, base, LoraConfig(**COMMON, **options))
    merge([str(adapter), str(tmp_path / "out")])
    wanted = log_probs(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)))
    untrained = log_probs(AutoModelForCausalLM.from_pretrained(base))
    found = log_probs(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert (found - wanted).abs().max() <= 1e-5
    assert (found - untrained).abs().max() > 1e-2  # the wrong twin: a merge that does nothing


def test_lora_on_a_tied_head_from_elsewhere(tmp_path):
    """Our trainer refuses to train it. PEFT alone would put the change into both ends of the one matrix."""
    base = save_base(tmp_path / "base", tied=True)
    lora = LoraConfig(**COMMON, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    model.save_pretrained(tmp_path / "adapter")
    merge([str(tmp_path / "adapter"), str(tmp_path / "out")])
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (log_probs(found) - log_probs(model)).abs().max() <= 1e-4  # a change of random, large weights
    assert not torch.equal(found.lm_head.weight, found.model.embed_tokens.weight)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(base, adapter): plain LoRA on an untied base."""
    folder = tmp_path_factory.mktemp("merge")
    base = save_base(folder / "base")
    return base, train(folder, base, LoraConfig(**COMMON, target_modules=["q_proj", "v_proj"]))


def copy_of(adapter, folder, **changes):
    """The adapter elsewhere, with other entries in its configuration."""
    shutil.copytree(adapter, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    return folder


def nothing_written(tmp_path, arguments, key, *details):
    """Refused, and nothing is left: no folder, no draft."""
    out = tmp_path / "made" / "out"
    out.parent.mkdir(exist_ok=True)
    with refused(key, *details):
        merge([str(word) for word in (arguments[0], out, *arguments[1:])])
    assert list(out.parent.iterdir()) == []


def test_all_that_a_model_needs_is_written(trained, tmp_path, capsys):
    base, adapter = trained
    out = tmp_path / "out"
    out.mkdir()  # empty: taken
    merge([str(adapter), str(out)])
    files = {path.name for path in out.iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"} <= files
    assert not any("adapter" in file for file in files) and list(tmp_path.iterdir()) == [out]
    assert AutoTokenizer.from_pretrained(out).chat_template == CHATML
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1  # safetensors as all else
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.generation_config.top_k == 7 and model.dtype == torch.float32
    assert set(load_file(out / "model.safetensors")) == set(load_file(f"{base}/model.safetensors"))
    assert "merged and adapter differ by" in capsys.readouterr().out


def test_dtype_of_the_weights(trained, tmp_path, capsys):
    _, adapter = trained
    merge([str(adapter), str(tmp_path / "half"), "--dtype=bfloat16"])
    kinds = {weight.dtype for weight in load_file(tmp_path / "half" / "model.safetensors").values()}
    assert kinds == {torch.bfloat16} and "half (bfloat16)" in capsys.readouterr().out


def test_half_precision_that_swallows_the_change_is_refused(trained, tmp_path, capsys):
    """bfloat16 keeps 8 bits of a weight: a thousandth of the trained change is below that, float32 holds it. A loop
    keeps it, with a warning: it trains, samples and judges what was written."""
    _, adapter = trained
    small = copy_of(adapter, tmp_path / "small")
    weights = load_file(small / "adapter_model.safetensors")
    save_file({n: w * (1e-3 if "lora_B" in n else 1) for n, w in weights.items()}, small / "adapter_model.safetensors")
    nothing_written(tmp_path, [small, "--dtype=bfloat16"], "dtype", " bfloat16,", "--dtype=float32")
    merge([str(small), str(tmp_path / "whole")])
    assert "warning" not in capsys.readouterr().out
    command = Iterations(Loop("r", "o", "t", "h"), "p", adapters=True).merged(1).command
    options = command[command.index("o/iteration-1/merge/model") + 1 :]
    merge([str(small), str(tmp_path / "kept"), *options])
    assert "warning" not in capsys.readouterr().out and (tmp_path / "kept").is_dir()
    merge([str(small), str(tmp_path / "rounded"), "--dtype=bfloat16", *options])
    assert "warning" in capsys.readouterr().out
    half = load_file(tmp_path / "rounded/model.safetensors")
    assert {weight.dtype for weight in half.values()} == {torch.bfloat16}


def test_a_merge_that_goes_wrong_leaves_nothing(trained, tmp_path, monkeypatch):
    """The check itself: weights that are a little off, and a merge that forgets the adapter."""
    _, adapter = trained
    names = merge.__globals__
    right = names["merged"]

    def off(model):
        out = right(model)
        out.lm_head.weight.data[5] *= 1.5
        return out

    for wrong in (off, lambda model: model.unload()):
        monkeypatch.setitem(names, "merged", wrong)
        nothing_written(tmp_path, [adapter], "merged model", "log-probs")


def test_what_is_no_adapter_or_does_not_fit_is_refused(trained, tmp_path):
    base, adapter = trained
    nothing_written(tmp_path, [base], "adapter", base, "no adapter_config.json")
    empty = copy_of(adapter, tmp_path / "empty")
    (empty / "adapter_model.safetensors").unlink()
    nothing_written(tmp_path, [empty], "adapter", empty, "no adapter_model.safetensors")
    lost = copy_of(adapter, tmp_path / "lost", base_model_name_or_path="./gone")
    nothing_written(tmp_path, [lost], "base", "--base: ", "no folder ./gone")
    without = copy_of(adapter, tmp_path / "none", base_model_name_or_path=None)
    nothing_written(tmp_path, [without], "base", without, "--base.")
    (tmp_path / "hollow").mkdir()
    nothing_written(tmp_path, [adapter, f"--base={tmp_path}/hollow"], "base", "--base: ", "hollow holds no weights")
    wide = save_base(tmp_path / "wide", hidden_size=64)
    nothing_written(tmp_path, [adapter, f"--base={wide}"], "adapter", wide, "size mismatch")
    fewer = tiny_llama(tokenizer(), layers=1)
    fewer.save_pretrained(tmp_path / "fewer")
    nothing_written(tmp_path, [adapter, f"--base={tmp_path}/fewer"], "adapter", "fewer", "no counterpart")
    moved = copy_of(adapter, tmp_path / "moved", base_model_name_or_path="./gone")
    merge([str(moved), str(tmp_path / "out"), f"--base={base}"])


def test_an_out_folder_in_use_is_refused(trained, tmp_path):
    _, adapter = trained
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("mine")
    with refused("out", tmp_path / "used"):
        merge([str(adapter), str(tmp_path / "used")])
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["thesis.txt"]


def test_other_adapters_are_merged_where_peft_can(tmp_path):
    base = save_base(tmp_path / "base")
    kinds = {
        "ia3": IA3Config(
            task_type="CAUSAL_LM",
            target_modules=["down_proj"],
            feedforward_modules=["down_proj"],
            init_ia3_weights=False,
        ),
        "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }
    for name, config in kinds.items():
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / name)
    merge([str(tmp_path / "ia3"), str(tmp_path / "out")])
    nothing_written(tmp_path, [tmp_path / "prompt"], "adapter", "PROMPT_TUNING")


def test_a_quantized_base_is_said_or_refused(trained, tmp_path, capsys):
    """The recipe beside the adapter tells of a run in 4 bits; nothing can be merged into a base saved in 4 bits."""
    base, adapter = trained
    held = copy_of(adapter, tmp_path / "run")
    (held / "recipe_resolved.yaml").write_text("load_in_4bit: true\n")
    merge([str(held), str(tmp_path / "out")])
    line = f"had {base} in 4 bits. The adapter is merged into its unquantized weights, in float32"
    assert line in capsys.readouterr().out
    saved = tmp_path / "saved in 4 bits"
    shutil.copytree(base, saved)
    config = json.loads((saved / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (saved / "config.json").write_text(json.dumps(config))
    nothing_written(tmp_path, [adapter, f"--base={saved}"], "base", saved, "--base.")
