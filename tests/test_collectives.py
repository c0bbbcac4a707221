"""Both ranks make the same collectives in the same order, with rows of very different lengths: what one rank alone
does, the other waits for until NCCL's limit.

What Python calls is noted on each rank with shapes and dtypes, and around steps, evaluations and checkpoints how many
collectives the process group has seen, DDP's in C++ too. Under ZeRO torch compares each of them before it is made as
well (DETAIL, under which DDP of torch 2.13 dies on a CPU).
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file
from test_launch import LAUNCHER, TIMEOUT_S, extensions  # noqa: F401
from tiny import CHATML, agent_rows, tiny_llama, tokenizer_for

ROOT = Path(__file__).resolve().parent.parent
WORKER = str(ROOT / "tests/collectives_worker.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
ACCELERATE = [*LAUNCHER, "--main_process_port", "0", "--config_file"]
LAUNCHES = {
    "ddp": TORCHRUN,
    "zero2": [*ACCELERATE, "training_configs/zero2_cpu.yaml"],
    "zero3": [*ACCELERATE, "training_configs/zero3_cpu.yaml"],
}
RECIPE = """
model_name_or_path: {folder}/model
dtype: float32
dataset_mixer: {{{folder}/pairs.jsonl: 1.0}}
eval_dataset_mixer: {{{folder}/held.jsonl: 1.0}}
max_length: 400
learning_rate: 1.0e-3
per_device_train_batch_size: 1
per_device_eval_batch_size: 2
gradient_accumulation_steps: 2
max_steps: 4
logging_steps: 1
eval_strategy: steps
eval_steps: 2
save_strategy: steps
save_steps: 2
load_best_model_at_end: true
precompute_ref_log_probs: true
reference_cache_dir: {folder}/cache
train_sampling_strategy: sequential
dataset_num_proc: 1
disable_tqdm: true
report_to: none
bf16: false
seed: 7
"""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A model whose head is tied; every other row, which is rank 1's, is several times as long. 9 rows to evaluate on
    fill no batches of 2 ranks."""
    folder = tmp_path_factory.mktemp("collectives")
    tokenizer = tokenizer_for(CHATML, "byte", eos="<|im_end|>")
    tiny_llama(tokenizer, seed=0, tie_word_embeddings=True).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = agent_rows(25)
    for i, row in enumerate(rows):
        row["chosen"][3]["content"] += " It is right." * (12 if i % 2 else 0)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:16]))
    (folder / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[16:]))
    return folder


def launch(kind, workshop, extensions, folder, **env):  # noqa: F811
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(folder=workshop) + ("use_cpu: true\n" if kind == "ddp" else ""))
    own = {"TORCH_EXTENSIONS_DIR": str(extensions), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    own |= {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "TORCH_DISTRIBUTED_DEBUG": "OFF" if kind == "ddp" else "DETAIL",
        **env,
    }
    done = subprocess.run(
        [*LAUNCHES[kind], WORKER, str(folder), str(recipe), f"--output_dir={folder}/out"],
        env={**os.environ, **own}, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", LAUNCHES)
def test_both_ranks_make_the_same_collectives(kind, workshop, extensions, tmp_path):  # noqa: F811
    code, text = launch(kind, workshop, extensions, tmp_path)
    assert code == 0, text[-4000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    for i, (mine, other) in enumerate(zip(first["notes"], second["notes"], strict=False)):
        assert mine == other, f"collective {i}: {mine} and {other}"
    assert len(first["notes"]) == len(second["notes"]) and first["turns"] == second["turns"] > 40
    found = Counter(name for name, _ in first["notes"])
    # 8 micro-batches of the first start and 4 of the second; at its end each start evaluates once more.
    assert found["begin step"] == 12 and found["begin saving"] == 3 and found["begin evaluation"] == 5
    assert f"going on from {tmp_path}/out/checkpoint-2" in text
    assert found["all_gather"] > 2 * 12 and found["all_gather_object"] > 0
    if kind != "ddp":
        assert found["all_reduce"] or found["reduce_scatter_tensor"] or found["reduce_scatter"]
    heads_are_written_once(kind, tmp_path, first, second)
    again, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "first"))
    assert all(bool((again[name] == whole[name]).all()) for name in whole)


def heads_are_written_once(kind, folder, first, second):
    """Under ZeRO-2 rank 0 alone copies weights: 2 checkpoints and the end, then 1 and the end."""
    assert (first["copies"], second["copies"]) == ((5, 0) if kind == "zero2" else (0, 0))
    for file in (
        "out/model.safetensors",
        "first/checkpoint-2/model.safetensors",
        "first/checkpoint-4/model.safetensors",
    ):
        with safe_open(folder / file, "pt") as tensors:
            names = set(tensors.keys())
        assert len(names & {"lm_head.weight", "model.embed_tokens.weight"}) == 1, file
        assert len(names) == 1 + 9 * 2 + 1


@pytest.mark.slow
def test_a_rank_that_leaves_a_gather_out_is_noticed(workshop, extensions, tmp_path):  # noqa: F811
    code, text = launch("zero2", workshop, extensions, tmp_path, SKIP="1")
    assert code != 0
    assert "Detected mismatch between collectives on ranks" in text, text[-4000:]
