"""What a checkpoint's files must contain, and a model that holds, bit by bit, what its files hold."""

import pytest
import torch
from errors import refused
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import CHATML, tiny_llama, tiny_mixtral, tokenizer_for
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from mdpo.runs.saved_weights import check_saved, expected_shapes, load_adapters, load_saved

TOKENIZER = tokenizer_for(CHATML, "byte", eos="<|im_end|>")
FILE, ADAPTER = "model.safetensors", "adapter_model.safetensors"


def tiny_neox(tokenizer, seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=len(tokenizer), **sizes)).eval()


def tied(tokenizer, seed=0):
    return tiny_llama(tokenizer, seed, tie_word_embeddings=True)


def eight_bits_each(tokenizer, seed=0):
    return tiny_llama(tokenizer, seed).to(torch.bfloat16)


MODELS = [tiny_llama, tied, eight_bits_each, tiny_mixtral, tiny_neox]


def edit(path, **changes):
    """Tensors of a file replaced, or left out where the change is None; a name's dots are written __."""
    held = load_file(path)
    for name, change in changes.items():
        name = name.replace("__", ".")
        held[name] = change(held.get(name)) if change else None
    save_file({name: tensor for name, tensor in held.items() if tensor is not None}, path, {"format": "pt"})


@pytest.mark.parametrize("make", MODELS)
def test_a_saved_model_is_complete_and_comes_back_bit_by_bit(make, tmp_path):
    model, other = make(TOKENIZER, 0), make(TOKENIZER, 1)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    check_saved(tmp_path, model)
    addresses = {name: weight.data_ptr() for name, weight in other.named_parameters()}
    load_saved(tmp_path, other)
    wanted = model.state_dict()
    for name, weight in other.state_dict().items():
        assert torch.equal(weight, wanted[name]), name
    assert addresses == {name: weight.data_ptr() for name, weight in other.named_parameters()}  # an optimizer's own


def test_experts_are_lost_where_names_are_taken_as_they_are(tmp_path):
    """The negative control: Trainer's own way."""
    model, other = tiny_mixtral(TOKENIZER, 0), tiny_mixtral(TOKENIZER, 1)
    model.save_pretrained(tmp_path)
    other.load_state_dict(load_file(tmp_path / FILE), strict=False)
    name = "model.layers.0.mlp.experts.down_proj"
    assert not torch.equal(other.state_dict()[name], model.state_dict()[name])


EXPERT = "model__layers__1__block_sparse_moe__experts__3__w2__weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [(None, "(not at all)"), (lambda x: x[:0], "[0, 64]"), (lambda x: x[:7].clone(), "[7, 64]")],
)
def test_one_expert_that_is_missing_empty_or_cut_is_named(change, words, tmp_path):
    model = tiny_mixtral(TOKENIZER)
    model.save_pretrained(tmp_path)
    edit(tmp_path / FILE, **{EXPERT: change})
    with refused("weights", tmp_path, "1 of 41 weights", "experts.3.w2.weight ", words, "zero3_save_16bit_model: true"):
        check_saved(tmp_path, model)
    with refused("resume_from_checkpoint", tmp_path):
        load_saved(tmp_path, model)


def test_a_partitioned_model_is_compared_by_its_whole_shapes(tmp_path):
    """As under ZeRO-3: every parameter is empty and knows its shape."""
    model, wanted = tied(TOKENIZER), expected_shapes(tied(TOKENIZER))
    model.save_pretrained(tmp_path)
    for weight in model.parameters():
        weight.ds_shape, weight.data = weight.shape, torch.empty(0)
    assert expected_shapes(model) == wanted and "lm_head.weight" not in wanted
    check_saved(tmp_path, model)


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        (tiny_llama, {"model__extra__weight": lambda _: torch.ones(2)}),
        (tiny_llama, {"lm_head__weight": None}),
        (eight_bits_each, {"model__norm__weight": lambda x: x.float() + 2**-20}),
    ],
)
def test_what_would_load_differently_is_refused(model, changes, tmp_path):
    model = model(TOKENIZER)
    model.save_pretrained(tmp_path)
    edit(tmp_path / FILE, **changes)
    with refused("resume_from_checkpoint", tmp_path, next(iter(changes)).replace("__", ".")):
        load_saved(tmp_path, model)


ADAPTERS = {
    "lora": {},
    "dora": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "experts": {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "some tokens": {"trainable_token_indices": [3, 5]},
    "all linear": {"target_modules": "all-linear"},
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_is_complete_and_comes_back_bit_by_bit(name, tmp_path):
    def adapted(seed):
        torch.manual_seed(seed)
        config = LoraConfig(r=2, init_lora_weights=False, **{"target_modules": ["q_proj"], **ADAPTERS[name]})
        return get_peft_model(tiny_mixtral(TOKENIZER), config)

    model, other = adapted(0), adapted(1)
    with torch.no_grad():
        for weight in (p for p in model.parameters() if p.requires_grad):
            weight.add_(torch.randn_like(weight))
    model.save_pretrained(tmp_path)
    check_saved(tmp_path, model)
    load_adapters(tmp_path, other)
    trained = {n: p for n, p in other.named_parameters() if p.requires_grad}
    assert trained and all(torch.equal(p, model.get_parameter(n)) for n, p in trained.items())
    first = next(iter(expected_shapes(model)))
    edit(tmp_path / ADAPTER, **{first.replace(".", "__"): lambda x: x[:1].clone()})
    with refused("weights", tmp_path, "1 of ", first):
        check_saved(tmp_path, model)
    edit(tmp_path / ADAPTER, **{first.replace(".", "__"): None})
    with refused("weights", tmp_path, "lacks 1 ", first):
        load_adapters(tmp_path, other)


def test_prompt_tuning_and_a_second_adapter_come_back_too(tmp_path):
    def prompted(seed):
        base = tiny_llama(TOKENIZER)
        torch.manual_seed(seed)
        return get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))

    def two(seed):
        base, config = tiny_llama(TOKENIZER), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        torch.manual_seed(seed)
        model = get_peft_model(base, config)
        model.add_adapter("ref", config)
        return model

    for make in (prompted, two):
        model, other = make(0), make(1)
        model.save_pretrained(tmp_path / make.__name__)
        check_saved(tmp_path / make.__name__, model)
        load_adapters(tmp_path / make.__name__, other)
        wanted, changed = model.state_dict(), make(1).state_dict()
        assert all(torch.equal(weight, wanted[name]) for name, weight in other.state_dict().items())
        assert any(not torch.equal(weight, wanted[name]) for name, weight in changed.items())


def test_a_trained_weight_that_no_adapter_file_has_is_refused():
    model = get_peft_model(tiny_llama(TOKENIZER), LoraConfig(r=2, target_modules=["q_proj"]))
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with refused("weights", "model.norm.weight and 0 more"):
        expected_shapes(model)
