"""Every causal language model of the installed transformers trains, is saved, and is resumed to the bit."""

import contextlib
import gc
import math
import shutil

import pytest
import torch
from datasets import Dataset
from families import FAMILIES, tiny_model
from peft import LoraConfig
from tiny import CHATML, agent_rows, tokenizer_for

from dpo_trainer import DPOTrainer
from mdpo.config import MDPOConfig
from mdpo.packing import unpacked
from mdpo.logprobs import score_tokens
from mdpo.types import UserError

TOKENIZER = tokenizer_for(CHATML, "letters", eos="<|im_end|>")


def trained(folder, model, resume=None, peft_config=None) -> DPOTrainer:
    """Two steps of two pairs, with a checkpoint of the first."""
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
    trainer = DPOTrainer(str(model), None, args, None, data, None, TOKENIZER, peft_config=peft_config)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in trainer.model.state_dict().items()}


def losses(trainer) -> list[float]:
    """Without the load-balancing loss of a mixture of experts."""
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return [log["loss"] - trainer.aux_loss_coef * log.get("aux_loss", 0.0) for log in logs]


def check(family, folder, peft_config=None):
    trainer = trained(folder, folder / "model", peft_config=peft_config)
    first, second = losses(trainer)
    assert abs(first - math.log(2)) < 1e-4, f"{family}: first loss {first}"
    batch = next(iter(trainer.get_train_dataloader()))
    if "segments" in batch:
        model = trainer.model.eval()
        with torch.no_grad():
            packed = score_tokens(model, trainer.layout.fit(model, batch)).logps
            padded = score_tokens(model, unpacked(batch, TOKENIZER.pad_token_id)).logps
        torch.testing.assert_close(packed, padded, rtol=1e-3, atol=1e-4)
    shutil.rmtree(folder / "checkpoint-2")
    again = trained(folder, folder / "model", folder / "checkpoint-1", peft_config)
    assert losses(again)[-1] == second
    wanted = weights(trainer)
    for name, weight in weights(again).items():
        assert torch.equal(weight, wanted[name]), name
