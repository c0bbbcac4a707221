"""The real thing: `accelerate launch` with DeepSpeed ZeRO-2 and ZeRO-3, two CPU processes, against one process.

Same rows, same global batch of 4 pairs, float32. Batches hold pairs of very different lengths, so the two ranks score
unequal numbers of tokens and the LM head works in unequal numbers of chunks. The one process takes padded batches, the
others packed ones.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest
import torch
from launches import (
    TIMEOUT_S,
    command_of_several,
    compare,
    environment_of,
    launch,
    launch_several,
    losses,
    on_two_cpus,
)
from repository import ROOT
from safetensors.torch import load_file
from slurm_job import end, real_launcher, start, until
from tiny import CHATML, tokenizer_for
from transformers import AutoModelForCausalLM

from mdpo.data.tokenize import tokenize_dataset
from mdpo.forward.collators import PairCollator
from mdpo.forward.pair_logps import sum_by_pair
from mdpo.forward.token_logps import enable_scoring, score_tokens
from mdpo.masking.loss_mask import RenderSettings
from mdpo.reporting.greedy import text_of
from mdpo.reporting.shown_answers import turns_of


def own_log_probs(folder, workshop):
    """Sums of the final model's log-probs over the first two pairs, from the checkpoint as a user would load it."""
    from datasets import load_dataset

    tokenizer = tokenizer_for(CHATML, "byte", eos="<|im_end|>")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    enable_scoring(model)
    rows = load_dataset("json", data_files=str(workshop / "pairs.jsonl"), split="train")
    rows, _ = tokenize_dataset(rows, tokenizer, RenderSettings(300), "pairs")
    batch = PairCollator(tokenizer.pad_token_id)([rows[i] for i in range(16)])
    with torch.no_grad():
        return sum_by_pair(score_tokens(model, batch).logps, batch).chosen.mean().item()


def own_answers(folder, rows, workshop) -> list[str]:
    """Greedy turns of a model on the disk in the place of those that a report shows, by transformers' own generate."""
    from datasets import load_dataset

    tokenizer = tokenizer_for(CHATML, "byte", eos="<|im_end|>")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    data = load_dataset("json", data_files=str(workshop / "pairs.jsonl"), split="train")
    data, _ = tokenize_dataset(data, tokenizer, RenderSettings(300), "pairs")
    line = lambda key: key.rpartition(":")[2]  # noqa: E731
    turns = {(line(turn.key), turn.number): turn for turn in turns_of(data, tokenizer)}
    texts = []
    for row in rows:
        turn = turns[line(row["key"]), row["turn"]]
        ids, options = torch.tensor([turn.prompt]), {"do_sample": False, "max_new_tokens": turn.limit}
        new = model.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=tokenizer.eos_token_id, **options)
        texts.append(text_of(new[0, len(turn.prompt) :], tokenizer))
    return texts


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_equals_one_process(stage, workshop, extensions, one_process, tmp_path):
    out = tmp_path / "out"
    flags = [
        "--per_device_train_batch_size=2",
        f"--eval_dataset_mixer={{{workshop}/pairs.jsonl: 1.0}}",
        "--eval_on_start",
        "--show_answers=2",
    ]
    code, text = launch(f"zero{stage}_cpu", workshop, extensions, out, *flags)
    assert code == 0, text[-4000:]
    assert "2 pairs per device × 1 accumulation × 2 processes" in text
    assert "shared_prefix: off" not in text
    compare(out, one_process, workshop)
    report = json.loads((out / "run_report.json").read_text())
    assert report["after"]["eval_pairs"] == 16
    assert report["after"]["eval_logps/chosen"] == pytest.approx(own_log_probs(out, workshop), rel=1e-5)
    # A policy of random weights repeats itself; that of before training is on the disk as it was.
    found = [row["before"]["text"] for row in report["answers"]]
    assert found == own_answers(workshop / "model", report["answers"], workshop) and len(found) == 4
    assert [row["after"]["text"] for row in report["answers"]] == own_answers(out, report["answers"], workshop)
    assert "Greedy answers to 4 chosen turns" in text and "Greedy answers" in (out / "run_report.html").read_text()


MOVE = ["--sync_ref_model", "--ref_model_sync_steps=1", "--ref_model_mixup_alpha=0.3", "--save_strategy=steps"]
LORA = ["--use_peft", "--lora_r=4", "--lora_target_modules=q_proj,v_proj", "--lora_dropout=0.0"]


def several_of(folder, workshop, pairs: int) -> dict[str, list[str]]:
    """Runs that one process and ZeRO must agree on: LoRA with the reference in the step or ahead, a moving one."""
    (workshop / "lora.yaml").write_text(
        (workshop / "recipe.yaml").read_text().replace("ref_model_name_or_path", "# ref_model_name_or_path")
    )
    size = f"--per_device_train_batch_size={pairs}"
    shown = ["--show_answers=2", f"--eval_dataset_mixer={{{workshop}/pairs.jsonl: 1.0}}"]
    ahead = ["--precompute_ref_log_probs=true", f"--reference_cache_dir={folder}/cache-lora"]
    return {
        "lora": ["lora.yaml", *LORA, *shown, size],
        "lora-ahead": ["lora.yaml", *LORA, size, *ahead],
        "moving": ["recipe.yaml", *MOVE, "--save_steps=2", size],
    }


@pytest.mark.slow
def test_a_rank_without_a_turn_to_show_is_not_waited_for(workshop, extensions, tmp_path):
    """Under ZeRO-3, where `generate` would let all ranks sample as long as one does: here one has nothing to sample."""
    sides = {side: [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}]
             for side, text in (("chosen", "Hello there"), ("rejected", "No"))}  # fmt: skip
    (tmp_path / "one.jsonl").write_text(json.dumps(sides) + "\n")
    flags = ["--show_answers=1", f"--eval_dataset_mixer={{{tmp_path}/one.jsonl: 1.0}}", "--max_steps=1"]
    code, text = launch("zero3_cpu", workshop, extensions, tmp_path / "out", *flags)
    assert code == 0, text[-4000:]
    (shown,) = json.loads((tmp_path / "out/run_report.json").read_text())["answers"]
    assert shown["before"]["text"] and shown["after"]["text"]


@pytest.fixture(scope="module")
def in_one_process(workshop, extensions, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one-several")
    code, text = launch_several("cpu", several_of(folder, workshop, pairs=4), workshop, extensions, folder)
    assert code == 0, text[-4000:]
    return folder


@pytest.fixture(scope="module", params=[2, 3])
def under_zero(request, workshop, extensions, tmp_path_factory):
    """(folder, text of the first launch, of the second). Between them a shard of the reference cache is damaged."""
    folder = tmp_path_factory.mktemp(f"zero-{request.param}")
    accumulation = ["--gradient_accumulation_steps=2", "--gradient_checkpointing=true"]
    ahead = ["--per_device_train_batch_size=2", "--precompute_ref_log_probs", "--precompute_ref_batch_size=3"]
    ahead += [f"--eval_dataset_mixer={{{workshop}/pairs.jsonl: 1.0}}", f"--reference_cache_dir={folder}/cache"]
    runs = several_of(folder, workshop, pairs=2) | {
        "accumulation": ["recipe.yaml", "--per_device_train_batch_size=1", *accumulation],
        "ahead": ["recipe.yaml", *ahead],
    }
    again = {
        "ahead-again": runs["ahead"],
        "moving-again": [*runs["moving"], f"--resume_from_checkpoint={folder}/moving/checkpoint-2"],
    }
    texts = []
    for launched in (runs, again):
        code, text = launch_several(f"zero{request.param}_cpu", launched, workshop, extensions, folder)
        assert code == 0, text[-4000:]
        texts.append(text)
        shards = {path.name.split("-")[1]: path for path in (folder / "cache").glob("*/*.safetensors")}
        os.truncate(shards["0"], 100)  # of rank 0: batches 0, 2 and 4 of 3, 3, 3, 3, 3 and 1 pairs
    return folder, *texts


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "lora-ahead"])
def test_lora_under_zero(name, under_zero, in_one_process):
    two, one = (load_file(folder / name / "adapter_model.safetensors") for folder in (under_zero[0], in_one_process))
    assert set(one) == set(two) and len(one) == 8
    for key, wanted in one.items():
        assert (two[key] - wanted).norm() <= 1e-3 * wanted.norm() + 1e-6, key
    assert losses(in_one_process / name)[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    reports = [
        json.loads((folder / name / "run_report.json").read_text()) for folder in (under_zero[0], in_one_process)
    ]
    assert reports[0]["answers"] == reports[1]["answers"] and len(reports[0]["answers"]) == 4 * (name == "lora")


@pytest.mark.slow
def test_accumulation_and_checkpointing_under_zero(under_zero, one_process, workshop):
    compare(under_zero[0] / "accumulation", one_process, workshop)


@pytest.mark.slow
def test_precomputed_reference_under_zero(under_zero, one_process, workshop):
    """The same weights as with the reference in memory. Both ranks write shards; with one of them damaged a second run
    computes its sequences alone, and again ends with the same weights."""
    folder, *texts = under_zero
    for run, text, known in zip(("ahead", "ahead-again"), texts, (0, 14), strict=True):
        assert f"reference log-probs of train: {known} of 32 sequences from {folder}/cache/" in text
        assert "reference log-probs of eval: 32 of 32" in text
        compare(folder / run, one_process, workshop)
        assert json.loads((folder / run / "run_report.json").read_text())["after"]["eval_pairs"] == 16


@pytest.mark.slow
def test_a_moving_reference_under_zero(under_zero, in_one_process, workshop, tmp_path):
    """The reference moves after every step, whole or partitioned; a resumed run from a checkpoint has it back."""
    one, two, again = in_one_process / "moving", under_zero[0] / "moving", under_zero[0] / "moving-again"
    compare(two, one, workshop)
    base = load_file(workshop / "reference" / "model.safetensors")
    moved, wanted = (load_file(out / "checkpoint-2" / "reference" / "model.safetensors") for out in (two, one))
    for name, weight in wanted.items():
        assert (moved[name] - weight).norm() <= 1e-3 * (weight - base[name]).norm(), name
    tmp_path.joinpath("new").touch()  # what every rank wrote has the mode of a new file, but that it may be a program
    modes = {path.stat().st_mode & ~0o111 for path in two.rglob("*") if path.is_file()}
    assert modes == {tmp_path.joinpath("new").stat().st_mode}
    compare(again, one, workshop, tokens=False)  # num_tokens begins anew, as in TRL


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def launch_two_nodes(runs, workshop, extensions, folder):
    """A launcher for each of two "machines", as a job of two nodes has; they share the home and the output folder."""
    nodes, port, config = [], free_port(), on_two_cpus("zero3_two_nodes", folder)
    for rank in range(2):
        where = ["--machine_rank", str(rank), "--main_process_ip", "127.0.0.1"]
        command = command_of_several(config, runs, workshop, folder, port=port, more=where)
        with open(folder / f"node-{rank}.txt", "w") as log:
            output = {"stdout": log, "stderr": subprocess.STDOUT}
            env = environment_of(extensions, {"PYTHONPATH": str(ROOT)})
            nodes.append(subprocess.Popen(command, cwd=ROOT, env=env, **output))
    try:
        codes = [node.wait(timeout=TIMEOUT_S) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
            node.wait()
    return codes, [(folder / f"node-{rank}.txt").read_text() for rank in range(2)]


@pytest.mark.slow
def test_two_nodes_equal_one_process(workshop, extensions, one_process, tmp_path):
    """Both have a process of LOCAL_RANK 0, and only the first node's may speak and write into the shared folder."""
    flags = ["--per_device_train_batch_size=2", f"--eval_dataset_mixer={{{workshop}/pairs.jsonl: 1.0}}"]
    flags += ["--save_strategy=steps", "--save_steps=2"]
    ahead = ["--precompute_ref_log_probs=true", f"--reference_cache_dir={tmp_path}/cache"]
    runs = {"in-the-step": ["recipe.yaml", *flags], "ahead": ["recipe.yaml", *flags, *ahead]}
    codes, (first, second) = launch_two_nodes(runs, workshop, extensions, tmp_path)
    assert codes == [0, 0], first[-4000:] + second[-4000:]
    line = "global batch 4 = 2 pairs per device × 1 accumulation × 2 processes"
    assert first.count(line) == 2 and line not in second
    for out in (tmp_path / name for name in runs):
        compare(out, one_process, workshop)
        assert json.loads((out / "run_report.json").read_text())["after"]["eval_pairs"] == 16
        states = sorted(path.name for path in (out / "checkpoint-2").glob("**/*_optim_states.pt"))
        assert [name.split("_")[3] for name in states] == ["0", "1"], states  # each node's part of the optimizer
    shards = {path.name.split("-")[1] for path in (tmp_path / "cache").glob("*/*.safetensors")}
    assert shards == {"0", "1"}


@pytest.mark.slow
def test_a_slurm_job_is_preempted_and_goes_on(cluster, workshop, extensions, tmp_path):
    """scripts/launch.slurm with accelerate and the trainer themselves on two "nodes", Slurm alone is stood in for. The
    same command again takes the steps that are left."""
    own = {name: value for name, value in environment_of(extensions).items() if name.startswith(("HF_", "MDPO_TEST"))}
    own |= {"TORCH_EXTENSIONS_DIR": str(extensions), "OMP_NUM_THREADS": "1", **real_launcher(cluster)}
    run = [str(workshop / "recipe.yaml"), f"--output_dir={tmp_path}/my out", "--max_steps=40"]
    for begun in (False, True):
        log = tmp_path / f"log-{begun}.txt"
        job = start(cluster, "", config=on_two_cpus("zero3_two_nodes", tmp_path), run=run, cwd=ROOT, log=log, **own)
        if not begun:
            until(cluster, job, log, 1, "/40  loss")
            job.send_signal(signal.SIGUSR1)
        code, output, calls = end(cluster, job, log)
        requeued = [call for call in calls if call.startswith("scontrol")]
        assert (code, requeued) == (int(not begun), [f"scontrol requeue {own['SLURM_JOB_ID']}"]), output[-4000:]
    assert "resuming from" in output
    assert [log["step"] for log in losses(tmp_path / "my out")] == list(range(1, 41))


@pytest.mark.slow
def test_offload_equals_one_process(workshop, extensions, one_process, tmp_path):
    flags, config = ["--per_device_train_batch_size=2"], on_two_cpus("zero3_offload_for_dpo", tmp_path)
    code, text = launch(config, workshop, extensions, tmp_path / "out", *flags)
    assert code == 0, text[-4000:]
    assert list(extensions.glob("**/cpu_adam*"))  # what DeepSpeed takes where optimizer states are offloaded
    compare(tmp_path / "out", one_process, workshop)


@pytest.mark.slow
def test_stale_build_lock_is_named_and_removed(workshop, extensions, tmp_path):
    """Beside an operator that is built: the next start would wait for the lock all the same."""
    shutil.copytree(extensions, tmp_path / "extensions")
    lock = tmp_path / "extensions" / "deepspeed_shm_comm" / "lock"
    lock.touch()
    flags = ["--per_device_train_batch_size=2", "--max_steps=1"]
    code, text = launch("zero2_cpu", workshop, tmp_path / "extensions", tmp_path / "out", *flags)
    assert code == 0, text[-4000:]
    assert f"Removed {lock}" in text
    assert not lock.exists()


@pytest.mark.slow
def test_user_error_ends_a_launch_with_a_short_message(workshop, extensions, tmp_path):
    code, text = launch("zero2_cpu", workshop, extensions, tmp_path / "out", "--bet=0.2")
    assert code == 1
    assert "--beta" in text
    assert text.count("Traceback") <= 1  # the launcher's own; none of ours
    assert 'run_dpo.py", line' not in text


def test_zero3_gathers_the_head_once_each_way_whatever_the_counts(extensions, tmp_path):
    """Rank 0 scores two chunks of tokens while rank 1 scores none: one gather per chunk would crash here."""
    environment = {
        **os.environ,
        "TORCH_EXTENSIONS_DIR": str(extensions),
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/helpers'}",
    }
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
         str(ROOT / "tests/helpers/zero3_head_worker.py"), str(tmp_path / "found.json")],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    everyone = json.loads((tmp_path / "found.json").read_text())
    # 25 shared and 2 × 15 own tokens, and the six of a second sequence; 2 × 12
    assert [[packed["tokens"] for packed in rank["packed"]] for rank in everyone] == [[61] * 4, [24] * 4]
    for rank in everyone:
        for packed, limit in zip(rank["packed"], (1e-5, 1e-1, 1e-5, 1e-1), strict=True):  # ZeRO-3, ZeRO-2; bfloat16
            assert packed["fused"] and packed["error"] <= limit
    ranks = [rank["steps"] for rank in everyone]
    assert [[step["tokens"] for step in steps] for steps in ranks] == [[78, 78, 0], [0, 10, 0]]
    for steps in ranks:
        for step in steps:
            assert step["gathers"] == ["forward", "backward"], step
    first, second, third = ranks[0]
    assert first["loss"] > 0 and first["norm"] > 0 and second["norm"] != first["norm"]
    assert third["loss"] == 0 and third["norm"] == 0
    assert [s["norm"] for s in ranks[1]] == [s["norm"] for s in ranks[0]]
