"""Memory under DeepSpeed against DeepSpeed's own estimates, what cannot be planned, and scripts/plan_memory.py."""

import copy
import importlib.util
import json
import re
from dataclasses import replace

import pytest
import torch
import yaml
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from errors import refused
from plans import BF16, CONFIGS, LORA, SIZES, TINY, recipe_for
from repository import ROOT
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)
from trl import ModelConfig, get_peft_config

import mdpo.memory.estimate
from mdpo.memory.breakdown import EVALUATION, GB, LIBRARIES, OPTIMIZER, STEP
from mdpo.memory.estimate import plan_memory
from mdpo.memory.layers import alike
from mdpo.memory.sharding import Sharding
from mdpo.memory.zero import BUCKET, LIVE, ZeroSizes

# Layers as wide as a 7B model's: its weights are more than DeepSpeed's buckets hold.
WIDE = LlamaConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=5,
    num_attention_heads=32,
    num_key_value_heads=32,
    max_position_embeddings=4096,
)

ENGINE = Sharding(2, 1, precision="bf16")  # one GPU under DeepSpeed


def planned(folder, sharding: Sharding, config=WIDE, **keys):
    return plan_memory(recipe_for(folder, config, **{**BF16, **keys}), sharding)


def weights_of(config) -> tuple[int, int]:
    """(all weights, those of the largest layer), as DeepSpeed's estimators want them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = [sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules()]
    return sum(p.numel() for p in model.parameters()), max(layers)


def states(parts) -> float:
    return sum(parts.get(name, 0) for name in ("weights", "gradients", "optimizer states"))


P, LARGEST = weights_of(WIDE)


@pytest.mark.parametrize("n", [2, 8])
def test_zero2_states(tmp_path, n):
    """DeepSpeed says 2 P + 18 P/N: of a share 2 + 4 for gradients, 4 for weights, 8 for AdamW. Its code makes one more
    16-bit copy of the gradients before the float32 one, 20 P/N at that moment, and 14 P/N during backward."""
    plan = planned(tmp_path, Sharding(2, n, precision="bf16"), gradient_accumulation_steps=1)
    _, theirs = estimate_zero2_model_states_mem_needs(P, n, 1, cpu_offload=False)
    assert states(plan.phases[OPTIMIZER]) - theirs == pytest.approx(2 * P / n, abs=10)
    assert states(plan.phases[STEP]) == pytest.approx(2 * P + 14 * P / n, abs=10)
    assert plan.phases[STEP]["communication"] == 2 * 3 * BUCKET  # two buckets, and the flat copy that is sent
    alone = planned(tmp_path, Sharding(2, n, precision="bf16", overlap=False), gradient_accumulation_steps=1)
    assert alone.phases[STEP]["communication"] == 2 * 2 * BUCKET


def test_buckets_of_a_small_model(tmp_path):
    """On a GPU they take what they are made for; on a CPU what is written to, where the model fits into one."""
    p, _ = weights_of(TINY)
    for sharding, elements in (
        (Sharding(2, 2, precision="bf16"), 2 * BUCKET + p),
        (Sharding(3, 2, precision="bf16"), BUCKET + p),
        (Sharding(2, 2, cpu=True), 2 * p),
        (Sharding(3, 2, cpu=True), 2 * p),
    ):
        keys = {"dtype": "float32", "bf16": False} if sharding.cpu else {}
        size = 4 if sharding.cpu else 2
        assert planned(tmp_path, sharding, TINY, **keys).phases[STEP]["communication"] == size * elements


def test_zero2_offload(tmp_path):
    """On the GPU 2 P, as DeepSpeed says, and its buffer for the largest gradient. In CPU memory DeepSpeed says
    16 P × 1.5 (4 N P × 1.5 from 5 processes on); here what its code holds: float32 weights, gradients, two moments,
    the 16-bit copy of the weights, and such a buffer for each process."""
    plan = planned(tmp_path, Sharding(2, 4, offload_optimizer=True, precision="bf16"), gradient_accumulation_steps=1)
    cpu, gpu = estimate_zero2_model_states_mem_needs(P, 4, 1, cpu_offload=True)
    vocabulary = 2 * 32000 * 4096
    assert states(plan.phases[STEP]) == gpu + vocabulary
    assert plan.cpu == pytest.approx(18 * P + 4 * vocabulary, abs=10)
    assert 0.6 * cpu < plan.cpu < cpu


@pytest.mark.parametrize("n", [2, 8])
def test_zero3_states(tmp_path, n):
    """DeepSpeed says 18 P/N + 4 bytes for each weight of the largest layer. Its code holds 2 + 2 + 12 in backward, and
    2 + 4 more for gradients of up to 1e9 weights at the optimizer's step. Whole layers stay until 1e9 weights are
    there, so that 4 bytes a weight of one layer are too few."""
    plan = planned(tmp_path, Sharding(3, n, precision="bf16"), gradient_accumulation_steps=1)
    _, theirs, largest = estimate_zero3_model_states_mem_needs(P, LARGEST, n, 1, False, False)
    assert states(plan.phases[STEP]) == pytest.approx(16 * P / n, abs=10)
    assert states(plan.phases[OPTIMIZER]) == pytest.approx(16 * P / n + 6 * LIVE / n, abs=10)
    assert states(plan.phases[STEP]) < theirs - largest < states(plan.phases[OPTIMIZER])
    assert plan.phases[STEP]["gathered weights"] == 2 * (LIVE + LARGEST) > largest


def test_zero3_offload(tmp_path):
    """On the GPU only what is gathered; in CPU memory 2 + 2 + 16 P, where DeepSpeed says 18 P × 1.5, on each machine
    its share."""
    both = Sharding(3, 8, offload_optimizer=True, offload_param=True, precision="bf16")
    plan = planned(tmp_path, both, gradient_accumulation_steps=1)
    cpu, gpu, _ = estimate_zero3_model_states_mem_needs(P, LARGEST, 8, 1, True, True)
    assert states(plan.phases[STEP]) == 0 and plan.phases[STEP]["gathered weights"] > gpu
    assert plan.cpu == pytest.approx(20 * P, abs=10) and 0.7 * cpu < plan.cpu < cpu
    two = Sharding(3, 8, 2, offload_optimizer=True, offload_param=True, precision="bf16")
    assert planned(tmp_path, two).cpu == pytest.approx(10 * P, abs=10)
    weights = planned(tmp_path, Sharding(3, 8, offload_optimizer=True, precision="bf16")).phases[STEP]["weights"]
    assert weights == pytest.approx(2 * P / 8, abs=10)


def test_zero3_with_secondary_partition(tmp_path):
    """ZeRO++ of 16 GPUs in groups of 8: 2 P / 8 more on each, of a reference in the step as much again, and nothing
    else; offloaded weights are once more in the memory of each of two machines. More ranks to a group than there are
    are all of them."""
    keys = {"precompute_ref_log_probs": False}
    plain, plus = (planned(tmp_path, Sharding(3, 16, 2, precision="bf16", secondary=n), **keys) for n in (1, 8))
    for phase, parts in plus.phases.items():
        assert parts["secondary weights"] == pytest.approx(2 * 2 * P / 8)
        assert parts == plain.phases[phase] | {"secondary weights": parts["secondary weights"]}
    assert plain.parts.get("secondary weights") is None and plus.parts["secondary weights"] > 0
    alone = planned(tmp_path, Sharding(3, 4, precision="bf16", secondary=8)).phases[STEP]
    assert alone["secondary weights"] == 2 * P / 4
    offloaded = [
        planned(tmp_path, Sharding(3, 16, 2, offload_param=True, precision="bf16", secondary=n)) for n in (1, 8)
    ]
    assert [plan.phases[STEP]["secondary weights"] for plan in offloaded] == [0, 0]
    assert offloaded[1].cpu - offloaded[0].cpu == pytest.approx(2 * P)  # a whole model on each machine


def test_other_sizes_than_deepspeed_s_own(tmp_path):
    """Of a DeepSpeed file, in elements: each moves the one part that it is the size of."""
    small, other = ZeroSizes(bucket=10**7, live=10**6, reused=10**8, sub_group=10**6), {"bf16": True}
    sharding = Sharding(3, 8, precision="bf16", sizes=small)
    plan, usual = planned(tmp_path, sharding, **other), planned(tmp_path, replace(sharding, sizes=ZeroSizes()), **other)
    assert plan.phases[STEP]["communication"] == 2 * 2 * 10**7
    assert plan.phases[STEP]["gathered weights"] == 2 * (10**8 + LARGEST)
    gradients = [p.phases[OPTIMIZER]["gradients"] for p in (plan, usual)]
    assert gradients[1] - gradients[0] == pytest.approx((min(P, LIVE) - 10**6) / 8 * 6)  # 2 + 4 bytes of a sub-group
    everything = planned(tmp_path, replace(sharding, sizes=ZeroSizes(live=0, reused=0, whole=10**12)), **other)
    assert everything.phases[STEP]["gathered weights"] == 2 * P  # nothing is sharded


def test_without_deepspeed(tmp_path):
    """float32 weights under bf16 autocast: gradients and AdamW in float32. Several processes keep DDP's buckets beside
    the gradients."""
    small = TINY
    p, _ = weights_of(small)
    mixed = planned(tmp_path, Sharding(), small, dtype="float32").phases[OPTIMIZER]
    assert (mixed["weights"], mixed["optimizer states"], mixed["gradients"]) == (4 * p, 8 * p, 4 * p)
    two = planned(tmp_path, Sharding(0, 2), small, dtype="float32").phases[OPTIMIZER]
    assert (two["weights"], two["optimizer states"], two["communication"]) == (4 * p, 8 * p, 4 * p)


@pytest.mark.parametrize("keys", [{}, {"dtype": "float16", "bf16": False, "fp16": True}], ids=["bfloat16", "float16"])
def test_half_precision_without_a_master_copy_is_refused(tmp_path, keys):
    """As a run is, with the way out; an adapter's weights are float32, and DeepSpeed has the copy, for one process
    too."""
    dtype = keys.get("dtype", "bfloat16")
    for sharding in (Sharding(), Sharding(0, 2)):
        with refused("dtype", f" in {dtype} ", "float32", "bf16: true"):
            planned(tmp_path, sharding, TINY, **keys)
    assert planned(tmp_path, Sharding(), TINY, **keys, **LORA).total > 0
    assert planned(tmp_path, Sharding(2, 1, precision="bf16"), TINY, **keys).total > 0


def test_adapters(tmp_path):
    """LoRA: the reference is the policy. QLoRA: 4 bits a weight of the layers' matrices, 4 bytes for 64 of them, and
    embeddings and norms in 16 bits."""
    small = TINY
    lora = planned(tmp_path, Sharding(), small, precompute_ref_log_probs=False, **LORA)
    assert "reference" not in lora.parts
    qlora = planned(tmp_path, Sharding(), small, load_in_4bit=True, **LORA)
    attention, mlp = 256 * 64 * (4 + 2 + 2 + 4), 3 * 256 * 1024
    saved = (attention + mlp) * (2 - 0.5 - 4 / 64)
    assert lora.parts["weights"] - qlora.parts["weights"] == pytest.approx(saved)
    keys = {"precompute_ref_log_probs": False, "dtype": "float32"}
    for sharding in (Sharding(), ENGINE):  # DeepSpeed casts both
        full = planned(tmp_path, sharding, small, **keys)
        assert full.parts["reference"] == full.parts["weights"]


def test_evaluation_may_need_most(tmp_path):
    keys = {"per_device_eval_batch_size": 64, "test_split_size": 8, "dtype": "float32"}
    plan = planned(tmp_path, Sharding(), CONFIGS["gemma"], **keys)
    assert plan.phase == EVALUATION and plan.total > sum(plan.phases[STEP].values())


def test_flash_attention_is_planned_on_a_machine_without(tmp_path):
    """As written, not as this machine falls back: bfloat16, and a kernel that keeps no scores of soft-capped layers."""
    from transformers import Gemma2Config

    config = Gemma2Config(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=4096,
    )  # fmt: skip
    keys = {"gradient_checkpointing": False, "max_length": 2048}
    flash = planned(tmp_path, ENGINE, config, attn_implementation="flash_attention_2", **keys)
    eager = planned(tmp_path, ENGINE, config, attn_implementation="eager", **keys)
    scores = 2 * 2 * 4 * 2048 * 2048 * 2  # bytes, layers, heads, queries, keys, sides
    assert flash.parts["weights"] == 2 * weights_of(config)[0]
    assert eager.parts["activations"] - flash.parts["activations"] > scores


def test_the_longest_max_length(tmp_path):
    """Found by its definition: it fits, and a little more does not. The cap is what the model knows."""
    plan = planned(tmp_path, Sharding(), TINY, gradient_checkpointing=False, dtype="float32")
    gb = plan.at(1000).total / GB
    longest = plan.longest(gb)
    assert 996 <= longest <= 1000 and plan.at(longest).fits(gb) and not plan.at(1001).fits(gb)
    assert plan.longest(plan.at(1500).total / GB) in (1408, 1472)  # in steps of 64, from 1024 tokens on
    assert plan.longest(1000) == 2048
    assert plan.longest(1.0) is None and "no max_length" in plan.verdict(1.0)
    assert f"--max_length={longest} would fit" in plan.verdict(gb)
    assert plan.fits(plan.total / GB) and not plan.fits(plan.total / GB * 0.99)
    assert plan.markdown().splitlines()[-1] == f"| **together** | {plan.total / GB:.1f} |"


@pytest.mark.parametrize(
    ("keys", "key", "detail"),
    [
        ({"optim": "adafactor"}, "optim", "optim: adafactor"),
        ({"max_length": None}, "max_length", "max_length: null"),
        ({"load_in_8bit": True}, "load_in_8bit", "load_in_4bit"),
        ({"load_in_4bit": True}, "load_in_4bit", "use_peft: true"),
        ({"model_name_or_path": "models/not-there"}, "model_name_or_path", "models/not-there"),
        ({"torch_compile": True}, "deepspeed", "torch_compile"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_planned_is_named(tmp_path, keys, key, detail):
    with refused(key, detail):
        planned(tmp_path, Sharding(), TINY, **keys)


def test_an_adapter_folder_is_named(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with refused("model_name_or_path", tmp_path / "model", "adapter"):
        planned(tmp_path, Sharding(), TINY)


SHARED = Sharding(3, 8, precision="bf16", row_ranks=2)


@pytest.mark.parametrize(
    ("name", "keys", "sharding"),
    [
        ("llama", BF16, Sharding(2, 8, precision="bf16")),
        ("gemma", {"gradient_checkpointing": False, "precompute_ref_log_probs": False}, Sharding()),
        ("qwen3", {**BF16, "precompute_ref_log_probs": False}, Sharding(3, 8, precision="bf16")),
        ("qwen3", {**BF16, **LORA}, SHARED),
        ("llama", {**BF16, "gradient_accumulation_steps": 2}, SHARED),
        ("llama", {"gradient_checkpointing": True, **LORA}, Sharding(cpu=True)),
        ("llama", {**BF16, **LORA, "lora_target_modules": ["all-linear"]}, Sharding(2, 8, precision="bf16")),
    ],
)
def test_deep_models_are_planned_by_shallow_ones(name, keys, sharding, tmp_path, monkeypatch):
    """To the byte, and only where all layers are alike."""
    config = copy.deepcopy(CONFIGS[name])
    config.num_hidden_layers = 7
    if name == "qwen3":
        config.layer_types = ["full_attention"] * 7
    recipe = recipe_for(tmp_path, config, **keys)
    deep, counted = plan_memory(recipe, sharding), []
    monkeypatch.setattr(mdpo.memory.estimate, "alike", lambda *args: counted.append(alike(*args)))
    whole = plan_memory(recipe, sharding)
    assert [whole.at(n).phases for n in (3, 400)] == [deep.at(n).phases for n in (3, 400)] and counted == [True]


def test_under_autocast_every_layer_is_counted(tmp_path, monkeypatch):
    """Copies in half precision of float32 weights live through the forward pass: with few layers the peak is in the LM
    head, with many at the end of the forward pass."""
    config, deep = LlamaConfig(**{**SIZES, "num_hidden_layers": 6}), []
    recipe = recipe_for(tmp_path, config, **BF16, **LORA)
    monkeypatch.setattr(mdpo.memory.estimate, "DeepModel", lambda *args, **options: deep.append(args))
    plan_memory(recipe, Sharding(precision="bf16"))
    assert not deep


def test_layers_of_several_kinds_are_all_counted():
    def make(config):
        return lambda: AutoModelForCausalLM.from_config(config)

    kinds = Qwen3Config(**{**SIZES, "num_hidden_layers": 6}, layer_types=["full_attention", "sliding_attention"] * 3)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "mlp_only_layers": [0]}
    dense_first = Qwen3MoeConfig(**{**SIZES, "num_hidden_layers": 6}, **experts)
    plain = LlamaConfig(**{**SIZES, "num_hidden_layers": 6})
    partly = get_peft_config(ModelConfig(use_peft=True))
    partly.layers_to_transform = [1]
    assert [alike(config, make(config), None) for config in (kinds, dense_first, plain)] == [False, False, True]
    assert not alike(plain, make(plain), partly)
    assert not alike(LlamaConfig(**SIZES), make(LlamaConfig(**SIZES)), None)  # as deep as the shallow ones


def test_a_mixture_of_experts(tmp_path):
    """All experts' weights, and tokens times experts per token."""
    config = MixtralConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=512,
    )  # fmt: skip
    plan = planned(tmp_path, ENGINE, config)
    assert plan.parts["weights"] == 2 * weights_of(config)[0]


def test_a_model_that_takes_no_packed_rows(tmp_path):
    """GPT-OSS's attention has sinks: a run goes on with padded rows, and so does the plan. State-space kernels are
    refused by name."""
    sizes = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 512}
    config = GptOssConfig(
        **sizes, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_local_experts=4
    )
    given, off = (planned(tmp_path, ENGINE, config, shared_prefix=on) for on in (True, False))
    assert given.parts == off.parts
    with refused("model_type", "mamba"):
        planned(tmp_path, ENGINE, MambaConfig(vocab_size=512, hidden_size=64, num_hidden_layers=2))


# ---------------------------------------------------------------------------------------------------- accelerate files


def test_every_accelerate_file_of_this_repository_is_read():
    read = {path.name: Sharding.read(path) for path in sorted((ROOT / "training_configs").glob("*.yaml"))}
    assert read["zero2_for_dpo.yaml"] == Sharding(2, 8, precision="bf16")
    assert read["zero3_for_dpo.yaml"] == Sharding(3, 8, precision="bf16")
    assert read["zero3_plus_plus_two_nodes.yaml"] == Sharding(3, 16, 2, secondary=8)
    assert read["cpu.yaml"] == Sharding(cpu=True)
    assert str(read["zero3_for_dpo.yaml"]) == "8 GPUs, ZeRO-3" and len(read) >= 7
    assert Sharding.read(ROOT / "zero2_for_dpo.yaml", 4).processes == 4


@pytest.mark.parametrize(
    ("changes", "key", "detail"),
    [
        ({"deepspeed_config": {"zero_stage": 1}}, "zero_stage", "ZeRO-1"),
        ({"deepspeed_config": {"zero_stage": 3, "offload_param_device": "nvme"}}, "offload_param_device", "nvme"),
        ({"deepspeed_config": {"zero_stage": 2, "offload_param_device": "cpu"}}, "offload_param_device", "ZeRO-3 only"),
        ({"deepspeed_config": {"deepspeed_config_file": "x.json"}}, "deepspeed_config_file", "x.json"),
        ({"distributed_type": "FSDP"}, "distributed_type", "FSDP"),
        ({"distributed_type": "NO", "num_processes": 2}, "distributed_type", "one process, not 2"),
        ({"num_processes": 8, "num_machines": 3}, "num_machines", "3 machines"),
    ],
)
def test_accelerate_files_that_cannot_be_planned(tmp_path, changes, key, detail):
    path = tmp_path / "accelerate.yaml"
    path.write_text(yaml.safe_dump({"distributed_type": "DEEPSPEED", "num_processes": 8, **changes}))
    with refused(key, path, detail):
        Sharding.read(path)


def test_a_recipe_in_place_of_an_accelerate_file():
    with refused("num_processes", "config_full.yaml"):
        Sharding.read(ROOT / "recipes/gemma-7b-it/dpo/config_full.yaml")


def test_a_missing_accelerate_file_is_answered_with_those_that_are_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # from any folder
    with refused("accelerate file", "nothing.yaml", "training_configs/zero3_for_dpo.yaml"):
        Sharding.read("nothing.yaml")


# ------------------------------------------------------------------------------------------------------------- script


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("plan_memory_script", ROOT / "scripts/plan_memory.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_s_commands_run(tmp_path, script, capsys, monkeypatch):
    """With a small model's configuration in place of the one on the hub."""
    monkeypatch.chdir(ROOT)
    TINY.save_pretrained(tmp_path)
    lines = re.findall(r"^    python scripts/plan_memory.py (.*)$", (ROOT / "docs/memory.md").read_text(), re.MULTILINE)
    assert len(lines) == 2
    for line in lines:
        script.main([*line.split(), f"--model_name_or_path={tmp_path}"])
    said = capsys.readouterr().out
    assert "8 GPUs, ZeRO-2" in said and "4 GPUs, ZeRO-3" in said and "at max_length 4096" in said
    assert "FITS into 80 GB" in said and "FITS into 40 GB" in said


def test_script(tmp_path, script, capsys):
    """The table, a verdict for a small GPU and exit code 1; ZeRO-3 in a file, settings in any order."""
    recipe_for(tmp_path, TINY, **BF16)
    argv = [
        "--config_file",
        f"{ROOT}/training_configs/zero3_for_dpo.yaml",
        f"{tmp_path}/recipe.yaml",
        "--max_length=512",
    ]
    with pytest.raises(SystemExit) as ended:
        script.main([*argv, "--gpu_gb=2"])
    said = capsys.readouterr().out
    assert ended.value.code == 1
    assert "8 GPUs, ZeRO-3; a training step needs most, at max_length 512" in said
    assert "DOES NOT FIT into 2 GB" in said
    rows = dict(re.findall(r"│ ([\w() -]+?) +│ +([\d.]+) │", said))
    together = float(rows.pop("together"))
    assert together == pytest.approx(sum(map(float, rows.values())), abs=0.05) and together > 2
    assert float(rows["libraries (assumed)"]) == LIBRARIES["GPU"] / GB
    script.main([*argv, "--gpu_gb", "8"])
    assert "FITS into 8 GB" in capsys.readouterr().out


def test_sequences_of_a_side_take_what_as_many_pairs_take(tmp_path, script, capsys):
    """Two sequences a side of 3 pairs as one of 6, for each phase; the script says the tokens of all."""
    several = plan_memory(recipe_for(tmp_path, TINY, **BF16, per_device_train_batch_size=3,
                                     per_device_eval_batch_size=3), ENGINE, sequences=2)  # fmt: skip
    script.main([f"{tmp_path}/recipe.yaml", "--max_length=64", "--sequences=2"])
    assert "3 a device, 256 tokens each, all distinct" in capsys.readouterr().out
    with refused("sequences", "0"):
        script.main([f"{tmp_path}/recipe.yaml", "--sequences=0"])
    pairs = planned(tmp_path, ENGINE, TINY, per_device_train_batch_size=6, per_device_eval_batch_size=6)
    one = planned(tmp_path, ENGINE, TINY, per_device_train_batch_size=3, per_device_eval_batch_size=3)
    assert several.phases == pairs.phases != one.phases
