"""How many tokens a model can take, looked at on the model itself, and rows beyond that."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from errors import refused
from families import FAMILIES, tiny_model
from peft import PromptTuningConfig, get_peft_model
from tiny import CHATML, agent_rows, tokenizer_for
from trainers import trainer_of
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from dpo_trainer import DPOTrainer
from mdpo.config.schema import MDPOConfig
from mdpo.data.positions import check_lengths, learned_positions, positions_of, refuse_long_rows
from mdpo.data.tokenize import side_lengths, tokenize_dataset
from mdpo.masking.loss_mask import RenderSettings
from mdpo.masking.tokenizer import refuse_small_vocabulary

TOKENIZER = tokenizer_for(CHATML, "letters", eos="<|im_end|>")
ENDLESS = ("llama", "gpt_neox", "bloom", "falcon", "mamba", "xglm")
ENDING = {"gpt2": 512, "opt": 512, "bart": 512, "gptj": 512, "mpt": 512, "biogpt": 512, "roberta": 511}
# Heads that the trainer refuses anyway, tables that are looked up further out than the row is long; a draft model.
UNKNOWN = ("prophetnet", "gemma4_unified_assistant", "reformer")


def ends_at(model, limit: int | None, beyond: int = 600) -> bool:
    """Whether a row of `limit` tokens can be computed and one more cannot; without a limit, whether `beyond` can."""

    def works(n: int) -> bool:
        row = torch.arange(n)[None] % 90 + 3
        try:
            with torch.no_grad():
                model(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False)
        except (IndexError, RuntimeError, ValueError):
            return False
        return True

    return works(beyond) if limit is None else works(limit) and not works(limit + 1)


@pytest.mark.parametrize("family", [*ENDING, *ENDLESS])
def test_positions_are_told_from_the_configuration(family):
    model = tiny_model(family, 100)
    assert learned_positions(model) == positions_of(model.config) == ENDING.get(family)
    assert ends_at(model, ENDING.get(family))


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(ENDING) - set(ENDLESS) - set(UNKNOWN)))
def test_of_every_family(family):
    try:
        model = tiny_model(family, 100)
    except Exception as error:
        pytest.skip(f"transformers cannot build it small: {type(error).__name__}")
    limit = learned_positions(model)
    assert limit == positions_of(copy.deepcopy(model.config))
    assert ends_at(model, limit)


def test_published_sizes():
    """Of configurations as they are by default: GPT-2's 1024, OPT's 2048 behind two rows, XLM-RoBERTa's 512 of 514."""
    assert positions_of(CONFIG_MAPPING["gpt2"](vocab_size=100, n_layer=1)) == 1024
    assert positions_of(CONFIG_MAPPING["opt"](vocab_size=100, num_hidden_layers=1)) == 2048
    roberta = CONFIG_MAPPING["xlm-roberta"](vocab_size=100, num_hidden_layers=1, max_position_embeddings=514)
    assert positions_of(roberta) == 512
    assert positions_of(LlamaConfig(vocab_size=100, num_hidden_layers=1)) is None


def gpt2(n_positions: int):
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(TOKENIZER), n_positions=n_positions, **sizes))


def made(folder, positions: int, **options):
    models = lambda: (gpt2(positions), None)  # noqa: E731
    return trainer_of(DPOTrainer, agent_rows(8), folder, TOKENIZER, MDPOConfig, models, **options)


def longest() -> int:
    rows, _ = tokenize_dataset(Dataset.from_list(agent_rows(8)), TOKENIZER, RenderSettings(None), "x", None)
    return int(side_lengths(rows).max())


@pytest.mark.parametrize("shared_prefix", [True, False])
def test_a_row_as_long_as_the_table_is_trained_on_and_one_more_is_refused(shared_prefix, tmp_path):
    n = longest()
    options = {"max_length": None, "shared_prefix": shared_prefix, "max_steps": 1}
    assert made(tmp_path, n, **options).train().training_loss == pytest.approx(0.6931472, abs=1e-6)
    with refused("max_length", "2 of 8 pairs of train ", f", {n} in row:3; ", f"{n - 1} positions"):
        made(tmp_path, n - 1, **options)
    kept = made(tmp_path, n - 1, **{**options, "max_length": n - 1})
    assert len(kept.train_dataset) == 6


def test_held_out_sets_streams_and_what_is_added_to_a_row(tmp_path):
    n = longest()
    trainer = made(tmp_path, n - 1, max_length=n - 1)
    with refused("max_length", "2 of 8 pairs of eval "):
        trainer.render_settings = RenderSettings(None)
        trainer.evaluate(Dataset.from_list(agent_rows(8)))
    rows, _ = tokenize_dataset(Dataset.from_list(agent_rows(8)), TOKENIZER, RenderSettings(None), "x", None)
    args = SimpleNamespace(pad_to_multiple_of=None, max_length=None)
    refuse_long_rows(rows, "x", n, args)
    args.pad_to_multiple_of = 64  # 64 · ⌈n / 64⌉ > n
    assert n % 64
    with refused("max_length", f"max_length: {n // 64 * 64} "):
        refuse_long_rows(rows, "x", n, args)
    stream = rows.to_iterable_dataset()
    for length in (None, 100):
        with refused("max_length", f"max_length: {length} ", "stream x"):
            refuse_long_rows(stream, "x", 99, SimpleNamespace(pad_to_multiple_of=None, max_length=length))
    refuse_long_rows(stream, "x", 99, SimpleNamespace(pad_to_multiple_of=None, max_length=99))


def test_tokens_of_prompt_tuning_take_positions_too():
    model = get_peft_model(gpt2(64), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    assert learned_positions(model) == 59
    assert ends_at(model, 59)


def test_a_rotary_model_gets_a_line(capsys):
    rows, _ = tokenize_dataset(Dataset.from_list(agent_rows(8)), TOKENIZER, RenderSettings(None), "x", None)
    n, args = longest(), SimpleNamespace(trust_remote_code=False, max_length=None, pad_to_multiple_of=None)

    def said(**config) -> str:
        config = LlamaConfig(vocab_size=100, num_hidden_layers=1, **config)
        check_lengths(config, {"train": rows, "none": None}, args)
        return capsys.readouterr().out

    assert said(max_position_embeddings=n) == ""
    assert said(max_position_embeddings=n - 1).startswith(f"max_length: the longest side has {n} tokens")
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": n, "rope_theta": 1e4}
    assert said(max_position_embeddings=n - 1, rope_parameters=yarn) == ""
    check_lengths(None, {"train": rows}, args)  # nothing is known of a GGUF file


def test_ids_count_and_not_how_many_there_are(tmp_path):
    size = len(TOKENIZER)
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=size))
    refuse_small_vocabulary(TOKENIZER, config)
    TOKENIZER.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    state = json.loads(path.read_text())
    for beyond in (size, size + 40):  # a hole below, as many entries as before
        state["model"]["vocab"]["~"] = beyond
        path.write_text(json.dumps(state))
        edited = AutoTokenizer.from_pretrained(tmp_path)
        assert len(edited.get_vocab()) == size and edited.convert_tokens_to_ids("~") == beyond
        with refused("tokenizer", f" {beyond}, of '~'"):
            refuse_small_vocabulary(edited, config)
        refuse_small_vocabulary(
            edited, SimpleNamespace(get_text_config=lambda n=beyond: SimpleNamespace(vocab_size=n + 1))
        )
