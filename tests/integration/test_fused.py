"""Compiled norms, activations and the head's softmax against their slow twins; what happens where they cannot be."""

import types
import weakref

import pytest
import torch
from errors import refused
from packed_pairs import AWKWARD, batches, loss_and_gradients, tiny
from peft import LoraConfig, get_peft_model
from tiny import CHATML, agent_rows, tiny_llama, tokenizer_for
from torch import nn
from trainers import trainer_of
from trl import DPOConfig

import mdpo.forward.compiled_ops
from dpo_trainer import DPOTrainer
from mdpo.config.schema import MDPOConfig
from mdpo.config.validation import check_options
from mdpo.forward.collators import PackedCollator
from mdpo.forward.compiled_ops import VARIANTS, agrees, by_rows, compiled, fuse, is_gated, is_norm
from mdpo.forward.token_logps import (
    ChunkedLogProbs,
    HeadTransform,
    chunk_statistics,
    enable_scoring,
    full_log_probs,
    score_tokens,
)

CPU = torch.device("cpu")


@pytest.fixture
def any_width(monkeypatch):
    monkeypatch.setattr(mdpo.forward.compiled_ops, "MIN_WIDTH", 1)


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Qwen3", "Mixtral"])
def test_a_fused_model_gives_the_same_loss_and_gradients(family, any_width):
    """Gemma's norm adds 1 to its weight and its activation is a GELU; Mixtral's experts stay as they are."""
    plain, model = tiny(family), tiny(family)
    assert fuse(model, CPU) == (True, None)
    enable_scoring(model, fused=True)
    batch = PackedCollator()(AWKWARD["seven"])
    (loss, scores, gradients), (wanted, plain_scores, wanted_gradients) = (
        loss_and_gradients(m, batch) for m in (model, plain)
    )
    for got, value in ((loss, wanted), *((scores[k], plain_scores[k]) for k in ("logps", "entropy", "mean_logit"))):
        assert (got - value).norm() <= 1e-5 * value.norm()
    for name, gradient in wanted_gradients.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name
    swapped = [type(m).__name__ for m in model.modules() if "forward" in vars(m) and m is not model]
    assert sum(name.endswith("RMSNorm") for name in swapped) >= 5
    assert sum(name.endswith("MLP") for name in swapped) == (0 if family == "Mixtral" else 2)
    assert list(model.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("transform", [HeadTransform(), HeadTransform(0.25), HeadTransform(2.0, softcap=5.0)])
@pytest.mark.parametrize("collision", [True, False])
def test_compiled_head_equals_the_plain_one_and_the_slow_twin(transform, collision):
    torch.manual_seed(0)
    hidden, weight = torch.randn(13, 8, requires_grad=True), torch.randn(31, 8, requires_grad=True)
    target, upstream = torch.randint(0, 31, (13,)), torch.randn(13)
    plain, fused = (
        ChunkedLogProbs.apply(hidden, weight, None, target, transform, 5, collision, on) for on in (False, True)
    )
    for a, b in zip(plain, fused, strict=True):
        assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(full_log_probs(hidden, weight, None, target, transform), [hidden, weight], upstream)
    for logps, *_ in (plain, fused):
        for g, w in zip(torch.autograd.grad(logps, [hidden, weight], upstream), wanted, strict=True):
            assert (g - w).norm() <= 1e-5 * w.norm()


def test_statistics_of_a_certain_token_are_finite():
    """Logits of ±1000: one token has all the mass."""
    raw = torch.tensor([[1000.0, -1000.0, 0.0]])
    found = chunk_statistics(raw, torch.tensor([0]), 1.0, None, True)[:, 0].tolist()
    assert found == pytest.approx([0.0, 1000.0, 0.0, 0.0, 1.0, 0.0])


def test_small_models_stay_as_they_are():
    model = tiny("Llama")
    assert fuse(model, CPU) == (False, None)
    assert not any("forward" in vars(m) for m in model.model.modules())


class Halved(nn.Module):
    """Looks like a gated MLP and is none."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(32, 48, bias=False), nn.Linear(32, 48, bias=False)
        self.down_proj, self.act_fn = nn.Linear(48, 32, bias=False), nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) / 2


def test_a_module_that_computes_something_else_keeps_its_own_forward(any_width):
    assert is_gated(Halved()) and not agrees(Halved(), mdpo.forward.compiled_ops._gated_forward, CPU)
    model = tiny("Llama")
    model.model.layers[0].mlp = Halved()
    done, line = fuse(model, CPU)
    assert not done and line == "fused_ops: off for Halved: compiled, it does not give the same numbers."
    assert "forward" not in vars(model.model.layers[0].mlp)


def test_a_norm_that_gives_other_numbers_is_noticed():
    norm = tiny("Llama").model.norm
    assert is_norm(norm) and agrees(norm, compiled(type(norm).forward), CPU)
    assert not agrees(norm, lambda self, x: type(self).forward(self, x) * 1.001, CPU)


@pytest.fixture
def fresh():
    """Nothing compiled before is met."""

    def forget():
        torch._dynamo.reset()
        for made in (compiled, mdpo.forward.compiled_ops._norm, mdpo.forward.compiled_ops._gate):
            made.cache_clear()

    forget()
    yield
    forget()


@pytest.mark.parametrize(("family", "name"), [("Llama", "LlamaMLP"), ("GPTNeoX", "the LM head")])
def test_no_compiler_is_one_line(family, name, any_width, fresh, monkeypatch):
    """GPT-NeoX has neither RMS norms nor gated MLPs: its head is compiled, and looked at all the same."""

    def broken(function, **options):
        def call(*args):
            raise RuntimeError("no C++ compiler found\nand much more")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    assert fuse(tiny(family), CPU) == (False, f"fused_ops: off for {name}: no C++ compiler found")


def test_a_switched_off_compiler_is_one_line(any_width):
    with torch._dynamo.config.patch(disable=True):
        done, line = fuse(tiny("Llama"), CPU)
    assert not done and "TORCHDYNAMO_DISABLE" in line


def test_where_one_kind_cannot_be_compiled_none_is(any_width):
    model = tiny("Llama")
    model.model.layers[1].mlp = Halved()
    assert not fuse(model, CPU)[0]
    assert not any("forward" in vars(m) for m in model.model.modules())


def test_where_one_rank_cannot_compile_none_does(any_width, tmp_path, monkeypatch):
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        assert mdpo.forward.compiled_ops._on_all_ranks(True, CPU) and not mdpo.forward.compiled_ops._on_all_ranks(
            False, CPU
        )
        assert fuse(tiny("Llama"), CPU) == (True, None)
        monkeypatch.setattr(dist, "all_reduce", lambda found, op: found.zero_())
        model = tiny("Llama")
        assert fuse(model, CPU) == (False, "fused_ops: off: another rank cannot compile.")
        assert not any("forward" in vars(m) for m in model.model.modules())
        assert fuse(model, CPU, together=False) == (True, None)
    finally:
        dist.destroy_process_group()


class Quantized(nn.Linear):
    """A 4-bit layer as bitsandbytes keeps it: bytes in a column, two weights each."""

    def __init__(self, width, out):
        super().__init__(width, out, bias=False)
        self.weight = nn.Parameter(torch.zeros(width * out // 2, 1, dtype=torch.uint8), requires_grad=False)
        torch.manual_seed(0)
        self.whole = torch.randn(out, width) / 5

    def forward(self, x):
        return nn.functional.linear(x, self.whole)


def test_quantized_projections_are_looked_at_in_the_models_dtype(any_width):
    plain, model = tiny("Llama"), tiny("Llama")
    for one in (plain, model):
        for layer in one.model.layers:
            mlp = layer.mlp
            mlp.gate_proj, mlp.up_proj, mlp.down_proj = Quantized(32, 48), Quantized(32, 48), Quantized(48, 32)
    assert fuse(model, CPU) == (True, None)
    assert "forward" in vars(model.model.layers[0].mlp)
    batch = PackedCollator()(AWKWARD["seven"])
    wanted = score_tokens(plain, batch).logps
    assert (score_tokens(model, batch).logps - wanted).norm() <= 1e-5 * wanted.norm()


def everything_once(family):
    """A training step's ways to call a model: packed, padded, one pair; with and without gradients; checkpointing."""
    model = tiny(family)
    assert fuse(model, CPU) == (True, None)
    enable_scoring(model, fused=True)
    for checkpointing in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs=checkpointing)
            model.enable_input_require_grads()
        for batch in (*batches(AWKWARD["seven"]), PackedCollator()(AWKWARD["one"])):
            score_tokens(model.train(), batch).logps.sum().backward()
            with torch.no_grad():
                score_tokens(model.eval(), batch)
    return type(model.model.norm)


COMPILED = ["Llama", "Gemma3", "Qwen3", *(pytest.param(f, marks=pytest.mark.slow) for f in ("Gemma", "Gemma2"))]


@pytest.mark.parametrize("family", COMPILED)
def test_no_function_of_a_training_step_runs_uncompiled(family, any_width, fresh, capsys):
    """Qwen3's norms saw 13 kinds of input, 8 is torch's own limit; by rows they see 6."""
    norm = everything_once(family)
    assert capsys.readouterr().out == ""
    assert not torch._dynamo.utils.counters["graph_break"]
    found = torch._C._dynamo.eval_frame._debug_get_cache_entry_list(norm.forward.__code__)
    assert 2 <= len(found) <= 8 < VARIANTS


def test_a_limit_that_is_met_is_said_and_changes_no_number(any_width, fresh, monkeypatch, capsys):
    monkeypatch.setattr(mdpo.forward.compiled_ops, "VARIANTS", 3)
    norm = everything_once("Qwen3")
    line = f"fused_ops: {norm.__name__}.forward met more than 3 kinds of input; it now runs uncompiled.\n"
    assert capsys.readouterr().out.count(line) == 1


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2)])
def test_by_rows_keeps_shape_and_layout(order):
    """Of heads transposed before their norm (Gemma-3) nothing is copied."""
    x = torch.arange(24.0).view(2, 3, 4).permute(*order)
    seen = []
    out = by_rows(lambda rows: (seen.append(rows), rows * 2)[1], x)
    assert torch.equal(out, x * 2) and out.stride() == x.stride()
    assert seen[0].shape == (6, 4) and seen[0].data_ptr() == x.data_ptr() and seen[0].is_contiguous()


def test_weights_that_zero3_has_partitioned_are_looked_at_by_their_whole_shape():
    norm = tiny("Llama").model.norm
    norm.weight = nn.Parameter(torch.empty(0))
    norm.weight.ds_shape = torch.Size([32])
    assert agrees(norm, compiled(type(norm).forward), CPU)
    assert norm.weight.numel() == 0 and not isinstance(norm.forward, types.FunctionType)


def test_the_product_of_a_gated_mlp_is_not_kept_for_backward(any_width, monkeypatch):
    """It is gone when forward has ended, and backward, with LoRA's adapter too, computes the same gradients without."""
    products = []

    def watched(activation):
        def product(gate, up):
            out = torch.nn.functional.silu(gate) * up
            products.append(weakref.ref(out))
            return out

        return product

    monkeypatch.setattr(mdpo.forward.compiled_ops, "_gate", watched)
    lora = LoraConfig(r=4, target_modules=["down_proj"], init_lora_weights=False)
    for adapted in (False, True):
        plain, model = tiny("Llama"), tiny("Llama")
        assert fuse(model, CPU) == (True, None)
        if adapted:
            torch.manual_seed(1)
            model = get_peft_model(model, lora)
            torch.manual_seed(1)
            plain = get_peft_model(plain, lora)
        products.clear()
        batch = PackedCollator()(AWKWARD["seven"])
        scores = score_tokens(model, batch)
        assert len(products) == 2 and all(p() is None for p in products)
        scores.logps.sum().backward()
        assert len(products) >= 4  # computed again
        score_tokens(plain, batch).logps.sum().backward()
        for got, wanted in zip(model.parameters(), plain.parameters(), strict=True):
            assert (got.grad is None) == (wanted.grad is None)
            assert got.grad is None or (got.grad - wanted.grad).norm() <= 1e-5 * wanted.grad.norm() + 1e-9


@pytest.mark.parametrize("peft", [False, True])
def test_the_key_switches_policy_and_reference(peft, any_width, tmp_path):
    tokenizer = tokenizer_for(CHATML, "byte", eos="<|im_end|>")
    losses = []
    for on in (True, False):
        lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM") if peft else None
        models = lambda: (tiny_llama(tokenizer, 0), None if peft else tiny_llama(tokenizer, 1))  # noqa: E731
        options = {"config": MDPOConfig, "models": models, "peft_config": lora, "fused_ops": on}
        trainer = trainer_of(DPOTrainer, agent_rows(8), tmp_path, tokenizer, gradient_checkpointing=True, **options)
        for model in [trainer.model, *([] if peft else [trainer.ref_model])]:
            swapped = [m for m in model.modules() if type(m).__name__ in ("LlamaRMSNorm", "LlamaMLP")]
            assert len(swapped) == 7 and all(("forward" in vars(m)) == on for m in swapped)
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_non_reentrant_checkpointing_keeps_no_activation_of_a_gated_mlp(any_width, monkeypatch):
    """Its own hooks drop what backward needs; hooks of ours on top of them would hold each layer's gate."""
    model, alive = tiny("Llama"), []
    make = mdpo.forward.compiled_ops._gate

    def watched(activation):
        product = make(activation)
        return lambda gate, up: (alive.append(weakref.ref(gate)), product(gate, up))[1]

    monkeypatch.setattr(mdpo.forward.compiled_ops, "_gate", watched)
    assert fuse(model, CPU) == (True, None)
    model.train()
    batch = PackedCollator()(AWKWARD["seven"])
    held = []
    for kwargs in ({"use_reentrant": False}, None):
        if kwargs:
            model.gradient_checkpointing_enable(kwargs)
        else:
            model.gradient_checkpointing_disable()
        alive.clear()
        scores = score_tokens(model, batch)
        held.append([gate() is not None for gate in alive])
        scores.logps.sum().backward()
    assert held == [[False, False], [True, True]]


@pytest.mark.parametrize("config", [DPOConfig, MDPOConfig])
def test_a_model_compiled_by_the_launcher_is_refused_by_name(config, tmp_path, monkeypatch):
    args = config(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")  # as `accelerate launch` sets it
    check_options(args)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with refused("dynamo_backend", "inductor", "not supported"):
        check_options(args)
