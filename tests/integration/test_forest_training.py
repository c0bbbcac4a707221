"""Rows of several sequences through the trainer: packed, padded, and with the reference precomputed, one result."""

import pytest
import torch
from datasets import Dataset
from packed_pairs import EVERYTHING
from tiny import CHATML, tokenizer_for
from trainers import compare_metrics, mdpo_trainer

from mdpo.types import SIDES, distinct_tokens, sequence_lengths, split

TOKENIZER = tokenizer_for(CHATML, "letters", eos="<|im_end|>")


def sequences(row):
    return [ids for side in SIDES for ids in split(row[f"{side}_ids"], sequence_lengths(row, side))]


def trained(folder, **options):
    """Logs and weights of two epochs over the rows, in micro-batches of 9 pairs that share prompts."""
    rows = Dataset.from_list([
        {**row, "row": i, "distinct": distinct_tokens(sequences(row)), "key": str(i), "digest": str(i), "margin": None}
        for i, row in enumerate(EVERYTHING)
    ])  # fmt: skip
    assert len(TOKENIZER) > max(i for row in EVERYTHING for side in ("chosen", "rejected") for i in row[f"{side}_ids"])
    options = {"per_device_train_batch_size": 9, "num_train_epochs": 2, "use_weighting": True, **options}
    trainer = mdpo_trainer(folder, TOKENIZER, rows, **options)
    trainer.train()
    assert trainer.tables.train == []
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return logs, trainer.evaluate(), {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("padded"), shared_prefix=False)


@pytest.mark.parametrize("options", [{}, {"precompute_ref_log_probs": True}, {"gradient_checkpointing": True}])
def test_packed_training_is_padded_training(options, padded, tmp_path, capsys):
    if "precompute_ref_log_probs" in options:
        options = options | {"reference_cache_dir": str(tmp_path / "cache")}
    logs, metrics, weights = trained(tmp_path, **options)
    assert "shared_prefix: off" not in capsys.readouterr().out
    assert len(logs) == len(padded[0]) > 4
    for log, wanted in zip(logs, padded[0], strict=True):
        assert log["loss"] == pytest.approx(wanted["loss"], abs=1e-4) and log["num_tokens"] == wanted["num_tokens"]
    compare_metrics(metrics, padded[1], "eval_")
    for name, wanted in padded[2].items():
        torch.testing.assert_close(weights[name], wanted, rtol=1e-3, atol=1e-4, msg=name)
