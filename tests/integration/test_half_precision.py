"""The regime that users run: half precision under real ZeRO-2 and ZeRO-3, two processes, from the accelerate files for
8 GPUs. Where policy and reference are the same model and nothing is learned, the loss is ln 2 at every step, to the
last bit, whatever the weights' precision."""

import json
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from errors import refused
from launches import LAUNCHER, TIMEOUT_S, environment_of, losses
from repository import ROOT
from tiny import CHATML, agent_rows, tiny_llama, tokenizer_for
from transformers import AutoModelForCausalLM
from twins import small_twin

from dpo_trainer import DPOTrainer
from mdpo.config.precision import MIXED, Precision, cast_weights, cpu_has_bf16, refuse_two_precisions, without_master
from mdpo.config.schema import MDPOConfig
from mdpo.config.validation import check_options
from mdpo.data.tokenize import tokenize_dataset
from mdpo.forward.collators import PairCollator
from mdpo.forward.pair_logps import sum_by_pair
from mdpo.masking.loss_mask import RenderSettings
from mdpo.reference.model import lost_in_sync
from mdpo.types import PairBatch

LN2 = torch.tensor(math.log(2)).item()  # as a float32
LORA = ["--use_peft", "--lora_r=4", "--lora_target_modules=all-linear"]
NO_BALANCE = {"full": ["--router_aux_loss_coef=0"], "lora": ["--router_aux_loss_coef=0", "--lora_dropout=0.0"]}
SMOLLM2 = ROOT / "recipes/smollm2-135m/dpo/config_quickstart.yaml"


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A model, pairs of very different lengths, and a recipe at learning rate 0; `model-bf16` holds the same weights,
    rounded to bfloat16."""
    folder = tmp_path_factory.mktemp("shop")
    tokenizer = tokenizer_for(CHATML, "byte", eos="<|im_end|>")
    model = tiny_llama(tokenizer, seed=0)
    cast_weights(model, torch.bfloat16)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    small_twin("qwen3-30b-a3b", folder / "experts", seed=0)
    rows = agent_rows(16)
    for i, row in enumerate(rows):
        row["chosen"][3]["content"] += " It is right." * (30 if i % 2 else 0)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(
        f"""
model_name_or_path: {folder}/model
dtype: bfloat16
dataset_mixer: {{{folder}/pairs.jsonl: 1.0}}
dataset_splits: [train]
max_length: 500
learning_rate: 0.0
lr_scheduler_type: constant
max_steps: 3
per_device_train_batch_size: 1
logging_steps: 1
save_strategy: "no"
report_to: none
seed: 7
"""
    )
    return folder


def on_cpus(config: str, precision: str, folder) -> str:
    """An accelerate file for GPUs as it is, but for two CPU processes and the precision."""
    raw = yaml.safe_load((ROOT / f"training_configs/{config}.yaml").read_text())
    path = folder / f"{config}_{precision}.yaml"
    if "parallelism_config" in raw:
        raw["parallelism_config"]["parallelism_config_sp_size"] = 2
    path.write_text(yaml.safe_dump({**raw, "use_cpu": True, "mixed_precision": precision, "num_processes": 2}))
    return str(path)


def launch_runs(config, precision, runs: dict[str, list[str]], shop, operators, out) -> tuple[dict[str, list], str]:
    """(name -> logs of training, all that was printed) of several runs in the processes of one launch, or without
    `config` in one process."""
    given = {name: run if run[0].endswith(".yaml") else [str(shop / "recipe.yaml"), *run] for name, run in runs.items()}
    (out / "runs.json").write_text(json.dumps([[n, [*run, f"--output_dir={out / n}"]] for n, run in given.items()]))
    launcher = (
        [*LAUNCHER, "--config_file", on_cpus(config, precision, out), "--main_process_port", "0"] if config else []
    )
    command = launcher or [sys.executable]
    env = {"MDPO_CPU_BF16": "1", "HF_HOME": str(out / "hf"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "tests/helpers/half_worker.py", str(out / "runs.json")],
        cwd=ROOT,
        env=environment_of(operators, env),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return {name: losses(out / name) for name in runs}, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_nothing_learned_is_ln_2_in_bfloat16(stage, shop, extensions, tmp_path):
    """Precomputed or in the step, full or LoRA, 1 or 4 pairs, weights loaded in bfloat16 or left in float32."""
    runs = {
        f"{ahead}-{kind}-{pairs}": [
            f"--precompute_ref_log_probs={ahead}",
            f"--per_device_train_batch_size={pairs}",
            *(LORA if kind == "lora" else []),
            *(["--dtype=null"] if kind == "float32" else []),
        ]
        for ahead in ("true", "false")
        for kind in ("full", "lora", "float32")
        for pairs in (1, 4)
    }
    runs |= {
        f"{ahead}-experts-{kind}-1": [
            f"--model_name_or_path={shop}/experts",
            *runs[f"{ahead}-{kind}-1"],
            *NO_BALANCE[kind],
        ]
        for ahead, kind in (("true", "full"), ("false", "lora"))
        if stage == 3
    }
    runs["wrong"] = runs["true-full-1"]
    logs, printed = launch_runs(f"zero{stage}_for_dpo", "bf16", runs, shop, extensions, tmp_path)
    wrong = logs.pop("wrong")
    assert len(logs) == (14 if stage == 3 else 12)
    for name, steps in logs.items():
        assert [step["loss"] for step in steps] == [pytest.approx(LN2, abs=0 if "-1" in name else 1e-3)] * 3, name
        assert all(abs(step["rewards/margins"]) <= (0 if "-1" in name else 1e-3) for step in steps), name
    # The negative control casts the reference's log-probs to bfloat16, as Trainer does.
    assert max(abs(step["loss"] - LN2) for step in wrong) > 1e-3
    dtypes = "policy bfloat16, reference bfloat16, gradients bfloat16, master weights float32 (DeepSpeed's)"
    # In the step full runs have a reference of their own; precomputed, or of LoRA, there is none.
    seen = [line for line in printed.splitlines() if line.startswith("seen:")]
    references = ["torch.bfloat16" if name.startswith("false") and "lora" not in name else "none" for name in runs]
    assert seen == [f"seen: torch.bfloat16 {reference} torch.float32" for reference in references]
    assert printed.count(f"dtypes: {dtypes}") == len(runs) and f"device: 2 × cpu, ZeRO-{stage}" in printed


@pytest.mark.slow
def test_nothing_learned_is_ln_2_in_bfloat16_where_ranks_share_rows(shop, extensions, tmp_path):
    runs = {
        "ahead": ["--precompute_ref_log_probs=true"],
        "in the step": ["--precompute_ref_log_probs=false"],
        "lora": ["--precompute_ref_log_probs=false", *LORA],
        "not shared": ["--shared_prefix=false"],
    }
    logs, printed = launch_runs("zero3_sequence_parallel", "bf16", runs, shop, extensions, tmp_path)
    for name, steps in logs.items():
        assert [step["loss"] for step in steps] == [LN2] * 3, name
    assert printed.count("1 pairs per device × 1 accumulation × 1 group of 2 processes") == 4
    assert printed.count("device: 2 × cpu, ZeRO-3, 2 of them for each row") == 4
    assert printed.count("2 of 4 heads of attention each") == 4


@pytest.mark.slow
def test_nothing_learned_is_ln_2_in_float16(shop, extensions, tmp_path):
    """With DeepSpeed's loss scale, which begins so high that the first steps are left out."""
    half = ["--fp16=true", "--bf16=false", "--dtype=float16"]
    runs = {ahead: [*half, f"--precompute_ref_log_probs={ahead}"] for ahead in ("true", "false")}
    logs, printed = launch_runs("zero2_for_dpo", "fp16", runs, shop, extensions, tmp_path)
    for name, steps in logs.items():
        assert [step["loss"] for step in steps] == [LN2] * 3, name
    assert "dtypes: policy float16, reference float16" in printed


@pytest.mark.slow
def test_nothing_learned_is_ln_2_in_one_process(shop, tmp_path):
    """Without DeepSpeed: float32 weights, or an adapter's on bfloat16 or float32 ones, and products in bfloat16."""
    kinds = {"full": ["--dtype=float32"], "lora": LORA, "lora32": ["--dtype=null", *LORA]}
    runs = {
        f"{kind}-{ahead}": [*flags, f"--precompute_ref_log_probs={ahead}", "--per_device_train_batch_size=2"]
        for kind, flags in kinds.items()
        for ahead in ("true", "false")
    }
    logs, printed = launch_runs(None, "bf16", runs, shop, tmp_path, tmp_path)
    for name, steps in logs.items():
        assert [step["loss"] for step in steps] == [LN2] * 3, name
    assert printed.count("dtypes: policy float32, computing in bfloat16, reference float32, computing in bfloat16") == 4
    assert printed.count("dtypes: policy bfloat16, adapter float32, reference bfloat16, gradients float32") == 2


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_nothing_learned_is_ln_2_with_a_pretrained_model(stage, shop, extensions, tmp_path):
    """SmolLM2-135M. A CPU without bfloat16 units takes one step of short pairs, others four of long ones."""
    steps = 4 if cpu_has_bf16() else 1
    run = [str(SMOLLM2), "--dtype=bfloat16", "--bf16=true", "--learning_rate=0.0", f"--max_steps={steps}"]
    run += ["--per_device_train_batch_size=1", f"--max_training_samples={2 * steps}", "--eval_dataset_mixer=null"]
    run += ["--dataset_splits=[train]", "--eval_on_start=false", "--show_answers=0", "--report_to=none"]
    if steps > 1:
        run += ["--max_length=1024", f"--dataset_mixer={{{ROOT}/recipes/smollm2-135m/data/train_long.jsonl: 1.0}}"]
    logs, _ = launch_runs(f"zero{stage}_for_dpo", "bf16", {"smol": run}, shop, extensions, tmp_path)
    assert [log["loss"] for log in logs["smol"]] == [LN2] * steps


@pytest.mark.slow
def test_a_bfloat16_run_learns_what_a_float32_run_learns(shop, extensions, tmp_path):
    """The same pairs at the same steps, from weights that bfloat16 holds exactly. Rewards and margins may differ by
    what rounding of the weights explains, measured on the same pairs without any training."""
    run = ["--learning_rate=1.0e-3", "--max_steps=8", "--per_device_train_batch_size=4", "--precompute_ref_log_probs"]
    found = {}
    for precision, more in (("bf16", []), ("no", ["--bf16=false", "--dtype=float32"])):
        (tmp_path / precision).mkdir()
        logs, _ = launch_runs("zero2_for_dpo", precision, {"run": run + more}, shop, extensions, tmp_path / precision)
        found[precision] = logs["run"]
    noise = rounding_of_rewards(shop, tmp_path / "no" / "run")
    assert max(abs(log["rewards/margins"]) for log in found["no"]) > 10 * noise  # something was learned
    for half, whole in zip(found["bf16"], found["no"], strict=True):
        for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
            assert half[name] == pytest.approx(whole[name], abs=3 * noise), (half["step"], name)


def rounding_of_rewards(shop, trained) -> float:
    """The largest change of a pair's reward or margin where the trained weights are rounded to bfloat16, at β 0.1."""
    from datasets import load_dataset

    from mdpo.forward.token_logps import enable_scoring, score_tokens

    tokenizer = tokenizer_for(CHATML, "byte", eos="<|im_end|>")
    rows = load_dataset("json", data_files=str(shop / "pairs.jsonl"), split="train")
    rows, _ = tokenize_dataset(rows, tokenizer, RenderSettings(500), "pairs")
    batch, sums = PairCollator(tokenizer.pad_token_id)([rows[i] for i in range(16)]), []
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(trained).eval()
        cast_weights(model, dtype)
        enable_scoring(model)
        with torch.no_grad():
            sums.append(sum_by_pair(score_tokens(model, batch).logps, batch))
    chosen, rejected = (0.1 * (getattr(sums[0], s) - getattr(sums[1], s)) for s in ("chosen", "rejected"))
    return max(x.abs().max().item() for x in (chosen, rejected, chosen - rejected))


# ------------------------------------------------------------------------------------------------ without a launch


def test_sums_do_not_depend_on_the_dtype_that_comes_in():
    """1000 tokens of −0.3 in bfloat16, each of which is −0.30078125: −300.78125, where sums in bfloat16 stop at −256 or
    thereabouts, as the spacing of its numbers is 2 from there on."""
    pair, side = torch.zeros(1200, dtype=torch.long), (torch.arange(1200) >= 1000).long()
    batch = PairBatch(input_ids=torch.zeros(2, 1001), pair=pair, side=side)
    logps = torch.full((1200,), -0.3, dtype=torch.bfloat16)
    sums = sum_by_pair(logps, batch)
    assert sums.chosen.dtype == torch.float64
    assert (sums.chosen.item(), sums.rejected.item()) == (-300.78125, -60.15625)
    wrong = torch.zeros(2, dtype=torch.bfloat16).index_add(0, batch["side"], logps)
    assert abs(wrong[0].item() + 300.78125) > 10


def arguments(mixed="bf16", stage=None, **more):
    plugin = None if stage is None else SimpleNamespace(zero_stage=stage)
    return SimpleNamespace(mixed_precision=mixed, deepspeed_plugin=plugin, learning_rate=5e-7, **more)


BY_DEEPSPEED, BY_ITSELF = "master weights float32 (DeepSpeed's)", "master weights none, float32 is updated"
DTYPES = [
    ("bf16", 2, torch.float32, False, "policy bfloat16, reference bfloat16, gradients bfloat16", BY_DEEPSPEED),
    ("fp16", 3, torch.bfloat16, True, "policy float16, reference float16, gradients float16", BY_DEEPSPEED),
    ("no", 2, torch.float32, False, "policy float32, reference float32, gradients float32", BY_DEEPSPEED),
    ("bf16", None, torch.bfloat16, True, "policy bfloat16, adapter float32, reference bfloat16, gradients float32",
     BY_ITSELF),
    ("bf16", None, torch.float32, False, "policy float32, computing in bfloat16, reference float32, computing in "
     "bfloat16, gradients float32", BY_ITSELF),
]  # fmt: skip


@pytest.mark.parametrize(("mixed", "stage", "loaded", "adapter", "weights", "master"), DTYPES)
def test_dtypes_of_a_run(mixed, stage, loaded, adapter, weights, master):
    assert str(Precision.of(arguments(mixed, stage), loaded, adapter)) == f"{weights}, {master}"


def test_half_precision_without_a_master_copy_is_refused(shop, tmp_path):
    """Under MDPOConfig; TRL's own config lets it pass with a warning. Where the optimizer is given, its owner knows."""
    from datasets import Dataset

    tokenizer = tokenizer_for(CHATML, "byte", eos="<|im_end|>")
    data = {"train_dataset": Dataset.from_list(agent_rows(4)), "processing_class": tokenizer}

    def trainer(kind, **more):
        model = AutoModelForCausalLM.from_pretrained(shop / "model", dtype=torch.bfloat16)
        settings = kind(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
        return DPOTrainer(model, args=settings, **data, **more)

    scoring = trainer(MDPOConfig)  # which may evaluate
    assert scoring.evaluate(data["train_dataset"])["eval_loss"] == pytest.approx(LN2)
    with refused("dtype", " in bfloat16 ", "dtype: float32", "bf16: true"):
        scoring.train()
    owned = trainer(MDPOConfig)
    owned.optimizer = torch.optim.SGD(owned.model.parameters(), lr=1.0)
    owned.args.max_steps = 1
    owned.train()


def test_modules_to_save_are_trained_in_float32(shop, tmp_path):
    """PEFT copies them in the base's dtype."""
    from datasets import Dataset
    from peft import LoraConfig

    model = AutoModelForCausalLM.from_pretrained(shop / "model", dtype=torch.bfloat16)
    trainer = DPOTrainer(
        model,
        args=MDPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=True, report_to="none", max_steps=1),
        train_dataset=Dataset.from_list(agent_rows(4)),
        processing_class=tokenizer_for(CHATML, "byte", eos="<|im_end|>"),
        peft_config=LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    )
    trained = {p.dtype for p in trainer.model.parameters() if p.requires_grad}
    assert trained == {torch.float32} and model.lm_head.original_module.weight.dtype == torch.bfloat16
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(LN2, abs=2e-3)


@pytest.mark.parametrize("key", ["bf16", "fp16"])
def test_deepspeed_without_master_weights_is_refused(key):
    args = arguments(key, 2)
    args.deepspeed_plugin.deepspeed_config = {key: {"enabled": True, f"{key}_master_weights_and_grads": True}}
    assert "without a float32 master copy" in without_master(args, MIXED[key])
    args.deepspeed_plugin.deepspeed_config[key].pop(f"{key}_master_weights_and_grads")
    assert without_master(args, MIXED[key]) is None


def test_zero3_that_could_write_no_model_is_refused_at_the_start(tmp_path):
    args = MDPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    of_the_recipe = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    engine = {**dict.fromkeys(of_the_recipe, "auto"), "zero_optimization": {"stage": 3}}
    args.deepspeed_plugin = SimpleNamespace(zero_stage=3, deepspeed_config=engine)
    with refused("zero3_save_16bit_model", "zero3_save_16bit_model: true"):
        check_options(args)
    engine["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    check_options(args)


def test_half_precision_without_a_master_copy_is_refused_before_the_data(shop, capsys, monkeypatch):
    import run_dpo

    monkeypatch.setenv("MDPO_CPU_BF16", "1")
    out = shop / "never"
    with refused("dtype", " in bfloat16 ", "float32"):
        run_dpo.main([str(shop / "recipe.yaml"), f"--output_dir={out}"])
    assert not out.exists()


@pytest.mark.parametrize(
    ("launched", "recipe", "mixed", "wrong"),
    [
        ("bf16", {"bf16": False}, "bf16", ["mixed_precision: bf16 ", "bf16: false"]),
        ("fp16", {}, "bf16", ["mixed_precision: fp16 ", "bf16: true"]),
        ("bf16", {"fp16": True}, "fp16", ["mixed_precision: bf16 ", "fp16: true"]),
        ("bf16", {}, "bf16", None),
        ("no", {}, "bf16", None),
        ("fp16", {"fp16": True, "bf16": False}, "fp16", None),
    ],
)
def test_recipe_and_accelerate_file_say_the_same(monkeypatch, launched, recipe, mixed, wrong):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    if wrong is None:
        refuse_two_precisions(recipe, arguments(mixed))
        return
    with refused("mixed_precision", *wrong):
        refuse_two_precisions(recipe, arguments(mixed))


def test_deepspeed_does_not_compute_in_float32_with_half_precision_weights(monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    with refused("dtype", "dtype: bfloat16 ", "DeepSpeed", "bf16: true"):
        refuse_two_precisions({"dtype": "bfloat16"}, arguments("no", 2))


def test_mixing_in_half_precision_is_told():
    """Of a step of one unit of precision α = 0.3 makes nothing and α = 0.6 all of it."""
    model = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    torch.nn.init.ones_(model.weight)
    moved = model.weight.data.clone()
    moved.lerp_(torch.nextafter(moved, torch.full_like(moved, 2)), 0.3)
    assert torch.equal(moved, model.weight.data)
    assert lost_in_sync(model, 0.3)[0].startswith("warning: sync_ref_model mixes weights in bfloat16")
    assert not lost_in_sync(model, 1.0) and not lost_in_sync(model.float(), 0.3)


def test_buffers_keep_their_dtype():
    """RoPE's frequencies in bfloat16 would move every position."""
    model = tiny_llama(tokenizer_for(CHATML, "byte", eos="<|im_end|>"))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    cast_weights(model, torch.bfloat16)
    assert before and {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
