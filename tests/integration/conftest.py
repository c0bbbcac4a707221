"""Fixtures of real launches: a workshop, a run of one process, a Slurm cluster of stand-ins."""

import json
import sys

import pytest
from launches import launch
from slurm_job import COMMON, FAKES
from tiny import CHATML, agent_rows, tiny_llama, tokenizer_for


@pytest.fixture(scope="session")
def workshop(tmp_path_factory):
    """A tiny model with tokenizer, pairs and a recipe on disk; half of the rejected sides leave chosen's path late."""
    folder = tmp_path_factory.mktemp("workshop")
    tokenizer = tokenizer_for(CHATML, "byte", eos="<|im_end|>")
    tiny_llama(tokenizer, seed=0).save_pretrained(folder / "model")
    tiny_llama(tokenizer, seed=1).save_pretrained(folder / "reference")
    tokenizer.save_pretrained(folder / "model")
    rows = agent_rows(16)
    for i, row in enumerate(rows):  # every other pair much longer
        row["chosen"][3]["content"] += " It is right." * (8 if i % 2 else 0)
        row["rejected"] = row["rejected"] if i % 4 < 2 else [*row["chosen"][:3], row["rejected"][3]]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(
        f"""
model_name_or_path: {folder}/model
ref_model_name_or_path: {folder}/reference
dtype: float32
dataset_mixer: {{{folder}/pairs.jsonl: 1.0}}
max_length: 300
learning_rate: 1.0e-3
max_grad_norm: 1.0
num_train_epochs: 1
logging_steps: 1
save_strategy: "no"
report_to: none
bf16: false
seed: 7
"""
    )
    return folder


@pytest.fixture(scope="session")
def one_process(workshop, extensions, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "out"
    code, text = launch("cpu", workshop, extensions, out, "--per_device_train_batch_size=4", "--shared_prefix=false")
    assert code == 0, text[-4000:]
    return out


@pytest.fixture
def cluster(tmp_path):
    for name, text in FAKES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(COMMON.replace("PYTHON", sys.executable) + text)
        path.chmod(0o755)
    python = tmp_path / "bin" / "python"  # a link would not find the packages of a virtual environment
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    (tmp_path / "two.yaml").touch()
    (tmp_path / "fake").mkdir()
    return tmp_path
