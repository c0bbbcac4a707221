"""Nothing is random in training mode once dropout is off, wherever a family keeps its rates."""

import copy

import pytest
import torch
from accelerate import Accelerator
from errors import refused
from tiny import CHATML, tiny_llama, tiny_mixtral, tokenizer_for
from torch import nn
from transformers import BioGptConfig, BioGptForCausalLM, OPTConfig, OPTForCausalLM

from mdpo.forward.dropout import configured, disable_dropout, refuse_noise, remember_cache
from mdpo.forward.token_logps import enable_scoring
from mdpo.types import PairBatch

TOKENIZER = tokenizer_for(CHATML, "letters", eos="<|im_end|>")
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": len(TOKENIZER)}


def with_attention_dropout():
    return tiny_llama(TOKENIZER, attention_dropout=0.3)


def opt():
    return OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32, layerdrop=0.5, init_std=0.3))


def biogpt():
    return BioGptForCausalLM(BioGptConfig(**SIZES, intermediate_size=64, layerdrop=0.5, initializer_range=0.3))


def jittered():
    model = tiny_mixtral(TOKENIZER)
    for layer in model.model.layers:
        layer.mlp.jitter_noise = 0.5
    return model


def logps(model, seed: int) -> torch.Tensor:
    ids = torch.arange(3, 40)[None]
    torch.manual_seed(seed)
    with torch.no_grad():
        return model(input_ids=ids).logits


def only_modules(model) -> None:
    """The negative control: TRL's rule."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


@pytest.mark.parametrize("make", [with_attention_dropout, opt, biogpt, jittered])
def test_every_rate_is_off(make):
    torch.manual_seed(0)
    model = make()
    wrong = copy.deepcopy(model)
    only_modules(wrong.train())
    assert not torch.equal(logps(wrong, 1), logps(wrong, 2))
    disable_dropout(model.train())
    assert torch.equal(logps(model, 1), logps(model, 2))
    assert torch.equal(logps(model, 1), logps(model.eval(), 1))


def test_a_saved_configuration_has_the_rates_that_it_came_with():
    model = with_attention_dropout()
    disable_dropout(model)
    assert model.config.attention_dropout == 0.0
    remember_cache(model)
    model.config.use_cache = False  # as Trainer does
    with configured(model):
        assert model.config.attention_dropout == 0.3 and model.config.use_cache is True
    assert model.config.attention_dropout == 0.0 and model.config.use_cache is False


def batch():
    return PairBatch(input_ids=torch.arange(3, 90)[None].repeat(2, 1))


def test_what_is_random_without_a_rate_is_refused():
    """As PhiMoE's router, which draws experts in training mode."""
    model = tiny_llama(TOKENIZER).train()
    enable_scoring(model)
    disable_dropout(model)
    state = torch.get_rng_state()
    refuse_noise(model, Accelerator(cpu=True), batch())
    assert torch.equal(torch.get_rng_state(), state)
    mlp, plain = model.model.layers[1].mlp, model.model.layers[1].mlp.forward
    mlp.forward = lambda x: plain(x) + (1e-3 * torch.rand(1) if mlp.training else 0.0)
    with refused("disable_dropout", "LlamaForCausalLM", "disable_dropout: false"):
        refuse_noise(model, Accelerator(cpu=True), batch())
