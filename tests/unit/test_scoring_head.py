"""ScoringHead: what it takes of a model it gives back, a copy scores with its own weights, and what is out of order is
an error."""

import copy
import filecmp
import inspect
import pickle
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import convert_outputs_to_fp32
from errors import refused
from packed_pairs import AWKWARD, SIZES, batches
from peft import LoraConfig, get_peft_model

from mdpo.forward.packed_attention import NAME
from mdpo.forward.scoring_head import ScoringHead, own_attention
from mdpo.forward.token_logps import enable_scoring, score_tokens
from mdpo.reference.model import build_reference, place_reference

IDS = torch.tensor([[3, 4, 5, 6]])
PACKED, PADDED = batches(AWKWARD["seven"])


def llama(seed: int = 0, attention: str = "eager"):
    config = transformers.LlamaConfig(**SIZES)
    config._attn_implementation = attention
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(config).eval()


def scored(model, batch=PACKED) -> torch.Tensor:
    with torch.no_grad():
        return score_tokens(model, batch).logps


def generated(model) -> list[int]:
    return model.generate(IDS, max_new_tokens=5, do_sample=False)[0].tolist()


# ------------------------------------------------------------------------------------------------- install and restore


def test_the_model_is_given_back_as_it_was(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "before")
    attributes, text, config = dict(vars(model)), generated(model), model.config.to_dict()
    modules = {name: dict(vars(module)) for name, module in model.named_modules() if name}
    scoring = enable_scoring(model)
    assert vars(model).keys() - attributes.keys() == {"forward", "_scoring_head"} and model.forward is scoring
    scored(model)
    assert model.config._attn_implementation == NAME  # a backward that is to come would find it
    model.save_pretrained(tmp_path / "scoring")
    assert generated(model) == text
    scored(model)
    scoring.restore()
    assert vars(model) == attributes and model.forward == type(model).forward.__get__(model)
    assert modules == {name: dict(vars(module)) for name, module in model.named_modules() if name}
    assert model.config.to_dict() == config and model.config._attn_implementation == "eager"
    assert generated(model) == text
    model.save_pretrained(tmp_path / "after")
    for other in ("scoring", "after"):
        names = sorted(path.name for path in Path(tmp_path, "before").iterdir())
        assert "model.safetensors" in names and "config.json" in names
        assert filecmp.cmpfiles(tmp_path / "before", tmp_path / other, names, shallow=False) == (names, [], [])
    for batch in (PADDED, PACKED):
        with refused("scoring", "LlamaForCausalLM", "`enable_scoring`"):
            scored(model, batch)


def test_a_forward_of_the_models_own_is_called_and_comes_back():
    """As accelerate gives it one where a model lies on several devices."""
    model, calls = llama(), []

    def forward(*args, **kwargs):
        calls.append(kwargs)
        return type(model).forward(model, *args, **kwargs)

    model.forward = forward
    scoring = enable_scoring(model)
    model(input_ids=IDS)
    assert len(calls) == 1
    scoring.restore()
    assert model.forward is forward and "_scoring_head" not in vars(model)


def test_the_signature_is_the_models_own():
    model = llama()
    wanted = inspect.signature(model.forward)
    enable_scoring(model)
    assert inspect.signature(model.forward) == wanted and "attention_mask" in wanted.parameters
    with pytest.raises(ValueError, match="model_kwargs.*nonsense"):  # generate() checks by it
        model.generate(IDS, max_new_tokens=1, nonsense=1)


def test_a_model_that_scores_keeps_its_head():
    model = llama()
    scoring = enable_scoring(model)
    wanted = scored(model)
    assert enable_scoring(model, fused=True) is scoring and scoring.fused and model.forward is scoring
    assert enable_scoring(model) is scoring and not scoring.fused
    assert torch.equal(scored(model), wanted)
    scoring.restore()
    assert "forward" not in vars(model)


# -------------------------------------------------------------------------------------------------------------- copies


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_scores_and_generates_with_its_own_weights(copied):
    """Also of a model that is in packed attention; what happens to one leaves the other alone."""
    model, other = llama(0), llama(1)
    enable_scoring(model)
    wanted, text = scored(model), generated(model)
    scored(model)
    twin = copied(model)
    assert ScoringHead.of(twin).model is twin and twin.forward is ScoringHead.of(twin)
    assert torch.equal(scored(twin), wanted) and torch.equal(scored(twin, PADDED), scored(model, PADDED))
    twin.load_state_dict(other.state_dict())
    enable_scoring(other)
    assert torch.equal(scored(twin), scored(other)) and not torch.equal(scored(twin), wanted)
    assert generated(twin) == generated(other) != text
    assert torch.equal(scored(model), wanted) and generated(model) == text
    ScoringHead.of(twin).restore()
    assert twin.config._attn_implementation == "eager" and "_scoring_head" not in vars(twin)
    assert torch.equal(scored(model), wanted)


def mixed(model) -> None:
    """As `Accelerator.prepare` wraps a model's forward for mixed precision."""
    model._original_forward = model.forward
    assert not hasattr(model.forward, "__func__")  # else it would be bound to the model anew
    model.forward = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(model.forward))


def test_a_copy_of_a_wrapped_model_does_not_call_the_original():
    model, other = llama(0), llama(1)
    enable_scoring(model)
    mixed(model)
    twin = copy.deepcopy(model)
    twin.load_state_dict(other.state_dict())
    assert torch.equal(scored(twin), scored(model))  # wrong: functions are not copied
    enable_scoring(twin)
    enable_scoring(other)
    assert torch.equal(scored(twin), scored(other)) and not torch.equal(scored(twin), scored(model))


def test_a_wrapped_model_stays_wrapped():
    """A second trainer of one model."""
    model = llama()
    scoring = enable_scoring(model)
    mixed(model)
    wrapper, wanted = model.forward, scored(model)
    assert enable_scoring(model) is scoring and model.forward is wrapper
    assert torch.equal(scored(model), wanted)


def test_a_copied_reference_is_not_the_policy():
    policy = llama(0)
    enable_scoring(policy)
    wanted = scored(policy)
    mixed(policy)
    reference = place_reference(build_reference(policy, None, {}, made_by_caller=True), Accelerator(cpu=True))
    with torch.no_grad():
        for weight in policy.parameters():
            weight.zero_()
    assert torch.equal(scored(reference), wanted) and not torch.equal(scored(policy), wanted)


# ----------------------------------------------------------------------------------------------------------- attention


def test_each_call_switches():
    model = llama(attention="sdpa")
    assert own_attention(model) == "sdpa"
    enable_scoring(model)
    for call, packed in ((lambda: scored(model, PACKED), True), (lambda: scored(model, PADDED), False)):
        call()
        assert (model.config._attn_implementation == NAME) == packed and own_attention(model) == "sdpa"
    scored(model, PACKED)
    model(input_ids=IDS)
    assert model.config._attn_implementation == "sdpa"


def test_an_attention_chosen_later_is_the_one_that_comes_back():
    model = llama(attention="eager")
    enable_scoring(model)
    model.set_attn_implementation("sdpa")
    scored(model, PACKED)
    scored(model, PADDED)
    assert model.config._attn_implementation == "sdpa"


# --------------------------------------------------------------------------------------------------------- out of order


def test_peft_models_are_given_by_their_base():
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    with refused("scoring", "PeftModel", "get_base_model()"):
        enable_scoring(model)
    enable_scoring(model.get_base_model())
    assert torch.isfinite(scored(model)).all()


def test_a_configuration_that_another_model_has_switched_is_refused():
    policy = llama()
    enable_scoring(policy)
    scored(policy)
    other = transformers.LlamaForCausalLM(policy.config)
    with refused("scoring", "LlamaForCausalLM", "configuration"):
        enable_scoring(other)
    assert "forward" not in vars(other)
    scored(policy, PADDED)
    enable_scoring(other)


def test_a_head_is_installed_once_and_restored_once():
    model = llama()
    scoring = enable_scoring(model)
    with refused("scoring", "LlamaForCausalLM", "`restore()`"):
        ScoringHead(model, scoring.score).install()
    with refused("scoring", "not installed in LlamaForCausalLM"):
        ScoringHead(model, scoring.score).restore()
    scoring.restore()
    with refused("scoring", "not installed in LlamaForCausalLM"):
        scoring.restore()


def test_a_head_inside_a_wrapper_cannot_be_taken_out():
    model = llama()
    scoring = enable_scoring(model)
    mixed(model)
    wrapper = model.forward
    with refused("scoring", "LlamaForCausalLM's forward", "wrapped"):
        scoring.restore()
    assert model.forward is wrapper and ScoringHead.of(model) is scoring
    model.forward = model._original_forward
    scoring.restore()


def test_a_head_with_an_adapter_leaves_the_model_alone():
    model = get_peft_model(llama(), LoraConfig(target_modules=["lm_head"])).get_base_model()
    with refused("lora_target_modules", "'lm_head'"):
        enable_scoring(model)
    assert "forward" not in vars(model) and "_scoring_head" not in vars(model)
