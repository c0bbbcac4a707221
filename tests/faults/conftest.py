"""The workshop of the fault tests: a tiny model, pairs, a recipe, and a forge to start runs with."""

import json
from pathlib import Path

import pytest
from faults.runs import Forge, LaunchedRun
from tiny import CHATML, agent_rows, tiny_llama, tokenizer_for

RECIPE = """
model_name_or_path: {folder}/model
dtype: float32
dataset_mixer: {{{folder}/pairs.jsonl: 1.0}}
eval_dataset_mixer: {{{folder}/held.jsonl: 1.0}}
max_length: 400
learning_rate: 1.0e-3
lr_scheduler_type: cosine
per_device_train_batch_size: 2
num_train_epochs: 2
logging_steps: 3
eval_strategy: steps
eval_steps: 4
save_strategy: steps
save_steps: 3
save_total_limit: 2
dataset_num_proc: 1
disable_tqdm: true
report_to: none
bf16: false
seed: 7
"""


@pytest.fixture(scope="session")
def workshop(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    tokenizer = tokenizer_for(CHATML, "byte", eos="<|im_end|>")
    tiny_llama(tokenizer, seed=0).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = agent_rows(40)
    for i, row in enumerate(rows):
        row["chosen"][3]["content"] += " It is right." * (i % 5)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:8]))
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder))
    return folder


@pytest.fixture(scope="session")
def forge(tmp_path_factory):
    forge = Forge(tmp_path_factory.mktemp("forge"))
    yield forge
    forge.close()


@pytest.fixture(scope="session")
def undisturbed(forge, workshop):
    """A run of one process, not interrupted: 40 steps, checkpoints 39 and 40."""
    run = forge.run(workshop / "recipe.yaml", f"--output_dir={workshop}/undisturbed")
    assert run.end() == 0, run.log[-3000:]
    return workshop / "undisturbed"


@pytest.fixture
def launched(workshop, extensions, tmp_path):
    """Starts a launch; what still runs of it at the end of the test is killed."""
    runs = []

    def launch(config: str, *argv: str, env: dict[str, str] | None = None) -> LaunchedRun:
        arguments = [str(workshop / "recipe.yaml"), *(str(a) for a in argv)]
        output = tmp_path / f"launch-{len(runs)}.txt"
        runs.append(LaunchedRun(config, arguments, output, {"TORCH_EXTENSIONS_DIR": str(extensions), **(env or {})}))
        return runs[-1]

    yield launch
    for run in runs:
        run.kill()
