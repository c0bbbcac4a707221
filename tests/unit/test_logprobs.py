"""The chunked LM head against its slow twin and against hand-derived values: numbers and gradients."""

import math

import pytest
import torch
from errors import refused
from peft import LoraConfig, get_peft_model
from tiny import CHATML, tiny_llama, tokenizer_for
from torch._subclasses.fake_tensor import FakeTensorMode

import mdpo.forward.token_logps
from mdpo.forward.collators import PairCollator
from mdpo.forward.lm_head import adds_in_float32
from mdpo.forward.pair_logps import sum_by_pair, verbosity_weights
from mdpo.forward.token_logps import ChunkedLogProbs, HeadTransform, enable_scoring, full_log_probs, score_tokens
from mdpo.types import PairBatch

TRANSFORMS = {"plain": HeadTransform(), "scaled": HeadTransform(scale=0.25), "capped": HeadTransform(2.0, softcap=5.0)}


def head_inputs(s=13, h=8, v=31, seed=0, bias=True):
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator).requires_grad_()  # noqa: E731
    return make(s, h), make(v, h), make(v) if bias else None, torch.randint(0, v, (s,), generator=generator)


def test_two_tokens_by_hand():
    # Logits are W·h: [0, ln 3] for the first token and [ln 4, 0] for the second, so p = (1/4, 3/4) and (4/5, 1/5).
    hidden = torch.tensor([[math.log(3.0), 0.0], [0.0, math.log(4.0)]])
    weight = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    found = ChunkedLogProbs.apply(hidden, weight, None, torch.tensor([1, 1]), HeadTransform(), 1, True)
    logps, entropy, mean, top1, collision = found
    assert logps.tolist() == pytest.approx([math.log(3 / 4), math.log(1 / 5)], abs=1e-6)
    assert entropy.tolist() == pytest.approx(
        [-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)), -(0.8 * math.log(0.8) + 0.2 * math.log(0.2))], abs=1e-6
    )
    assert mean.tolist() == pytest.approx([math.log(3) / 2, math.log(4) / 2], abs=1e-6)
    assert top1.tolist() == [1.0, 0.0]
    assert collision.tolist() == pytest.approx([math.log(10 / 16), math.log(17 / 25)], abs=1e-6)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("chunk", [1, 4, 13, 100])
def test_chunks_equal_the_slow_twin_in_values_and_gradients(transform, bias, chunk):
    hidden, weight, b, target = head_inputs(bias=bias)
    upstream = torch.randn(13, generator=torch.Generator().manual_seed(1))
    slow = full_log_probs(hidden, weight, b, target, transform)
    wanted = torch.autograd.grad(slow, [x for x in (hidden, weight, b) if x is not None], upstream)
    fast = ChunkedLogProbs.apply(hidden, weight, b, target, transform, chunk)[0]
    got = torch.autograd.grad(fast, [x for x in (hidden, weight, b) if x is not None], upstream)
    torch.testing.assert_close(fast, slow, rtol=1e-6, atol=1e-6)
    for g, w in zip(got, wanted, strict=True):
        assert (g - w).norm() <= 1e-5 * w.norm()


@pytest.mark.parametrize("idle", [[0, 5, 6, 12], list(range(13))], ids=["some", "all"])
def test_tokens_without_gradient_are_left_out_of_backward(idle, monkeypatch):
    hidden, weight, b, target = head_inputs()
    upstream = torch.randn(13, generator=torch.Generator().manual_seed(1)).index_fill(0, torch.tensor(idle), 0.0)
    slow = full_log_probs(hidden, weight, b, target)
    wanted = torch.autograd.grad(slow, [hidden, weight, b], upstream)
    rows, derive = [], mdpo.forward.token_logps.logits_gradient
    monkeypatch.setattr(
        mdpo.forward.token_logps, "logits_gradient", lambda raw, *a: (rows.append(len(raw)), derive(raw, *a))[1]
    )
    fast = ChunkedLogProbs.apply(hidden, weight, b, target, HeadTransform(), 4)[0]
    got = torch.autograd.grad(fast, [hidden, weight, b], upstream)
    assert sum(rows) == 13 - len(idle)
    for g, w in zip(got, wanted, strict=True):
        assert (g - w).norm() <= 1e-5 * w.norm()


def test_twin_without_softcap_gradient_would_be_noticed():
    hidden, weight, _, target = head_inputs(bias=False)
    capped, plain = TRANSFORMS["capped"], HeadTransform(2.0)
    (right,) = torch.autograd.grad(full_log_probs(hidden, weight, None, target, capped).sum(), [hidden])
    (wrong,) = torch.autograd.grad(full_log_probs(hidden, weight, None, target, plain).sum(), [hidden])
    assert (right - wrong).norm() > 0.05 * right.norm()


def test_no_token_gives_a_differentiable_zero():
    hidden, weight, b, target = head_inputs(s=0)
    logps = ChunkedLogProbs.apply(hidden, weight, b, target, HeadTransform(), 4)[0]
    assert logps.shape == (0,)
    d_hidden, d_weight = torch.autograd.grad(logps.sum(), [hidden, weight])
    assert d_hidden.shape == (0, 8)
    assert torch.equal(d_weight, torch.zeros_like(weight))


def test_frozen_head_gets_no_gradient_and_hidden_states_still_do():
    hidden, weight, _, target = head_inputs(bias=False)
    frozen = weight.detach()
    ChunkedLogProbs.apply(hidden, frozen, None, target, HeadTransform(), 4)[0].sum().backward()
    wanted = torch.autograd.grad(full_log_probs(hidden, weight, None, target).sum(), [hidden])[0]
    torch.testing.assert_close(hidden.grad, wanted, rtol=1e-5, atol=1e-6)
    assert frozen.grad is None


def test_autocast_computes_in_bfloat16_and_reduces_in_float32():
    hidden, weight, _, target = head_inputs(bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        logps = ChunkedLogProbs.apply(hidden, weight, None, target, HeadTransform(), 4)[0]
        slow = full_log_probs(hidden, weight, None, target)
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps, slow, rtol=1e-6, atol=1e-6)
    logps.sum().backward()  # outside autocast, as in training
    exact = torch.autograd.grad(full_log_probs(hidden, weight, None, target).sum(), [weight])[0]
    assert 0 < (weight.grad - exact).norm() <= 2e-2 * exact.norm()


class _Config:
    model_type = "llama"


@pytest.mark.parametrize(
    ("fields", "scale", "softcap"),
    [
        ({}, 1.0, None),
        ({"logit_scale": 0.0625}, 0.0625, None),  # Cohere
        ({"logits_scaling": 8.0}, 0.125, None),  # Granite
        ({"final_logit_softcapping": 30.0}, 1.0, 30.0),  # Gemma-2
        ({"lm_head_multiplier": 0.5}, 0.5, None),  # Falcon-H1
    ],
)
def test_head_transform_of_configs(fields, scale, softcap):
    config = _Config()
    vars(config).update(fields)
    transform = HeadTransform.of(config)
    assert (transform.scale, transform.softcap) == (scale, softcap)


def tokenized(*pairs):
    names = ("chosen_ids", "chosen_mask", "rejected_ids", "rejected_mask")
    return [dict(zip(names, pair, strict=True), row=i) for i, pair in enumerate(pairs)]


def test_collator_by_hand():
    batch = PairCollator(pad_token_id=0)(tokenized(([7, 8, 9], [0, 0, 1], [7, 8], [0, 1])))
    assert batch["input_ids"].tolist() == [[7, 8, 9], [7, 8, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["completion_mask"].tolist() == [[0, 0, 1], [0, 1, 0]]
    assert batch["logp_position"].tolist() == [1, 3]
    assert batch["label"].tolist() == [9, 8]
    assert batch["pair"].tolist() == [0, 0]
    assert batch["side"].tolist() == [0, 1]


def test_collator_with_holes_two_pairs_and_multiple_of():
    rows = tokenized(([1, 2, 3, 4], [0, 1, 0, 1], [1, 5], [0, 1]), ([6, 7], [0, 1], [6, 8, 9], [0, 0, 1]))
    batch = PairCollator(pad_token_id=0, pad_to_multiple_of=8)(rows)
    assert batch["input_ids"].shape == (4, 8)
    # Rows: chosen 0, chosen 1, rejected 0, rejected 1; index = row · 8 + column of the predecessor.
    assert batch["logp_position"].tolist() == [0, 2, 8, 16, 25]
    assert batch["label"].tolist() == [2, 4, 7, 5, 9]
    assert batch["pair"].tolist() == [0, 0, 1, 0, 1]
    assert batch["side"].tolist() == [0, 0, 0, 1, 1]


def test_sums_by_pair_by_hand():
    batch = PairBatch(input_ids=torch.zeros(4, 9), pair=torch.tensor([0, 0, 1, 0]), side=torch.tensor([0, 0, 0, 1]))
    sums = sum_by_pair(torch.tensor([-1.0, -2.0, -4.0, -8.0]), batch)
    assert sums.chosen.tolist() == [-3.0, -4.0]
    assert sums.rejected.tolist() == [-8.0, 0.0]
    assert sums.chosen_tokens.tolist() == [2, 1]
    assert sums.rejected_tokens.tolist() == [1, 0]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_scores_equal_the_models_own_logits_in_values_and_gradients(tied):
    tokenizer = tokenizer_for(CHATML)
    model = tiny_llama(tokenizer, tie_word_embeddings=tied)
    rows = tokenized(([1, 20, 30, 40, 50], [0, 1, 0, 1, 1], [1, 20, 31], [0, 1, 1]), ([1, 9], [0, 1], [1, 8], [0, 1]))
    batch = PairCollator(tokenizer.pad_token_id)(rows)
    ids, mask = batch["input_ids"], batch["completion_mask"]
    logits = model(input_ids=ids, attention_mask=batch["attention_mask"]).logits[:, :-1].log_softmax(-1)
    own = logits.gather(2, ids[:, 1:, None]).squeeze(2)[mask[:, 1:].bool()]
    wanted = torch.autograd.grad(own.sum(), list(model.parameters()))
    names = list(model.state_dict())
    enable_scoring(model)
    scores = score_tokens(model, batch)
    got = torch.autograd.grad(scores.logps.sum(), list(model.parameters()))
    torch.testing.assert_close(scores.logps, own, rtol=1e-5, atol=1e-5)
    for g, w in zip(got, wanted, strict=True):
        assert (g - w).norm() <= 1e-5 * w.norm()
    assert list(model.state_dict()) == names
    plain = model(input_ids=ids).logits  # without logp_position it is the model that it was
    assert plain.shape == (*ids.shape, model.config.vocab_size)
    assert model.generate(input_ids=ids[:1], max_new_tokens=2, do_sample=False).shape[1] <= ids.shape[1] + 2


def test_head_is_called_once_whatever_the_count():
    tokenizer = tokenizer_for(CHATML)
    model = tiny_llama(tokenizer)
    enable_scoring(model)
    calls = []
    model.lm_head.register_forward_hook(lambda *a: calls.append(1))
    for mask in ([0, 1, 1, 1], [0, 0, 0, 0]):
        batch = PairCollator(0)(tokenized(([1, 2, 3, 4], mask, [1, 2, 3, 4], mask)))
        score_tokens(model, batch).logps.sum().backward()
    assert len(calls) == 2


def test_adapter_on_the_head_is_refused_before_training():
    model = get_peft_model(tiny_llama(tokenizer_for(CHATML)), LoraConfig(target_modules=["lm_head"]))
    with refused("lora_target_modules", "lm_head"):
        enable_scoring(model.get_base_model())


def test_turn_weights_and_verbosity_weights_by_hand():
    """Chosen has 4 supervised tokens, of which one has weight 0; rejected has 2: the shorter side counts 2."""
    batch = PairBatch(
        input_ids=torch.zeros(2, 9),
        pair=torch.tensor([0, 0, 0, 0, 0, 0]),
        side=torch.tensor([0, 0, 0, 0, 1, 1]),
        turn_weight=torch.tensor([1.0, 0.0, 0.5, 1.0, 1.0, 2.0]),
    )
    logps = torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0, -32.0])
    sums = sum_by_pair(logps, batch)
    assert (sums.chosen.item(), sums.rejected.item()) == (-1 - 2 - 8, -16 - 64)
    assert (sums.chosen_tokens.item(), sums.rejected_tokens.item()) == (3, 2)
    # Positions among tokens that count: 1, -, 2, 3 and 1, 2. The third of the chosen side is beyond the shorter one.
    weights = verbosity_weights(batch, alpha=0.25)
    assert weights[[0, 2, 3, 4, 5]].tolist() == [1.0, 1.0, 0.25, 1.0, 1.0]
    assert sum_by_pair(logps, batch, weights).chosen.item() == -1 - 2 - 2


# -------------------------------------------------------------------------- what only a GPU has, with stand-ins for it


def head_gradients(dtype, chunk=5):
    torch.manual_seed(0)
    hidden, weight = (torch.randn(shape).to(dtype).requires_grad_() for shape in ((64, 16), (31, 16)))
    target, upstream = torch.randint(0, 31, (64,)), torch.randn(64)
    logps = ChunkedLogProbs.apply(hidden, weight, None, target, HeadTransform(), chunk)[0]
    whole = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    truth = torch.autograd.grad(full_log_probs(*whole, None, target).double(), whole, upstream.double())
    return torch.autograd.grad(logps, [hidden, weight], upstream), truth


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_without_a_product_in_half_precision(dtype, monkeypatch):
    """The stand-ins have torch's signature; the weight's gradient over 13 chunks is nearer to float64's than with them
    rounded one by one."""
    errors, calls, mm, addmm = [], [], torch.mm, torch.addmm
    for gpu in (False, True):
        with monkeypatch.context() as patch:
            if gpu:

                def mm_into(a, b, *, out_dtype=None, out=None):
                    return mm(a, b, out=out) if out_dtype is None else a.to(out_dtype) @ b.to(out_dtype)

                def addmm_into(total, a, b, *, out_dtype=None, out=None):
                    if out_dtype is None:
                        return addmm(total, a, b, out=out)
                    assert out is total and total.dtype == out_dtype == torch.float32
                    calls.append(1)
                    return out.add_(a.to(out_dtype) @ b.to(out_dtype))

                patch.setattr("mdpo.forward.lm_head.adds_in_float32", lambda device, dtype: True)
                patch.setattr(torch, "mm", mm_into)
                patch.setattr(torch, "addmm", addmm_into)
            (_, found), (_, truth) = head_gradients(dtype)
            assert found.dtype == dtype
            errors.append(((found.double() - truth).norm() / truth.norm()).item())
    assert len(calls) == 12 and errors[1] < errors[0] < 2 * torch.finfo(dtype).eps


def test_torch_has_the_product_that_is_asked_for():
    """On fake tensors of a GPU: shapes and dtypes; this build of torch cannot fake its `out=`."""
    with FakeTensorMode():
        a, b = (torch.empty(shape, device="cuda", dtype=torch.bfloat16) for shape in ((6, 4), (4, 3)))
        total = torch.empty(6, 3, device="cuda")
        for found in (torch.mm(a, b, out_dtype=torch.float32), torch.addmm(total, a, b, out_dtype=torch.float32)):
            assert (found.shape, found.dtype, found.device.type) == ((6, 3), torch.float32, "cuda")
    assert "out_dtype" in str(torch.ops.aten.addmm.dtype_out._schema)
    assert not adds_in_float32(torch.device("cpu"), torch.bfloat16)


def test_chunks_are_larger_on_a_gpu():
    rows = [
        mdpo.forward.token_logps.CHUNK_BYTES.get(kind, mdpo.forward.token_logps.GPU_CHUNK_BYTES) // (4 * 152_000)
        for kind in ("cpu", "cuda")
    ]
    assert rows == [220, 883]
