"""What is named as a model and is none: adapters and folders without weights are refused, with a way out that works."""

import json
import runpy
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from errors import refused
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from repository import ROOT
from tiny import CHATML, agent_rows, tiny_llama, tokenizer_for
from trainers import own
from transformers import AutoModelForCausalLM

from dpo_trainer import DPOTrainer
from mdpo.config.model_folders import refuse_adapter, refuse_frozen, refuse_unloadable
from mdpo.config.schema import MDPOConfig
from mdpo.reference.loading import load_model
from mdpo.reference.model import build_reference

TOKENIZER = tokenizer_for(CHATML, "byte", eos="<|im_end|>")
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
merge = runpy.run_path(str(ROOT / "scripts" / "merge_adapter.py"))["main"]
POLICY, REFERENCE = "model_name_or_path", "ref_model_name_or_path"


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A model's folder, `base`, in the working directory."""
    monkeypatch.chdir(tmp_path)
    tiny_llama(TOKENIZER, seed=0).save_pretrained("base")
    TOKENIZER.save_pretrained("base")
    return "base"


def adapter(folder: str, base: str, config=None):
    """A random adapter on `base`, saved in `folder`; the model with it."""
    torch.manual_seed(1)
    config = config or LoraConfig(**LORA, init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    model.save_pretrained(folder)
    return model.eval()


def arguments(name, reference=None, **kwargs):
    model = SimpleNamespace(model_name_or_path=name, model_revision=None)
    return model, SimpleNamespace(ref_model_name_or_path=reference, model_init_kwargs=kwargs or None)


@pytest.mark.parametrize(
    ("config", "folder"),
    [({}, "sft"), ({"use_dora": True}, "runs/sft/checkpoint-3"), ({"modules_to_save": ["lm_head"]}, "with a space")],
    ids=["LoRA", "DoRA, a checkpoint", "head, a space"],
)
def test_the_command_in_the_message_makes_the_model(config, folder, base):
    adapted = adapter(folder, base, LoraConfig(**LORA, init_lora_weights=False, **config))
    with refused(POLICY, f"{folder} is an adapter (LORA)") as error:
        refuse_unloadable(*arguments(folder))
    command = next(line for line in str(error.value).splitlines() if line.startswith("    python "))
    words = shlex.split(command)
    assert words[:2] == ["python", "scripts/merge_adapter.py"] and (ROOT / words[1]).is_file()
    merge(words[2:])
    assert f"set model_name_or_path: {words[3]}" in str(error.value)
    refuse_unloadable(*arguments(words[3], reference=words[3]))
    ids = torch.arange(5, 50)[None]
    with torch.no_grad():
        wanted, found = adapted(ids).logits, load_model(words[3], dtype="float32").eval()(ids).logits
        bare = load_model(base, dtype="float32").eval()(ids).logits
    assert (found - wanted).norm() < 1e-5 * wanted.norm() < 1e-3 * (bare - wanted).norm()


def edited(folder, **settings) -> None:
    path = Path(folder, "adapter_config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def test_where_the_base_is_not_there_the_command_asks_for_it(base):
    adapter("sft", base)
    for gone in (None, "", 3, "../gone", "/gone/base", "~/base", "runs/gone/base"):
        edited("sft", base_model_name_or_path=gone)
        with refused(POLICY, "--base=BASE_MODEL", "in place of BASE_MODEL"):
            refuse_unloadable(*arguments("sft"))
    for there in (base, "org/base", "gpt2"):  # of names on the hub nothing is known here
        edited("sft", base_model_name_or_path=there)
        with refused(POLICY, "sft is an adapter") as error:
            refuse_unloadable(*arguments("sft"))
        assert "BASE_MODEL" not in str(error.value)


def test_an_adapter_on_an_adapter(base):
    adapter("sft", base)
    merge(["sft", "merged"])
    adapter("dpo", "merged")
    edited("dpo", base_model_name_or_path="sft")
    with refused(POLICY, "dpo is an adapter", "sft, is an adapter"):
        refuse_unloadable(*arguments("dpo"))
    with refused("base", "--base: sft is an adapter"):
        merge(["dpo", "out"])


def test_adapters_that_cannot_be_merged_and_damaged_ones(base):
    for n, kind in enumerate((PromptTuningConfig, PrefixTuningConfig)):
        adapter(f"prompts-{n}", base, kind(task_type="CAUSAL_LM", num_virtual_tokens=3))
        with refused(POLICY, f"prompts-{n} is an adapter", "cannot be merged"):
            refuse_unloadable(*arguments(f"prompts-{n}"))
    adapter("sft", base)
    for text in ("{", "[1]", "1", '{"peft_type": "OF_TOMORROW"}'):
        (Path("sft") / "adapter_config.json").write_text(text)
        with refused(POLICY, ": sft"):
            refuse_unloadable(*arguments("sft"))


def test_a_home_folder_and_names_that_no_hub_has(base, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    adapter("sft", base)
    with refused(POLICY, f"{tmp_path}/sft is an adapter"):
        refuse_unloadable(*arguments("~/sft"))
    refuse_unloadable(*arguments("~/base"))
    with refused(POLICY, "'a b/c'"):
        refuse_unloadable(*arguments("a b/c"))


def test_both_keys_subfolders_and_a_model_beside(base):
    adapter("repository/sft", base)
    with refused(POLICY, "repository"):
        refuse_unloadable(*arguments("repository", subfolder="sft"))
    with refused(REFERENCE, "repository/sft is an adapter"):
        refuse_unloadable(*arguments(base, reference="repository/sft"))
    tiny_llama(TOKENIZER).save_pretrained("repository/sft")
    with refused(POLICY, "repository/sft contains both", "adapter_config.json"):
        refuse_unloadable(*arguments("repository/sft"))
    refuse_unloadable(*arguments(base, reference=base))


def test_an_adapter_of_the_hub_s_cache(base, tmp_path, monkeypatch):
    commit = "a" * 40
    snapshot = tmp_path / "hub/models--org--sft/snapshots" / commit
    adapter(str(snapshot), base)
    (tmp_path / "hub/models--org--sft/refs").mkdir()
    (tmp_path / "hub/models--org--sft/refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with refused(POLICY, "org/sft is an adapter") as error:
        refuse_unloadable(*arguments("org/sft"))
    download, command = [line.strip() for line in str(error.value).splitlines() if line.startswith("    ")]
    assert download == "hf download org/sft --local-dir sft"
    assert command == "python scripts/merge_adapter.py sft sft-merged"


def test_folders_without_weights(base):
    adapter("sft", base)
    (Path("sft") / "adapter_config.json").unlink()
    with refused(POLICY, ": sft ", "no adapter_config.json"):
        refuse_unloadable(*arguments("sft"))
    tiny_llama(TOKENIZER).save_pretrained("run/checkpoint-7")
    TOKENIZER.save_pretrained("run")
    with refused(REFERENCE, ": run holds no weights (model.safetensors)", "checkpoint-7 in it does"):
        refuse_unloadable(*arguments(base, reference="run"))
    tiny_llama(TOKENIZER).save_pretrained("run/checkpoint-12")
    with refused(POLICY, "checkpoint-12 in it does"):  # the newest, not the last by its letters
        refuse_unloadable(*arguments("run"))
    for step in (7, 12):
        adapter(f"lora/checkpoint-{step}", base)
    with refused(POLICY, ": lora holds no weights", "checkpoint-12 in it is"):
        refuse_unloadable(*arguments("lora"))
    Path("empty").mkdir()
    with refused(POLICY, ": empty holds no weights", "nothing"):
        refuse_unloadable(*arguments("empty"))
    refuse_unloadable(*arguments("empty", gguf_file="model.gguf"))  # transformers looks for that file itself


@pytest.mark.parametrize("use", ["model", "reference"])
def test_the_trainer_refuses_an_adapter_by_name_too(use, base, tmp_path):
    adapter("sft", base)
    options = {"ref_model_name_or_path": "sft"} if use == "reference" else {}
    policy = tiny_llama(TOKENIZER) if use == "reference" else "sft"
    with refused("model", "sft is an adapter"):
        own(tmp_path, TOKENIZER, policy, **options)
    with refused("model", "sft is an adapter"):
        refuse_adapter("sft")


def test_objects_that_cannot_be_trained(base, tmp_path):
    adapter("sft", base)
    inside = AutoModelForCausalLM.from_pretrained("sft", dtype=torch.float32)
    with refused("model", "transformers", "is_trainable=True"):
        own(tmp_path, TOKENIZER, inside)
    with refused("ref_model", "transformers", "is_trainable=True"):
        own(tmp_path, TOKENIZER, tiny_llama(TOKENIZER), inside)
    compiled = tiny_llama(TOKENIZER)
    compiled.compile()
    for model in (compiled, torch.compile(tiny_llama(TOKENIZER))):
        with refused("model", "torch.compile", "fused_ops"):
            own(tmp_path, TOKENIZER, model)
    frozen = PeftModel.from_pretrained(tiny_llama(TOKENIZER), "sft")
    with refused("model", "requires_grad", "is_trainable=True"):
        own(tmp_path, TOKENIZER, frozen).train()
    refuse_frozen(PeftModel.from_pretrained(tiny_llama(TOKENIZER), "sft", is_trainable=True))


def test_a_reference_of_a_smaller_vocabulary(tmp_path):
    fewer = tokenizer_for(CHATML, "letters", eos="<|im_end|>")
    assert len(fewer) < len(TOKENIZER)
    with refused("reference", f"{len(TOKENIZER)} tokens", f"embedding for {len(fewer)}."):
        own(tmp_path, TOKENIZER, tiny_llama(TOKENIZER), tiny_llama(fewer))


def first_step(model, folder, peft_config=None, **options):
    args = MDPOConfig(
        str(folder), per_device_train_batch_size=4, max_steps=1, report_to="none", use_cpu=True, bf16=False,
        max_length=300, disable_tqdm=True, save_strategy="no", logging_steps=1, **options,
    )  # fmt: skip
    data = Dataset.from_list(agent_rows(8))
    trainer = DPOTrainer(model, args=args, train_dataset=data, processing_class=TOKENIZER, peft_config=peft_config)
    trainer.train()
    return trainer.state.log_history[0]


def test_policy_and_reference_of_a_merged_object_begin_as_it_is(base, tmp_path):
    """PEFT's merge leaves the base's path in the configuration: a reference loaded from there would be the bare base,
    and the first loss not ln 2."""
    merged = adapter("sft", base).merge_and_unload()
    assert merged.config._name_or_path == base
    with refused("model", "model.requires_grad_(True)"):
        first_step(merged, tmp_path / "frozen")
    merged.requires_grad_(True)
    first = first_step(merged, tmp_path / "out")
    ahead = first_step(
        PeftModel.from_pretrained(load_model(base, dtype="float32"), "sft").merge_and_unload().requires_grad_(True),
        tmp_path / "ahead",
        precompute_ref_log_probs=True,
        reference_cache_dir=str(tmp_path / "cache"),
    )
    own_adapter = PeftModel.from_pretrained(load_model(base, dtype="float32"), "sft", is_trainable=True)
    continued = first_step(own_adapter, tmp_path / "continued")
    bare = first_step(load_model(base, dtype="float32"), tmp_path / "bare")
    for log in (first, ahead, continued, bare):
        assert log["loss"] == pytest.approx(0.6931472, abs=1e-6)
    for log in (ahead, continued):
        assert log["logps/chosen"] == pytest.approx(first["logps/chosen"], rel=1e-5)
    assert abs(bare["logps/chosen"] - first["logps/chosen"]) > 1


@pytest.mark.parametrize("prompts", [False, True])
def test_a_copied_reference_of_a_new_adapter_is_the_model_beneath(prompts, base, tmp_path):
    """As under DeepSpeed, where log-probs that are precomputed need a model of their own."""
    merged = adapter("sft", base).merge_and_unload().requires_grad_(True)
    ids = torch.arange(5, 50)[None]
    with torch.no_grad():
        wanted = merged(ids).logits
        kind = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3) if prompts else None
        policy = get_peft_model(merged, kind or LoraConfig(**LORA, init_lora_weights=False))
        assert policy.config._name_or_path == base
        reference = build_reference(policy, None, {}, made_by_caller=True)
        assert torch.equal(reference(input_ids=ids).logits, wanted)
        assert not torch.equal(policy(input_ids=ids).logits[:, -45:], wanted)
        from_path = build_reference(policy, None, {})
        assert not torch.equal(from_path(input_ids=ids).logits, wanted)


@pytest.mark.parametrize("trainable", [False, True])
def test_a_reference_with_an_adapter_is_kept_under_what_it_computes(trainable, base, tmp_path):
    """Precomputed log-probs of two adapters on one base are two references', frozen or not."""
    adapter("one", base)
    adapter("two", base, LoraConfig(**{**LORA, "lora_alpha": 32}, init_lora_weights=False))  # but for its scaling, one
    losses = {}
    for name in ("one", "two"):
        for ahead in (True, False):
            reference = PeftModel.from_pretrained(load_model(base, dtype="float32"), name, is_trainable=trainable)
            options = {"reference_cache_dir": str(tmp_path / "cache")} if ahead else {}
            trainer = own(
                tmp_path,
                TOKENIZER,
                load_model(base, dtype="float32"),
                reference,
                precompute_ref_log_probs=ahead,
                **options,
            )
            batch = next(iter(trainer.get_eval_dataloader(trainer.train_dataset)))
            losses[name, ahead] = trainer.compute_loss(trainer.model.eval(), batch).item()
    for name in ("one", "two"):
        assert losses[name, True] == pytest.approx(losses[name, False], rel=1e-5)
    assert losses["one", True] != pytest.approx(losses["two", True], rel=1e-2)
