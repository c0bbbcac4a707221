"""A model is loaded whole or not at all: what transformers would draw at random, or cannot read, is a message."""

import json
import shutil

import pytest
import torch
from errors import refused
from families import FAMILIES, tiny_model
from safetensors.torch import load_file, save_file
from tiny import CHATML, tiny_llama, tokenizer_for

from mdpo.reference.loading import load_model

TOKENIZER = tokenizer_for(CHATML, "byte", eos="<|im_end|>")
NO_CLASS = ("emu3", "mllama")  # what these save is no language model to transformers


@pytest.fixture
def folder(tmp_path):
    tiny_llama(TOKENIZER).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def configure(folder, **settings) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def rename(folder, change) -> None:
    """Each tensor under the name that `change` gives it; None leaves it out."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()  # still mapped
    renamed = {change(name): weight.clone() for name, weight in weights.items()}
    save_file({name: w for name, w in renamed.items() if name}, folder / "model.safetensors", {"format": "pt"})


def test_a_whole_model_is_loaded(folder):
    model = load_model(str(folder), dtype="float32")
    wanted = tiny_llama(TOKENIZER).state_dict()
    assert all(torch.equal(weight, wanted[name]) for name, weight in model.state_dict().items())


def test_what_would_begin_at_random_is_refused(folder):
    before = shutil.copytree(folder, folder.parent / "before")
    rename(folder, lambda name: None if name.endswith("1.mlp.up_proj.weight") else name)
    with refused("model", folder, "1 of its weights", "model.layers.1.mlp.up_proj.weight"):
        load_model(str(folder))
    configure(before, num_hidden_layers=3)
    with refused("model", before, "9 of its weights", "model.layers.2.input_layernorm"):
        load_model(str(before))


@pytest.mark.parametrize("prefix", ["base_model.model.", "module.", "_orig_mod."])
def test_names_of_a_wrapper_are_told(prefix, folder):
    """As PEFT's, a launcher's or a compiler's wrapper leaves them; transformers would train a random model."""
    rename(folder, lambda name: prefix + name)
    with refused("model", "in no file", f" {prefix}lm_head.weight"):
        load_model(str(folder))


def test_other_shapes(folder):
    configure(folder, vocab_size=len(TOKENIZER) + 8)
    with refused("model", folder, "other shapes", "config.json"):
        load_model(str(folder))
    with refused("model", folder, "2 of its weights", "other shapes", "lm_head.weight"):
        load_model(str(folder), ignore_mismatched_sizes=True)


def test_weights_that_cannot_be_read(folder):
    path = folder / "model.safetensors"
    weights = path.read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    for content in (pointer, b"", weights[: len(weights) // 2]):
        path.unlink()
        path.write_bytes(content)
        with refused("model", folder):
            load_model(str(folder))
    path.unlink()
    (folder / "pytorch_model.bin").write_bytes(pointer)
    with refused("model", folder):
        load_model(str(folder))


def test_a_padding_id_beyond_the_vocabulary(folder):
    configure(folder, pad_token_id=len(TOKENIZER))
    with refused("model", folder, "pad_token_id", "vocab_size"):
        load_model(str(folder))


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(NO_CLASS)))
def test_what_a_family_saves_is_whole(family, tmp_path):
    """Tied weights, buffers and renamed tensors are not taken for missing ones."""
    try:
        model = tiny_model(family, 100)
    except Exception as error:
        pytest.skip(f"transformers cannot build it small: {type(error).__name__}")
    model.save_pretrained(tmp_path)
    load_model(str(tmp_path), dtype="float32")
