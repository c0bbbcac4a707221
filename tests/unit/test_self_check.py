"""The self-check of the packed layout and of the head: what it lets pass in half precision, again and again, and each
wrong twin that it must not."""

import json

import pytest
import torch
import transformers
from errors import refused
from packed_pairs import AWKWARD, FAMILIES, WINDOW, Alone, not_causal, pair, tiny
from peft import LoraConfig, get_peft_model

import mdpo.forward.layout
import mdpo.forward.layout_check
import mdpo.forward.packed_attention
import mdpo.forward.varlen
from mdpo.config.parsing import ROOT
from mdpo.forward.collators import PackedCollator, PairCollator
from mdpo.forward.forest import Forest
from mdpo.forward.layout import Layout, head_disagreement
from mdpo.forward.layout_check import misplaced, plain_attention, shifted
from mdpo.forward.packed_attention import NAME
from mdpo.forward.token_logps import enable_scoring, score_tokens
from mdpo.types import SIDES

ROWS = AWKWARD["seven"][3:]  # the first two pairs are looked at: (12, 1, 9) and (6, 8, 1)
FORESTS = [AWKWARD[name] for name in ("8 answers, 16 pairs", "several sequences", "branches of branches")]
HALVES = [torch.bfloat16, torch.float16]


def kept(model, batch) -> bool:
    return Layout(Alone, 0).fit(model, batch).is_packed


@pytest.mark.parametrize("rows", FORESTS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma2"])
def test_forests_pass(family, dtype, rows, capsys):
    assert kept(tiny(family).to(dtype), PackedCollator()(rows)), capsys.readouterr().out


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("family", FAMILIES)
def test_families_pass_in_half_precision(family, dtype, capsys):
    model = tiny(family).to(dtype)
    assert kept(model, PackedCollator()(ROWS)), capsys.readouterr().out
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("peft", [False, True])
def test_under_autocast_and_adapters_too(implementation, peft):
    class Autocast(Alone):
        autocast = staticmethod(lambda: torch.autocast("cpu", torch.bfloat16))

    model = tiny("Llama")
    model.set_attn_implementation(implementation)
    enable_scoring(model)
    if peft:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "k_proj"], init_lora_weights=False))
    assert Layout(Autocast, 0).fit(model, PackedCollator()(ROWS)).is_packed


@pytest.mark.slow
def test_a_real_pair_passes_in_bfloat16(capsys):
    """SmolLM2-135M, whose log-probs of likely tokens are 3 to 5 % away from float32's: the noise of two padded batches
    sets the limit of the whole, what the layout changes has its own."""
    name = ROOT / "models/smollm2-135m-instruct"
    if not name.exists():
        pytest.skip("no SmolLM2-135M-Instruct under models/")
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16).eval()
    enable_scoring(model)
    lines = (ROOT / "recipes/smollm2-135m/data/train_short.jsonl").read_text(encoding="utf-8").splitlines()
    row = json.loads(lines[0])
    sides = [tokenizer.apply_chat_template(row[s], return_dict=True)["input_ids"][:48] for s in ("chosen", "rejected")]
    packed = {"row": 0}
    for side, ids in zip(("chosen", "rejected"), sides, strict=True):
        packed |= {f"{side}_ids": ids, f"{side}_mask": [0] * 20 + [1] * (len(ids) - 20)}
    assert kept(model, PackedCollator()([packed])), capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- wrong twins, bf16


def refused_by(model, batch, words, capsys):
    assert not kept(model, batch)
    assert words in capsys.readouterr().out


def test_a_boundary_that_attention_has_moved_by_a_token(monkeypatch, capsys):
    """Long sides: of 200 tokens in each one sees one key too many, which no norm of log-probs in bfloat16 shows."""
    rows = [pair(60, 140, 150, supervised_from=180)]
    model, batch = tiny("Llama").bfloat16(), PackedCollator()(rows)
    assert kept(model, batch)
    attend = mdpo.forward.packed_attention.packed_attention

    def moved(*args, forest=None, **kwargs):
        (chosen, rejected), (_, parent) = forest.sizes, forest.parents
        return attend(*args, forest=Forest([[chosen + 1, -1], [rejected - 1, parent]]), **kwargs)

    monkeypatch.setitem(mdpo.forward.packed_attention.ALL_ATTENTION_FUNCTIONS, NAME, moved)
    refused_by(tiny("Llama").bfloat16(), batch, "its packed attention differs by", capsys)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_boundary_that_the_batch_has_moved_by_a_token(dtype, capsys):
    batch = PackedCollator()([pair(60, 140, 150)])
    refused_by(
        tiny("Llama").to(dtype), batch | {"runs": [[201, -1], [149, 59]]}, "positions are not those of its", capsys
    )


@pytest.mark.parametrize("rows", FORESTS)
def test_an_ancestor_that_attention_leaves_out(rows, monkeypatch, capsys):
    """The last run that has two or more hangs one token higher."""
    attend = mdpo.forward.packed_attention.packed_attention

    def higher(*args, forest=None, **kwargs):
        runs = [list(run) for run in zip(forest.sizes, forest.parents, strict=True)]
        last = max(run for run, before in enumerate(forest.before) if before > 1)
        runs[last][1] = int(forest.path(runs[last][1])[-2])
        return attend(*args, forest=Forest(runs), **kwargs)

    monkeypatch.setitem(mdpo.forward.packed_attention.ALL_ATTENTION_FUNCTIONS, NAME, higher)
    refused_by(tiny("Llama").bfloat16(), PackedCollator()(rows), "its packed attention differs by", capsys)


def test_positions_that_are_continued(capsys):
    batch = PackedCollator()(ROWS)
    wrong = batch | {"position_ids": torch.arange(batch["input_ids"].size(1))[None]}
    assert misplaced(wrong) and not misplaced(batch)
    refused_by(tiny("Llama").bfloat16(), wrong, "positions are not those of its", capsys)


def test_a_model_that_makes_its_own_positions(capsys):
    """The batch's are right, and the model does not look at them."""
    model = tiny("Llama").bfloat16()
    rotary = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda x, position_ids: rotary(x, torch.arange(x.size(1))[None])
    refused_by(model, PackedCollator()(ROWS), "a token's query or key differs by", capsys)


@pytest.mark.parametrize("family", ["Mistral", "Gemma2"])
def test_a_window_that_is_ignored(family, monkeypatch, capsys):
    model, batch = tiny(family).bfloat16(), PackedCollator()(ROWS)
    assert kept(model, batch)
    mask = Forest.mask
    monkeypatch.setattr(Forest, "mask", lambda self, sizes, before, window, like: mask(self, sizes, before, None, like))
    refused_by(tiny(family).bfloat16(), batch, "its packed attention differs by", capsys)


def test_a_soft_cap_that_is_ignored(monkeypatch, capsys):
    attend = mdpo.forward.packed_attention.packed_attention
    monkeypatch.setitem(
        mdpo.forward.packed_attention.ALL_ATTENTION_FUNCTIONS, NAME, lambda *a, softcap=None, **k: attend(*a, **k)
    )  # fmt: skip
    refused_by(tiny("Gemma2").bfloat16(), PackedCollator()(ROWS), "its packed attention differs by", capsys)


def test_a_kernel_that_is_wrong_in_half_precision_alone(monkeypatch, capsys):
    def transposed(query, key, value, forest, scaling, window, softcap, dropout):
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(query, key, value, is_causal=True, scale=scaling, enable_gqa=True).transpose(1, 2)

    monkeypatch.setattr(
        mdpo.forward.packed_attention, "_varlen", lambda query, *_: transposed if query.dtype != torch.float32 else None
    )
    refused_by(tiny("Llama").bfloat16(), PackedCollator()(ROWS), "its packed attention differs by", capsys)


# ------------------------------------------------------------------------------- whatever goes wrong in the self-check

NEMOTRON = {"head_dim": 8}


def test_attention_that_takes_no_keywords_is_one_line(capsys):
    """Nemotron's layers hand none on to attention."""
    model, batch = tiny("Nemotron", **NEMOTRON), PackedCollator()(ROWS)
    fitted = Layout(Alone, 0).fit(model, batch)
    assert not fitted.is_packed
    line = "shared_prefix: off for NemotronForCausalLM: its layers hand no keywords on to attention.\n"
    assert capsys.readouterr().out == line
    assert torch.isfinite(score_tokens(model, fitted).logps).all()
    with refused("shared_prefix", "NemotronAttention", "no keywords", "shared_prefix: false"):
        score_tokens(model, batch)


@pytest.mark.parametrize("error", [TypeError("no"), RuntimeError("shapes"), KeyError("layer"), AssertionError()])
def test_any_exception_is_one_line(error, monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise error

    monkeypatch.setitem(mdpo.forward.packed_attention.ALL_ATTENTION_FUNCTIONS, NAME, broken)
    refused_by(tiny("Llama"), PackedCollator()(ROWS), f"{type(error).__name__}", capsys)
    assert mdpo.forward.packed_attention._refusals is None
    assert "get_interface" not in vars(mdpo.forward.packed_attention.ALL_ATTENTION_FUNCTIONS)


def test_memory_that_runs_out_is_not_a_difference(monkeypatch):
    def broken(*args, **kwargs):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setitem(mdpo.forward.packed_attention.ALL_ATTENTION_FUNCTIONS, NAME, broken)
    with pytest.raises(torch.OutOfMemoryError):
        kept(tiny("Llama"), PackedCollator()(ROWS))


def test_every_rank_makes_the_same_calls_whatever_it_finds():
    """A rank whose batch is wrong calls the model as often as one whose batch is right."""
    counts = []
    right = PackedCollator()(ROWS)
    for batch in (right, right | {"position_ids": right["position_ids"] + 1}):
        model, calls = tiny("Llama"), []
        model.model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        kept(model, batch)
        counts.append(len(calls))
    assert counts == [4, 4]  # the head's, padded, padded again, packed


# ------------------------------------------------------------------------------------------------------------ its parts


def test_a_shifted_batch_has_the_same_log_probs():
    batch = PairCollator(0)(ROWS)
    moved = shifted(batch, 0)
    assert moved["input_ids"].shape[1] == batch["input_ids"].shape[1] + 3
    model = tiny("Llama")
    torch.testing.assert_close(score_tokens(model, moved).logps, score_tokens(model, batch).logps)


@pytest.mark.parametrize("window", [None, 300])
def test_plain_attention_in_parts_is_attention(window):
    """700 tokens are three parts; torch's own attention beside it."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 700, 8) for heads in (4, 2, 2))
    behind = torch.arange(700)[:, None] - torch.arange(700)
    seen = (behind >= 0) & (behind < (window or 700))
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    found = plain_attention(q, k, v, {"sliding_window": window})
    assert torch.allclose(found.transpose(1, 2), wanted, atol=1e-5)


def test_the_check_does_not_care_about_tensorfloat32():
    """`tf32: true` sets torch's newer switch, beside which the older one cannot be read."""
    before = torch.backends.fp32_precision
    torch.backends.fp32_precision = "tf32"
    try:
        with mdpo.forward.layout_check._float32(torch.device("cpu")):
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.fp32_precision = before


def test_plain_attention_by_hand():
    """Two tokens, scores 0: the second sees both, or with a window of 1 itself."""
    q = k = torch.zeros(1, 1, 2, 1)
    v = torch.tensor([[[[1.0], [3.0]]]])
    assert plain_attention(q, k, v, {}).flatten().tolist() == [1.0, 2.0]
    assert plain_attention(q, k, v, {"sliding_window": 1}).flatten().tolist() == [1.0, 3.0]


@pytest.mark.parametrize("family", ["Mistral", "Gemma2", "Llama"])
def test_the_plain_twin_serves_where_own_attention_has_no_float32(family, monkeypatch, capsys):
    """flash-attn's: ours is then compared with plain attention, which knows windows and caps."""
    monkeypatch.setattr("mdpo.forward.layout_check.IN_FLOAT32", ())
    assert kept(tiny(family).bfloat16(), PackedCollator()(ROWS)), capsys.readouterr().out
    monkeypatch.setattr(Forest, "mask", not_causal)
    refused_by(tiny(family).bfloat16(), PackedCollator()(ROWS), "its packed attention differs by", capsys)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_the_heads_limit_is_what_rounding_its_logits_explains(dtype):
    """Logits near 100 move by 0.25 in bfloat16: no difference. Half of each logit is one, and 1 % in float32."""
    generator = torch.Generator().manual_seed(0)
    logits, target = 100 + 5 * torch.randn(64, 500, generator=generator), torch.arange(64)
    ours = logits.log_softmax(-1)[target, target]
    assert head_disagreement(ours, logits.to(dtype).float(), target, dtype) is None
    centered = logits - 100
    ours = centered.log_softmax(-1)[target, target]
    assert head_disagreement(ours, centered / 2, target, dtype)
    assert (head_disagreement(ours, centered * 1.01, target, dtype) is None) == (dtype == torch.bfloat16)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_head_that_does_more_is_an_error_in_half_precision_too(dtype):
    class Halved(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            outputs.logits = outputs.logits / 2
            return outputs

    model = Halved(tiny("Llama").config).eval().to(dtype)
    enable_scoring(model)
    with refused("LM head", "Halved"):
        kept(model, PackedCollator()(ROWS))


def test_windows_are_within_reach():
    """Else the tests above would show nothing."""
    assert WINDOW["sliding_window"] < min(len(row[f"{side}_ids"]) for row in ROWS[:2] for side in SIDES)
