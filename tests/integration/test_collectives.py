"""Both ranks make the same collectives in the same order, with rows of very different lengths: what one rank alone
does, the other waits for until NCCL's limit.

What Python calls is noted on each rank with shapes and dtypes, and around steps, evaluations and checkpoints how many
collectives the process group has seen, DDP's in C++ too.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import zip_longest
from pathlib import Path

import pytest
from launches import LAUNCHER, TIMEOUT_S
from repository import ROOT
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import CHATML, agent_rows, tiny_llama, tokenizer_for

WORKER = str(ROOT / "tests/helpers/collectives_worker.py")
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


def command(kind, workshop, extensions, folder, **env):
    """(arguments, keywords) of subprocess."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(folder=workshop) + ("use_cpu: true\n" if kind == "ddp" else ""))
    own = {"TORCH_EXTENSIONS_DIR": str(extensions), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    own |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests/helpers'}"}
    words = [*LAUNCHES[kind], WORKER, str(folder), str(recipe), f"--output_dir={folder}/out"]
    return words, {"env": {**os.environ, **own, **env}, "cwd": ROOT, "text": True}


@pytest.mark.slow
@pytest.mark.parametrize("kind", LAUNCHES)
def test_both_ranks_make_the_same_collectives(kind, workshop, extensions, tmp_path):
    words, options = command(kind, workshop, extensions, tmp_path)
    done = subprocess.run(words, **options, capture_output=True, timeout=TIMEOUT_S)
    text = done.stdout + done.stderr
    assert done.returncode == 0, text[-4000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    for i, (mine, other) in enumerate(zip(first["notes"], second["notes"], strict=False)):
        assert mine == other, f"collective {i}: {mine} and {other}"
    assert len(first["notes"]) == len(second["notes"]) and first["turns"] == second["turns"] > 40
    found = Counter(name for name, _ in first["notes"])
    # 8 micro-batches of the first start and 4 of the second; at its end each start evaluates once more.
    assert found["begin step"] == 12 and found["begin saving"] == 3 and found["begin evaluation"] == 5
    assert f"resuming from {tmp_path}/out/checkpoint-2" in text
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


def first_difference(folder) -> list | None:
    """What the two ranks do at the first place where they part; None for a rank that does nothing more."""
    try:
        notes = [[json.loads(line) for line in (folder / f"{rank}.txt").read_text().splitlines()] for rank in range(2)]
    except (FileNotFoundError, ValueError):  # not yet, or a line in the making
        return None
    return next(([mine, other] for mine, other in zip_longest(*notes) if mine != other), None)


@pytest.mark.slow
def test_a_rank_that_leaves_a_gather_out_is_noticed(workshop, extensions, tmp_path):
    """The control. Such a run hangs, and is ended when its notes have been apart for a while."""
    words, options = command("ddp", workshop, extensions, tmp_path, SKIP="1")
    with open(tmp_path / "log", "w") as log:
        run = subprocess.Popen(words, **options, stdout=log, stderr=log, start_new_session=True)
    try:
        end, apart, found = time.monotonic() + TIMEOUT_S, 0, None
        while apart < 20 and run.poll() is None and time.monotonic() < end:
            time.sleep(0.5)
            before, found = found, first_difference(tmp_path)
            apart = apart + 1 if found and found == before else 0
    finally:
        for process in Path("/proc").glob("[0-9]*"):  # torchrun's workers have sessions of their own
            with contextlib.suppress(OSError):
                if str(tmp_path).encode() in (process / "cmdline").read_bytes():
                    os.kill(int(process.name), signal.SIGKILL)
        run.wait()
    assert found is not None, (tmp_path / "log").read_text()[-4000:]
    assert found[0][0] == "all_gather" and found[1] is None
