"""The packed layout against the padded one, its slow twin: lists by hand, log-probs, loss and gradients on eleven
architectures and awkward lengths. Wrong twins (a boundary removed, positions continued) must differ."""

import types
from collections import Counter

import pytest
import torch
import transformers
from errors import refused
from packed_pairs import (
    AWKWARD,
    EVERYTHING,
    EXPERTS,
    FAMILIES,
    SIZES,
    WINDOW,
    Alone,
    batches,
    loss_and_gradients,
    not_causal,
    pair,
    sequences,
    tiny,
)
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny import CHATML, tokenizer_for
from torch.utils._python_dispatch import TorchDispatchMode
from varlen_stand_ins import flash_stand_in, torch_stand_in

import mdpo.forward.packed_attention
import mdpo.forward.token_logps
import mdpo.forward.varlen
from mdpo.forward.collators import PackedCollator, PairCollator, first_pairs, unpacked
from mdpo.forward.forest import Forest
from mdpo.forward.layout import Layout, disagreement, packing_refused
from mdpo.forward.packed_attention import NAME
from mdpo.forward.pair_logps import sum_by_pair
from mdpo.forward.token_logps import enable_scoring, score_tokens
from mdpo.loss.registry import LossSettings, PairTerms, pair_losses
from mdpo.types import distinct_tokens, sequence_lengths, split


def compare(model, rows, aux_loss=False):
    packed, padded = (loss_and_gradients(model, batch, aux_loss) for batch in batches(rows))
    for name in ("logps", "entropy", "mean_logit", "top1"):
        close(packed[1][name], padded[1][name], name)
    close(packed[0], padded[0], "loss")
    assert set(packed[2]) == set(padded[2])
    largest = max(g.norm() for g in padded[2].values())
    assert largest > 1e-3
    for name, wanted in padded[2].items():  # sums that cancel, such as a key's bias, have no digits of their own
        assert (packed[2][name] - wanted).norm() <= 1e-5 * max(wanted.norm(), 1e-2 * largest), name


def close(got, wanted, name):
    assert (got - wanted).norm() <= 1e-5 * wanted.norm() + 1e-12, name


# ------------------------------------------------------------------------------------------------------------ by hand


def test_packed_row_by_hand():
    """The example of PackedCollator's docstring."""
    row = {
        "chosen_ids": [5, 6, 7, 8],
        "chosen_mask": [0, 1, 1, 1],
        "rejected_ids": [5, 6, 9],
        "rejected_mask": [0, 1, 1],
    }
    batch = PackedCollator()([{**row, "row": 3}])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 2]]
    assert (batch["runs"], batch["ends"]) == ([[4, -1], [1, 1]], [3, 4])
    assert (batch["lengths"], batch["sequences"]) == ([4, 3], [1, 1])
    assert batch["logp_position"].tolist() == [0, 1, 2, 1]
    assert batch["label"].tolist() == [6, 7, 8, 9]
    assert batch["unique_index"].tolist() == [0, 1, 2, 0, 3]
    assert batch["pair"].tolist() == [0] * 5
    assert batch["side"].tolist() == [0, 0, 0, 1, 1]
    assert batch["sequence"].tolist() == [0, 0, 0, 1, 1]
    assert batch["sequence_position"].tolist() == [0, 1, 2, 0, 1]
    assert (batch.n_pairs, batch.n_tokens, batch.n_distinct, batch["row"].tolist()) == (1, 7, 5, [3])


def test_two_pairs_by_hand():
    """The second pair has no prefix; its rejected side begins after its chosen side."""
    first = {"chosen_ids": [5, 6], "chosen_mask": [0, 1], "rejected_ids": [5, 7], "rejected_mask": [0, 1]}
    second = {"chosen_ids": [1, 2], "chosen_mask": [0, 1], "rejected_ids": [3, 4, 2], "rejected_mask": [0, 0, 1]}
    batch = PackedCollator()([first, second])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 1, 2, 3, 4, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 1, 0, 1, 0, 1, 2]]
    assert (batch["runs"], batch["ends"]) == ([[2, -1], [1, 0], [2, -1], [3, -1]], [1, 4, 2, 7])
    # chosen 0: 6 from place 0; chosen 1: 2 from place 3; rejected 0: 7 from place 0 again; rejected 1: 2 from place 6
    assert batch["logp_position"].tolist() == [0, 3, 0, 6]
    assert batch["label"].tolist() == [6, 2, 7, 2]
    assert batch["unique_index"].tolist() == [0, 1, 2, 3]
    assert batch["pair"].tolist() == [0, 1, 0, 1]
    forest = Forest(batch["runs"], batch["ends"])
    assert forest.sizes == [2, 1, 2, 3] and forest.key_sizes == [2, 2, 2, 3]
    assert [keys.tolist() for keys in forest.keys] == [[0, 1], [0, 2], [3, 4], [5, 6, 7]]
    assert forest.counts.tolist() == [[2, 1, 1, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize("name", AWKWARD)
def test_unpacked_is_the_padded_layout(name):
    packed, padded = batches(AWKWARD[name])
    back = unpacked(packed, 0)
    assert set(back) == set(padded) - {"completion_mask"}
    for key, value in back.items():
        assert torch.equal(value, padded[key]) if isinstance(value, torch.Tensor) else value == padded[key], key
    assert packed.n_tokens == padded.n_tokens == int(padded["attention_mask"].sum()) == sum(padded["lengths"])
    assert packed.n_distinct == sum(size for size, _ in packed["runs"])
    assert packed.n_distinct == distinct_tokens(ids for ids, _ in sequences(AWKWARD[name]))


def cut(row: dict, tokens: int) -> dict:
    """A row whose sequences end after so many tokens."""
    row = dict(row)
    for side in ("chosen", "rejected"):
        lengths = sequence_lengths(row, side)
        for name in ("ids", "mask"):
            parts = split(row[f"{side}_{name}"], lengths)
            row[f"{side}_{name}"] = [x for part in parts for x in part[:tokens]]
        row[f"{side}_lengths"] = [min(length, tokens) for length in lengths]
    return row


@pytest.mark.parametrize("tokens", [1, 4, 11, 100])
@pytest.mark.parametrize("name", [name for name in AWKWARD if len(AWKWARD[name]) > 2])
def test_first_pairs_are_the_batch_of_the_first_rows(name, tokens):
    rows = AWKWARD[name]
    wanted = PackedCollator()([cut(row, tokens) for row in rows[:2]])
    found = first_pairs(PackedCollator()(rows), 2, tokens)
    assert set(found) == set(wanted) - {"row", "turn", "turn_tokens"}
    for key, value in found.items():
        assert torch.equal(value, wanted[key]) if isinstance(value, torch.Tensor) else value == wanted[key], key


def test_weights_references_and_margins_reach_both_layouts():
    rows = [{**p, "margin": 0.5 * i, **{f"{side}_weights": [0.5 * (t % 3) for t in range(len(p[f"{side}_ids"]))]
                                        for side in ("chosen", "rejected")}}
            for i, p in enumerate(AWKWARD["seven"])]  # fmt: skip
    for row in rows:
        for side in ("chosen", "rejected"):
            row[f"reference_{side}_logps"] = [-float(t) for t in range(sum(row[f"{side}_mask"]))]
    packed, padded = batches(rows)
    for key in ("turn_weight", "reference_logp", "pair", "side", "margin", "row"):
        assert torch.equal(packed[key], padded[key]), key


def test_padded_rows_are_sequences():
    """Chosen of two sequences, 1 2 3 and 1 4; the ones at their starts have no predecessor."""
    batch = PairCollator(0)([{
        "chosen_ids": [1, 2, 3, 1, 4], "chosen_mask": [0, 0, 1, 1, 1], "chosen_lengths": [3, 2],
        "rejected_ids": [1, 2], "rejected_mask": [1, 1], "rejected_lengths": None,
    }])  # fmt: skip
    assert batch.input_ids.tolist() == [[1, 2, 3], [1, 4, 0], [1, 2, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0], [1, 1, 0]]
    assert batch.logp_position.tolist() == [1, 3, 6] and batch.label.tolist() == [3, 4, 2]
    assert batch.pair.tolist() == [0, 0, 0] and batch.side.tolist() == [0, 0, 1]
    assert (batch.lengths, batch.sequences, batch.n_pairs, batch.pair_lengths) == ([3, 2, 2], [2, 1], 1, [7])


# ------------------------------------------------------------------------------------------- packed = padded, by family


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    model = tiny(family)
    compare(model, EVERYTHING)
    assert model.config._attn_implementation == "eager"  # the padded batch came last


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_lengths(name):
    compare(tiny("Llama"), AWKWARD[name])


class Calls(TorchDispatchMode):
    """Counts calls of kernels that attention may take."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.found[name.removesuffix("_for_cpu")] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("runs", "calls"),
    [
        # Chosen's keys are a view; of rejected's 20 keys the first 15 are copied before its own.
        ([[30, -1], [5, 14]], {"cat": 3, "_scaled_dot_product_flash_attention": 2}),
        # Rejected's own part is the longer one: queries in its ancestors' place, no mask.
        ([[30, -1], [20, 4]], {"cat": 3, "_scaled_dot_product_flash_attention": 2, "constant_pad_nd": 1}),
        # Eight short answers of one prompt: the first one's run, and one call for seven.
        ([[103, -1]] + [[3, 99]] * 7, {"cat": 3, "_scaled_dot_product_flash_attention": 2}),
        # Eight long ones: a copy of the prompt's keys for each of seven.
        ([[140, -1]] + [[40, 99]] * 7, {"cat": 15, "_scaled_dot_product_flash_attention": 8}),
    ],
    ids=["plain pair", "short prompt", "short answers", "long answers"],
)
def test_what_attention_calls(runs, calls):
    """Keys, values and the output take a `cat` each; the first layer's masks serve all others."""
    forest, watch, layer = Forest(runs), Calls(), torch.nn.Module().eval()
    q, k, v = (torch.randn(1, 2, sum(forest.sizes), 8) for _ in range(3))
    mdpo.forward.packed_attention.packed_attention(layer, q, k, v, None, forest=forest)
    with watch:
        mdpo.forward.packed_attention.packed_attention(layer, q, k, v, None, forest=forest)
    names = ("cat", "_scaled_dot_product_flash_attention", "masked_fill_", "constant_pad_nd", "index_select")
    assert {name: watch.found[name] for name in names if watch.found[name]} == calls


@pytest.mark.parametrize(("coefficient", "shared_rows"), [(0.0, 0), (0.5, 4)], ids=["dpo", "with NLL"])
def test_shared_tokens_cost_the_head_a_backward_only_where_the_loss_has_one(coefficient, shared_rows, monkeypatch):
    # Of 9 shared tokens 1, 4, 5 and 8 are supervised; of the chosen side's 9 … 15 also 9, 12, 13, 15, of the rejected
    # side's 9 … 13 also 9, 12, 13. In β·(chosen − rejected) the shared ones cancel, in the chosen side's NLL they stay.
    rows, derive = [], mdpo.forward.token_logps.logits_gradient
    monkeypatch.setattr(
        mdpo.forward.token_logps, "logits_gradient", lambda raw, *a: (rows.append(len(raw)), derive(raw, *a))[1]
    )
    batch = PackedCollator()([pair(9, 7, 5)])
    scores = score_tokens(tiny("Llama"), batch)
    policy = sum_by_pair(scores.logps, batch)
    reference = sum_by_pair(scores.logps.detach() * 1.1, batch)
    loss = pair_losses(PairTerms.of(policy, reference, policy, LossSettings())) - coefficient * policy.chosen
    loss.sum().backward()
    assert sum(rows) == 4 + 3 + shared_rows


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(family, reentrant):
    model = tiny(family).train()
    wanted = loss_and_gradients(model, PairCollator(0)(EVERYTHING))[2]
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    got = loss_and_gradients(model, PackedCollator()(EVERYTHING))[2]
    for name, gradient in wanted.items():
        close(got[name], gradient, name)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_lora(implementation):
    model = tiny("Llama")
    model.set_attn_implementation(implementation)
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(model, lora)
    compare(model, EVERYTHING)


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe", "GraniteMoe"])
def test_auxiliary_loss_counts_shared_tokens_for_each_sequence(family):
    model = tiny(family, output_router_logits=True)
    compare(model, EVERYTHING, aux_loss=True)
    packed, padded = batches(EVERYTHING)
    wrong = packed.copy()
    wanted = score_tokens(model, padded, aux_loss=True).aux_loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Forest, "counts", property(lambda self: torch.ones(1, sum(self.sizes))))  # each shared token once
        assert (score_tokens(model, wrong, aux_loss=True).aux_loss - wanted).abs() > 1e-4 * wanted


def test_soft_caps_windows_and_grouped_heads_matter():
    """Without them the families of the tests above would be all alike."""
    batch = PackedCollator()(AWKWARD["seven"])
    for family, plain in (("Gemma2", {"attn_logit_softcapping": None}), ("Mistral", {"sliding_window": None})):
        with_it, without = (score_tokens(tiny(family, **config), batch).logps for config in ({}, plain))
        assert (with_it - without).norm() > 1e-3 * without.norm(), family


# -------------------------------------------------------------------------------------------------------- wrong twins


def differs(model, batch, rows):
    wanted = score_tokens(model, PairCollator(0)(rows)).logps
    found = score_tokens(model, batch).logps
    assert disagreement(found, wanted, torch.float32)


def test_without_boundaries_of_runs_log_probs_differ(monkeypatch):
    model, rows = tiny("Llama"), AWKWARD["seven"]

    def one_sequence(module, query, key, value, attention_mask, forest, scaling=None, **kwargs):
        options = {"is_causal": True, "scale": scaling, "enable_gqa": True}
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, **options).transpose(1, 2), None

    monkeypatch.setitem(mdpo.forward.packed_attention.ALL_ATTENTION_FUNCTIONS, NAME, one_sequence)
    differs(model, PackedCollator()(rows), rows)


def test_with_positions_continued_log_probs_differ():
    rows = AWKWARD["seven"]
    batch = PackedCollator()(rows)
    differs(tiny("Llama"), batch | {"position_ids": torch.arange(batch["input_ids"].size(1))[None]}, rows)


def test_with_a_boundary_moved_log_probs_differ():
    rows = AWKWARD["one"]
    batch = PackedCollator()(rows)
    assert batch["runs"] == [[16, -1], [5, 8]]
    wrong = score_tokens(tiny("Llama"), batch | {"runs": [[17, -1], [4, 8]]}).logps
    assert disagreement(wrong, score_tokens(tiny("Llama"), PairCollator(0)(rows)).logps, torch.float32)


@pytest.mark.parametrize("name", ["branches of branches", "several sequences", "8 answers, 16 pairs"])
@pytest.mark.parametrize("varlen", [False, True])
def test_with_an_ancestor_left_out_log_probs_differ(name, varlen, monkeypatch):
    """The last run that has two ancestors or more hangs one token higher; its positions stay."""
    if varlen:
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", torch_stand_in)
        kernel = mdpo.forward.varlen.torch_varlen
        monkeypatch.setattr(mdpo.forward.packed_attention, "_varlen", lambda *_: kernel)
    batch, rows = PackedCollator()(AWKWARD[name]), AWKWARD[name]
    forest = Forest(batch.runs)
    last = max(run for run, before in enumerate(forest.before) if before > 1)
    wrong = [list(run) for run in batch.runs]
    wrong[last][1] = int(forest.path(wrong[last][1])[-2])
    assert (
        disagreement(*(score_tokens(tiny("Llama"), b).logps for b in (batch, PairCollator(0)(rows))), torch.float32)
        is None
    )
    differs(tiny("Llama"), batch | {"runs": wrong}, rows)


def test_with_shared_scored_tokens_counted_once_the_loss_differs():
    """A supervised token that several sequences share is one of U and several of S; its gradient is their sum."""
    rows = AWKWARD["8 answers, 16 pairs"]
    packed, padded = batches(rows)
    index = packed.unique_index.tolist()
    assert len(packed.label) < len(index) == len(padded.label)
    first = torch.tensor([index.index(u) == s for s, u in enumerate(index)])
    lists = ("unique_index", "pair", "side", "turn", "sequence", "sequence_position")
    once = packed | {name: packed[name][first] for name in lists}
    (wrong, _, gradients), (wanted, _, wanted_gradients) = (
        loss_and_gradients(tiny("Llama"), b) for b in (once, padded)
    )
    assert (wrong - wanted).abs() > 1e-2 * wanted.abs()
    name = "lm_head.weight"
    assert (gradients[name] - wanted_gradients[name]).norm() > 1e-2 * wanted_gradients[name].norm()


# ------------------------------------------------------------------------------------------- what takes the padded path

REFUSED = {
    "Mamba": ({"state_size": 8, "expand": 2}, "linear_attention"),
    "Lfm2": ({"layer_types": ["conv", "full_attention"]}, "conv"),
    "Qwen3Next": ({"layer_types": ["linear_attention", "full_attention"], **EXPERTS}, "linear_attention"),
    "FalconH1": ({}, "hybrid"),
    "GPTJ": ({"n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 8}, "interface"),
    "Llama4": ({"layer_types": ["chunked_attention", "full_attention"]}, "chunked_attention"),
}


@pytest.mark.parametrize("family", REFUSED)
def test_state_space_and_hybrid_models_are_refused_by_name(family):
    config, words = REFUSED[family]
    settings = getattr(transformers, "Llama4TextConfig" if family == "Llama4" else f"{family}Config")(
        **{**SIZES, **config}
    )
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForCausalLM")(settings)
    assert words in packing_refused(model)


def test_prompt_tuning_is_refused_by_name():
    model = get_peft_model(tiny("Llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert "prompt-learning" in packing_refused(model)
    assert packing_refused(get_peft_model(tiny("Llama"), LoraConfig(task_type="CAUSAL_LM"))) is None


def test_self_check_keeps_the_packed_batch_where_both_layouts_agree(capsys):
    model, batch = tiny("Llama"), PackedCollator()(EVERYTHING)
    layout = Layout(Alone, 0)
    assert layout.fit(model, batch) is batch and layout.fit(model, batch) is batch
    padded = PairCollator(0)(AWKWARD["seven"])
    assert layout.fit(model, padded) is padded
    assert capsys.readouterr().out == ""


def test_self_check_falls_back_on_an_unknown_attention_keyword(capsys):
    """gpt-oss hands its sinks to attention as `s_aux`."""
    model = tiny("GptOss", **WINDOW, num_local_experts=4, num_experts_per_tok=2, head_dim=8)
    rows = AWKWARD["seven"]
    batch = PackedCollator()(rows)
    fitted = Layout(Alone, 0).fit(model, batch)
    assert fitted["input_ids"].shape == PairCollator(0)(rows)["input_ids"].shape
    assert capsys.readouterr().out == "shared_prefix: off for GptOssForCausalLM: its attention takes s_aux.\n"
    with refused("shared_prefix", "GptOssAttention", "s_aux", "shared_prefix: false"):
        score_tokens(model, batch)
    assert torch.isfinite(score_tokens(model, fitted).logps).all()


def test_self_check_falls_back_where_log_probs_differ(capsys, monkeypatch):
    monkeypatch.setattr(Forest, "mask", not_causal)
    fitted = Layout(Alone, 0).fit(tiny("Llama"), PackedCollator()(AWKWARD["seven"]))
    assert not fitted.is_packed
    assert "shared_prefix: off for LlamaForCausalLM: its packed attention differs by" in capsys.readouterr().out


def test_self_check_falls_back_where_only_the_mask_knows_a_window(capsys, monkeypatch):
    """As in PhiMoE; the batch's sides are all shorter than the window, so that no log-prob would tell."""
    model = tiny("Mistral", sliding_window=200)
    batch = PackedCollator()(AWKWARD["seven"])
    assert Layout(Alone, 0).fit(model, batch) is batch
    attend = mdpo.forward.packed_attention.packed_attention

    def without_window(module, *args, sliding_window=None, **kwargs):
        return attend(types.SimpleNamespace(config=model.config, training=False), *args, **kwargs)

    monkeypatch.setitem(transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS, NAME, without_window)
    assert not Layout(Alone, 0).fit(model, batch).is_packed
    assert "its attention takes a window that only its mask has" in capsys.readouterr().out


@pytest.mark.parametrize("collator", [PackedCollator(), PairCollator(0)], ids=["packed", "padded"])
def test_a_head_that_does_more_to_its_logits_is_an_error(collator):
    class Halved(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            outputs.logits = outputs.logits / 2
            return outputs

    torch.manual_seed(0)
    model = Halved(tiny("Llama").config).eval()
    enable_scoring(model)
    with refused("LM head", "Halved"):
        Layout(Alone, 0).fit(model, collator(AWKWARD["seven"]))


def test_two_models_of_one_configuration_switch_back():
    policy = tiny("Llama")
    reference = transformers.LlamaForCausalLM(policy.config).eval()
    enable_scoring(reference)
    packed, padded = batches(AWKWARD["seven"])
    score_tokens(policy, packed)
    close(score_tokens(reference, packed).logps, score_tokens(reference, padded).logps, "logps")


def test_not_a_number_is_a_disagreement():
    assert disagreement(torch.tensor([float("nan")]), torch.tensor([1.0]), torch.bfloat16)


def test_generation_uses_the_models_own_attention():
    tokenizer_for(CHATML)
    model = tiny("Llama")
    ids = torch.tensor([[3, 4, 5, 6]])
    wanted = model.generate(ids, max_new_tokens=5, do_sample=False)
    score_tokens(model, PackedCollator()(AWKWARD["seven"]))
    assert model.config._attn_implementation == NAME
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), wanted)
    assert model.config._attn_implementation == "eager"


def test_one_rank_that_disagrees_decides_for_all(capsys):
    class Two(Alone):
        elsewhere = iter([0, 1])  # the other rank's heads agree, its layouts do not
        reduce = staticmethod(lambda value, how: value + next(Two.elsewhere))

    fitted = Layout(Two, 0).fit(tiny("Llama"), PackedCollator()(AWKWARD["seven"]))
    assert not fitted.is_packed
    Two.elsewhere = iter([1])
    with refused("LM head", "another rank"):
        Layout(Two, 0).fit(tiny("Llama"), PackedCollator()(AWKWARD["seven"]))
    assert "shared_prefix: off for LlamaForCausalLM: another rank found a difference." in capsys.readouterr().out


# --------------------------------------------------------------------------- varlen kernels, with stand-ins for a GPU's


VARLEN = [(kernel, family) for kernel in ("flash", "torch_varlen") for family in ("Llama", "Mistral")]


@pytest.mark.parametrize(("kernel", "family"), [*VARLEN, ("flash", "Gemma2")])  # torch's has no soft-caps
def test_varlen_calls_say_what_the_padded_twin_computes(kernel, family, monkeypatch):
    """With the keyword names, windows, caps and alignment of flash-attn 2 and of torch.nn.attention.varlen."""
    monkeypatch.setattr(mdpo.forward.varlen, "flash_attn", lambda: (flash_stand_in, None))
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", torch_stand_in)
    monkeypatch.setattr(mdpo.forward.packed_attention, "_varlen", lambda *_: getattr(mdpo.forward.varlen, kernel))
    compare(tiny(family), EVERYTHING)


def test_varlen_is_for_half_precision_on_a_gpu(monkeypatch):
    flash, own = object(), object()
    found = {"flash-attn": flash, "torch's varlen attention": own}
    monkeypatch.setattr(mdpo.forward.packed_attention, "kernels", lambda device: found)
    on_cpu = torch.empty(1, 4, 5, 8, dtype=torch.bfloat16)
    assert mdpo.forward.packed_attention._varlen(on_cpu, on_cpu, 0.0, None) is None

    def on_gpu(size=8, dtype=torch.bfloat16):
        return types.SimpleNamespace(device=torch.device("cuda"), dtype=dtype, size=lambda dim: size)

    def varlen(query, value, softcap=None, dropout=0.0):
        return mdpo.forward.packed_attention._varlen(query, value, dropout, softcap)

    assert varlen(on_gpu(), on_gpu(), 30.0) is varlen(on_gpu(), on_gpu()) is flash
    del found["flash-attn"]
    assert varlen(on_gpu(), on_gpu()) is own
    assert varlen(on_gpu(), on_gpu(), 30.0) is varlen(on_gpu(), on_gpu(), dropout=0.1) is None
    assert varlen(on_gpu(24), on_gpu(16)) is None  # DeepSeek's values are shorter than its keys
    assert varlen(on_gpu(12), on_gpu(12)) is None
    assert varlen(on_gpu(dtype=torch.float32), on_gpu()) is None
    found.clear()
    assert varlen(on_gpu(), on_gpu()) is None
