"""A full training step on a fake GPU (fake_gpu.py): forward, LM head, pair sums, loss, backward, per-pair metrics, turn
metrics, reference. A tensor on the wrong device, two dtypes in one operator, or a synchronization fails."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
import transformers
from fake_gpu import BlockingCopy, FakeGpu
from packed_pairs import FAMILIES, SIZES, pair
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

import mdpo.forward.packed_attention
import mdpo.forward.pair_logps
import mdpo.forward.varlen
from dpo_trainer import DPOTrainer
from mdpo.forward.collators import PackedCollator, PairCollator, unpacked
from mdpo.forward.token_logps import enable_scoring
from mdpo.loss.metrics import COLUMNS
from mdpo.loss.pair_tables import PairTables
from mdpo.loss.registry import LossSettings
from mdpo.reference.frozen import Reference
from mdpo.runs.nonfinite_guard import NonfiniteGuard

ROWS = [
    {**p, "margin": 0.5, **{f"{side}_weights": [0.5 * (t % 3) for t in range(len(p[f"{side}_ids"]))]
                            for side in ("chosen", "rejected")}}
    for p in (pair(9, 7, 5), pair(1, 5, 3), pair(0, 6, 6))
]  # fmt: skip
NAMES = ["Llama", "Gemma", "Gemma2", "Gemma3", "Qwen3", "Mistral", "Phi3", "Mixtral"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def trainer_on(gpu: FakeGpu, family: str, dtype, lora=False, checkpointing=None, **args):
    """A DPOTrainer with the attributes that `compute_loss` uses, its policy and reference with fake weights."""

    def build_model():
        name = "Gemma3Text" if family == "Gemma3" else family
        config = getattr(transformers, f"{name}Config")(**{**SIZES, **FAMILIES[family]})
        config._attn_implementation = "eager" if family == "Gemma2" else "sdpa"
        with torch.device("meta"):
            model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype)
        if family == "Mixtral":
            model.set_experts_implementation("batched_mm")  # the other one synchronizes: which experts are in use?
        enable_scoring(model)
        return model

    policy = build_model()
    if lora:
        with torch.device("meta"):
            adapter = LoraConfig(r=4, target_modules=["q_proj", "o_proj"] if family != "Phi3" else ["qkv_proj"])
            policy = get_peft_model(policy, adapter)
    policy = gpu.model(policy).train()
    if checkpointing is not None:
        options = {"use_reentrant": checkpointing, "preserve_rng_state": False}
        policy.gradient_checkpointing_enable(options)
        policy.enable_input_require_grads()
    trainer = object.__new__(DPOTrainer)
    trainer.model, reference = policy, None if lora else gpu.model(build_model()).requires_grad_(False).eval()
    trainer.args = SimpleNamespace(**{
        "use_weighting": True, "ld_alpha": 0.5, "precompute_ref_log_probs": False, "max_nonfinite_steps": 3,
        "gradient_checkpointing_kwargs": {"use_reentrant": checkpointing, "preserve_rng_state": False},
        "device": gpu.device, "deepspeed_plugin": None, "disable_dropout": False, "neftune_noise_alpha": None, **args,
    })  # fmt: skip
    cast = contextlib.nullcontext  # the stand-in for a GPU has no autocast
    trainer.accelerator = SimpleNamespace(unwrap_model=lambda model: model, autocast=cast, device=gpu.device)
    trainer.layout = SimpleNamespace(pad_token_id=0, fit=lambda model, batch: batch)
    settings = {
        "loss_type": ["sigmoid", "ipo"],
        "loss_weights": [1.0, 0.5],
        "nll_coefficient": 0.1,
        "margin_scale": 1.0,
    }
    trainer.loss_settings = LossSettings(**settings)
    trainer.render_settings, trainer.is_deepspeed_enabled = SimpleNamespace(mask_turns=True), False
    trainer.aux_loss_coef, trainer.tables = 0.0, PairTables(gpu.device)
    trainer.nonfinite = NonfiniteGuard(trainer.args, trainer.tables)
    trainer.reference = Reference(policy, None, trainer.args, trainer.accelerator, trainer.layout, None)
    trainer.reference.model = reference
    return trainer


def step(gpu: FakeGpu, trainer, batch) -> None:
    """Runs a micro-batch and checks devices, dtypes and shapes."""
    with gpu:
        batch = gpu.batch(batch)
        loss, logps = trainer.compute_loss(trainer.model, batch, return_outputs=True)
        loss.backward()
    assert loss.device == gpu.device and loss.dtype in (torch.float32, torch.float64) and loss.shape == ()
    assert logps.chosen.shape == (len(ROWS),)
    (table,) = trainer.tables.train
    assert (table.device, table.dtype) == (gpu.device, torch.float64) and table.size(1) > len(COLUMNS)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None for p in trained)
    assert all((p.grad.device, p.grad.dtype) == (gpu.device, p.dtype) for p in trained)


COLLATORS = {"packed": PackedCollator(), "padded": PairCollator(0)}
FAST = [  # family, dtype, LoRA, checkpointing (use_reentrant), layout
    *((family, "bf16", False, None, "packed") for family in NAMES),
    ("Llama", "bf16", True, True, "packed"),
    ("Llama", "fp16", False, False, "padded"),
    ("Llama", "fp32", True, False, "packed"),
]
SLOW = [
    *((family, "bf16", False, None, "padded") for family in NAMES),
    *((family, "fp32", False, True, "packed") for family in NAMES),
    *((family, "fp16", True, False, "packed") for family in NAMES),
]


@pytest.mark.parametrize(
    ("family", "dtype", "lora", "checkpointing", "layout"),
    [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_a_step(family, dtype, lora, checkpointing, layout):
    gpu = FakeGpu()
    step(gpu, trainer_on(gpu, family, DTYPES[dtype], lora, checkpointing), COLLATORS[layout](ROWS))
    assert gpu.strict.nonzero_calls == 1  # which tokens have a gradient, once in the head's backward


def test_a_packed_batch_that_a_model_takes_padded():
    gpu = FakeGpu()
    trainer = trainer_on(gpu, "Llama", torch.bfloat16)
    trainer.layout.fit = lambda model, batch: unpacked(batch, 0)
    step(gpu, trainer, PackedCollator()(ROWS))


def test_precomputed_log_probs_and_plain_dpo():
    """Without what only some recipes ask for: weights, margins, WPO, LD-DPO, NLL."""
    gpu, rows = FakeGpu(), [{k: v for k, v in row.items() if "weights" not in k and k != "margin"} for row in ROWS]
    for row in rows:
        for side in ("chosen", "rejected"):
            row[f"reference_{side}_logps"] = [-1.0] * sum(row[f"{side}_mask"])
    options = {"use_weighting": False, "ld_alpha": None, "precompute_ref_log_probs": True}
    trainer = trainer_on(gpu, "Llama", torch.bfloat16, **options)
    trainer.loss_settings = LossSettings()
    step(gpu, trainer, PackedCollator()(rows))


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_varlen_kernels_get_tensors_of_one_device(family, monkeypatch):
    def kernel(q, k, v, q_begins, k_begins, *_, **options):
        assert q_begins.dtype == k_begins.dtype == torch.int32
        return q + (k.sum() + v.sum() + (q_begins.sum() + k_begins.sum())).to(q.dtype)

    monkeypatch.setattr(mdpo.forward.varlen, "flash_attn", lambda: (kernel, None))
    monkeypatch.setattr(mdpo.forward.packed_attention, "_varlen", lambda *_: mdpo.forward.varlen.flash)
    gpu = FakeGpu()
    step(gpu, trainer_on(gpu, family, torch.bfloat16), PackedCollator()(ROWS))


# --------------------------------------------------------------------------------------------------- negative controls


def fails_on(monkeypatch, name, wrong, error, message, module=mdpo.forward.pair_logps):
    monkeypatch.setattr(module, name, wrong)
    gpu = FakeGpu()
    trainer = trainer_on(gpu, "Llama", torch.bfloat16)
    with pytest.raises(error, match=message):
        step(gpu, trainer, PackedCollator()(ROWS))


def test_a_tensor_made_on_the_cpu_is_noticed(monkeypatch):
    count = mdpo.forward.pair_logps._per_sequence

    def wrong(used, place, n):
        return count(used, place, n) + torch.arange(n)

    fails_on(monkeypatch, "_per_sequence", wrong, RuntimeError, "same device")


def test_a_question_that_waits_for_the_gpu_is_noticed(monkeypatch):
    count = mdpo.forward.pair_logps._per_sequence

    def wrong(used, place, n):
        return torch.bincount(place[used], minlength=2 * n).view(2, n)

    error = (DataDependentOutputException, DynamicOutputShapeException)
    fails_on(monkeypatch, "_per_sequence", wrong, error, "nonzero|bincount")
    wrong = lambda used, place, n: count(used, place, n) + torch.ones(2, n).to(place.device)  # noqa: E731
    fails_on(monkeypatch, "_per_sequence", wrong, BlockingCopy, "on its way")
    fails_on(monkeypatch, "counted", lambda batch: bool((batch["turn_weight"] != 0).all()), error, "dense")


def test_two_dtypes_are_noticed(monkeypatch):
    attend = mdpo.forward.packed_attention._attend

    def wrong(q, k, v, *rest):
        return attend(q.float(), k, v, *rest)

    fails_on(monkeypatch, "_attend", wrong, RuntimeError, "same dtype", mdpo.forward.packed_attention)


def test_a_gradient_of_another_dtype_is_noticed(monkeypatch):
    gpu = FakeGpu()
    trainer = trainer_on(gpu, "Llama", torch.bfloat16)
    trainer.model.lm_head.weight.register_hook(lambda grad: grad.cpu())
    with pytest.raises((RuntimeError, AssertionError)):
        step(gpu, trainer, PackedCollator()(ROWS))
