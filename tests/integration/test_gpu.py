"""What only a GPU can show: kernels against attention by run, half precision packed against padded, compiled
modules and the head's float32 sums, and ln 2 where nothing is learned. `bash benchmarks/gpu_check.sh` runs them."""

import math

import pytest
import torch
from packed_pairs import AWKWARD, EVERYTHING, FAMILIES, Alone, batches, loss_and_gradients, tiny
from tiny import CHATML, agent_rows, tiny_llama, tokenizer_for
from trainers import trainer_of

import mdpo.forward.compiled_ops
import mdpo.forward.packed_attention
from dpo_trainer import DPOTrainer
from mdpo.config.schema import MDPOConfig
from mdpo.forward.collators import PackedCollator
from mdpo.forward.compiled_ops import fuse
from mdpo.forward.forest import Forest
from mdpo.forward.layout import Layout
from mdpo.forward.lm_head import adds_in_float32, plus_product
from mdpo.forward.packed_attention import packed_attention
from mdpo.forward.token_logps import enable_scoring, score_tokens
from mdpo.forward.varlen import flash_attn, kernels

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)


class OnGpu(Alone):
    device = GPU


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("size", [64, 128])
def test_kernels_equal_attention_by_run(window, softcap, size, monkeypatch):
    """Values and gradients, bfloat16 against float32 of the same numbers."""
    # A pair of prefix 130, two trees, a branch on a branch, then eight short branches of one prompt
    runs = [[200, -1], [95, 129], [30, 250], [40, -1], [64, -1], [300, -1], *([5, 692] for _ in range(8))]
    forest, generator = Forest(runs), torch.Generator().manual_seed(0)
    n = sum(forest.sizes)
    q, k, v = (torch.randn(1, heads, n, size, generator=generator).to(GPU, torch.bfloat16) for heads in (8, 2, 2))
    upstream = torch.randn(1, n, 8, size, generator=generator).to(GPU)

    def attended(dtype, kernel):
        monkeypatch.setattr(mdpo.forward.packed_attention, "_varlen", lambda *_: kernel)
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        options = {"forest": forest, "sliding_window": window, "softcap": softcap}
        out = packed_attention(torch.nn.Module(), *inputs, None, **options)[0]
        return [out, *torch.autograd.grad(out, inputs, upstream.to(dtype))]

    wanted = attended(torch.float32, None)
    found = kernels(GPU)
    assert "torch's varlen attention" in found and ("flash-attn" in found) == (flash_attn()[0] is not None)
    for name, kernel in found.items():
        if softcap is None or name == "flash-attn":
            for a, b in zip(attended(torch.bfloat16, kernel), wanted, strict=True):
                assert (a.float() - b).norm() <= 2e-2 * b.norm(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_and_padded_agree_in_bfloat16(family, capsys):
    model = tiny(family).to(GPU, torch.bfloat16)
    packed, padded = (batch.to(GPU) for batch in batches(EVERYTHING))
    assert Layout(OnGpu, 0).fit(model, packed) is packed, capsys.readouterr().out
    found, wanted = (score_tokens(model, batch).logps for batch in (packed, padded))
    assert (found - wanted).norm() <= 5e-2 * wanted.norm()


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Gemma3", "Qwen3"])
def test_compiled_modules_agree(family, monkeypatch):
    monkeypatch.setattr(mdpo.forward.compiled_ops, "MIN_WIDTH", 1)
    plain, model = (tiny(family).to(GPU) for _ in range(2))
    assert fuse(model, GPU) == (True, None)
    enable_scoring(model, fused=True)
    rows = PackedCollator()(AWKWARD["seven"]).to(GPU)
    (loss, _, found), (wanted_loss, _, wanted) = (score_and_gradients(m, rows) for m in (model, plain))
    assert (loss - wanted_loss).norm() <= 1e-4 * wanted_loss.norm()
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-6, name


def score_and_gradients(model, batch):
    with torch.device(GPU):
        return loss_and_gradients(model, batch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_sums_of_half_precision_products(dtype):
    assert adds_in_float32(GPU, dtype)
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(64, 256, generator=generator).to(GPU, dtype) for _ in range(8)]
    total, wanted = None, torch.zeros(256, 256, device=GPU, dtype=torch.float64)
    for part in parts:
        total = plus_product(total, part.T, part)
        wanted += part.double().T @ part.double()
    assert total.dtype == torch.float32 and (total.double() - wanted).norm() <= 1e-5 * wanted.norm()


def test_nothing_learned_is_ln_2_in_bfloat16(tmp_path):
    """Reference and policy are one model: in the step, and precomputed."""
    tokenizer = tokenizer_for(CHATML, "byte", eos="<|im_end|>")
    for ahead in (False, True):
        models = lambda: (tiny_llama(tokenizer, 0), tiny_llama(tokenizer, 0))  # noqa: E731
        options = {"config": MDPOConfig, "models": models, "bf16": True, "use_cpu": False, "learning_rate": 0.0}
        options |= {"precompute_ref_log_probs": ahead, "reference_cache_dir": str(tmp_path)}
        trainer = trainer_of(DPOTrainer, agent_rows(8), tmp_path, tokenizer, **options)
        trainer.train()
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        assert losses and all(abs(loss - math.log(2)) < 1e-3 for loss in losses)


def test_scoring_does_not_wait_for_the_gpu():
    """torch's own watch over synchronization, without the head's backward, which asks once where gradients are 0."""
    model = tiny("Llama").to(GPU, torch.bfloat16)
    batch = PackedCollator()(AWKWARD["seven"]).to(GPU)
    score_tokens(model, batch)  # kernels are probed
    torch.cuda.set_sync_debug_mode("error")
    try:
        score_tokens(model, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
