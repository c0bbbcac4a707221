"""Every causal language model of the installed transformers trains, is saved, and resumes to the bit, or is refused.

Tiny models, two steps of two pairs, in one process. What fails is listed with its reason, and nothing else may fail.
"""

import gc
import math
import shutil

import pytest
import torch
from datasets import Dataset
from errors import refused
from families import FAMILIES, tiny_model
from peft import LoraConfig
from tiny import CHATML, agent_rows, tokenizer_for

from dpo_trainer import DPOTrainer
from mdpo.config.schema import MDPOConfig
from mdpo.forward.collators import unpacked
from mdpo.forward.token_logps import score_tokens

pytestmark = pytest.mark.slow
TOKENIZER = tokenizer_for(CHATML, "letters", eos="<|im_end|>")
# Families that transformers itself cannot build from their configuration alone, or not small: words of its error.
UNBUILT = {
    "dots3_note": "adapter_in_dim must match hidden_size",
    "dots3_note_text": "weights at its smallest",  # sizes for each layer apart
    "gemma3n": "requires the timm library",
    "gemma4_assistant": "hidden_size_per_layer_input must be 0",
    "musicgen": "has no attribute 'dropout'",
    "musicgen_melody": "has no attribute 'dropout'",
}
OTHER_HEAD = (
    "bert big_bird camembert data2vec-text electra ernie inkling_text megatron-bert modernbert-decoder prophetnet "
    "rembert roberta roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod"
).split()
# Families that the trainer refuses: the key of the UserError, and a part of its message.
REFUSED = {
    **dict.fromkeys(OTHER_HEAD, ("LM head", "logits")),
    "emu3": ("model", "configuration class"),  # transformers saves what it does not load as a language model
    "got_ocr2": ("model", "attention implementation"),
    "mllama": ("model", "configuration class"),
    "phimoe": ("disable_dropout", "training mode"),
}
# Families whose own code refuses such rows: type and words of its error.
NOT_FOR_TEXT = {
    "blt": (AttributeError, "has no attribute 'num_hidden_layers'"),  # in transformers' cache
    "gemma4_unified_assistant": (ValueError, "inputs_embeds and shared_kv_states cannot be None"),  # a draft model
    "reformer": (ValueError, "If training, make sure that config.axial_pos_shape"),
}
# Linear layers that PEFT cannot adapt, by family: a pattern for exclude_modules.
NO_ADAPTER = {
    **dict.fromkeys(("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"), r".*\.(out_proj|conv1d)"),
    "deepseek_v4": r".*\.o_a_proj",  # a product by groups
    **dict.fromkeys(("llama4", "llama4_text"), r".*\.router"),  # gives a tuple
}


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """accelerate collects garbage many times a run, which takes longer than these models."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def one_thread():
    """Several add up the rows of an expert's bias (gpt-oss) in whatever order they come: on a busy machine no two runs
    are the same to the bit, resumed or not."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trained(folder, resume=None, peft_config=None) -> DPOTrainer:
    """Two steps of two pairs, with a checkpoint of each."""
    args = MDPOConfig(
        str(folder),
        per_device_train_batch_size=2,
        max_steps=2,
        save_steps=1,
        logging_steps=1,
        learning_rate=1e-3,
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        gradient_checkpointing=False,
        fused_ops=False,
        max_length=500,
    )
    data = Dataset.from_list(agent_rows(4))
    trainer = DPOTrainer(str(folder / "model"), None, args, None, data, None, TOKENIZER, peft_config=peft_config)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer) -> list[float]:
    """Without the load-balancing loss of a mixture of experts."""
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return [log["loss"] - trainer.aux_loss_coef * log.get("aux_loss", 0.0) for log in logs]


def check(folder, peft_config=None) -> None:
    """The first loss is ln 2, packed rows score as padded ones, and a run resumed from its first checkpoint ends with
    the weights of one that never stopped, bit by bit."""
    whole = trained(folder, peft_config=peft_config)
    first, second = losses(whole)
    assert abs(first - math.log(2)) < 1e-5 and second != first
    batch = next(iter(whole.get_train_dataloader()))
    if batch.is_packed:
        model = whole.model.eval()
        with torch.no_grad():
            packed = score_tokens(model, whole.layout.fit(model, batch)).logps
            padded = score_tokens(model, unpacked(batch, TOKENIZER.pad_token_id)).logps
        assert (packed - padded).norm() <= 1e-4 * padded.norm()
    shutil.rmtree(folder / "checkpoint-2")
    resumed = trained(folder, folder / "checkpoint-1", peft_config)
    assert losses(resumed)[-1] == second
    wanted = whole.model.state_dict()
    for name, weight in resumed.model.state_dict().items():
        assert torch.equal(weight, wanted[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family, tmp_path):
    if family in UNBUILT:
        with pytest.raises(Exception, match=UNBUILT[family]):
            tiny_model(family, len(TOKENIZER))
        return
    tiny_model(family, len(TOKENIZER)).save_pretrained(tmp_path / "model")
    if family in REFUSED:
        with refused(*REFUSED[family]):
            check(tmp_path)
        return
    if family in NOT_FOR_TEXT:
        kind, words = NOT_FOR_TEXT[family]
        with pytest.raises(kind, match=words):
            check(tmp_path)
        return
    check(tmp_path)
    for path in tmp_path.glob("checkpoint-*"):
        shutil.rmtree(path)
    excluded = NO_ADAPTER.get(family)
    if excluded != ".*":
        check(tmp_path, LoraConfig(r=2, target_modules="all-linear", exclude_modules=excluded))


def test_every_list_names_families_once():
    named = [*UNBUILT, *REFUSED, *NOT_FOR_TEXT]
    assert len(named) == len(set(named)) and set(named) | set(NO_ADAPTER) <= set(FAMILIES)
