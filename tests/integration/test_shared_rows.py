"""Sequence parallel: rows that several ranks share are the same rows in one process."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from launches import compare, launch, launch_several, losses
from repository import ROOT
from safetensors.torch import load_file

WORKER = "tests/helpers/shared_rows_worker.py"
SMALL = 1e-5


def found_by(ranks: int, folder) -> list[dict]:
    """What each of so many ranks has found."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/helpers'}", "OMP_NUM_THREADS": "1"}
    start = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"]
    command = [*start, WORKER, str(folder / "found.json")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_shared_rows_are_whole_rows(ranks, tmp_path):
    """Log-probs, statistics, loss and gradients; tokens and scored positions are dealt out evenly. A rank's memory is
    its part of that of a whole row, and what is planned."""
    found = found_by(ranks, tmp_path)
    assert [rank.pop("refused") for rank in found] == [[False, True]] * ranks  # the same batch, and one for each rank
    for memory in (rank.pop("memory") for rank in found):
        for bytes_of in memory.values():
            assert bytes_of["alone"] == pytest.approx(bytes_of["planned"], rel=0.03)
        assert memory["False"]["alone"] * ranks == pytest.approx(memory["False"]["whole"], rel=0.06)
    assert len(found) == ranks and len(found[0]) > 30
    for name, first in found[0].items():
        of_ranks = [rank[name] for rank in found]
        errors = {key: max(rank[key] for rank in of_ranks) for key in ("scores", "loss", "gradient")}
        if name.startswith("wrong"):
            assert max(errors["scores"], errors["gradient"]) > 0.3, name
            continue
        assert errors["scores"] < SMALL and errors["loss"] < SMALL, name
        assert errors["gradient"] < (2e-2 if name == "bfloat16" else SMALL), name
        tokens, scored = first["of"]
        assert {rank["tokens"] for rank in of_ranks} == {-(-tokens // ranks) + 1}
        counts = [rank["scored"] for rank in of_ranks]
        assert sum(counts) == scored
        assert max(counts) - min(counts) <= 1 or scored < 12, (name, counts)  # a position may count several times


def shared_rows(config: str, folder, ranks: int = 2, processes: int = 2):
    """An accelerate file in which so many of the processes share each row."""
    raw = yaml.safe_load((ROOT / f"training_configs/{config}.yaml").read_text())
    raw["parallelism_config"] = {"parallelism_config_sp_size": ranks, "parallelism_config_sp_backend": "deepspeed"}
    path = folder / f"{config}.yaml"
    path.write_text(yaml.safe_dump({**raw, "num_processes": processes}))
    return path


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_zero_equals_one_process(stage, workshop, extensions, one_process, tmp_path):
    config = shared_rows(f"zero{stage}_cpu", tmp_path)
    flags = ["--per_device_train_batch_size=4", f"--eval_dataset_mixer={{{workshop}/pairs.jsonl: 1.0}}"]
    code, text = launch(config, workshop, extensions, tmp_path / "out", *flags)
    assert code == 0, text[-4000:]
    assert "4 pairs per device × 1 accumulation × 1 group of 2 processes" in text
    compare(tmp_path / "out", one_process, workshop)
    report = json.loads((tmp_path / "out/run_report.json").read_text())
    assert report["after"]["eval_pairs"] == 16


def runs_of(folder, workshop, pairs: int) -> dict[str, list[str]]:
    """Runs that one process and two groups of two ranks must agree on, `pairs` a device in a micro-batch of all."""
    lora = (workshop / "recipe.yaml").read_text().replace("ref_model_name_or_path", "# ref_model_name_or_path")
    (workshop / "lora.yaml").write_text(lora)
    size = f"--per_device_train_batch_size={pairs}"
    adapter = ["--use_peft", "--lora_r=4", "--lora_target_modules=q_proj,v_proj", "--lora_dropout=0.0"]
    ahead = ["--precompute_ref_log_probs=true", f"--reference_cache_dir={folder}/cache"]
    moving = ["--sync_ref_model", "--ref_model_sync_steps=1", "--ref_model_mixup_alpha=0.3"]
    weighted = ["--use_weighting", "--ld_alpha=0.5", "--nll_coefficient=0.3", "--loss_type=kto_pair"]
    return {
        "lora": ["lora.yaml", *adapter, size, *ahead],
        "checkpoints": ["recipe.yaml", *moving, "--save_strategy=steps", "--save_steps=2", size],
        "weighted": ["recipe.yaml", *weighted, "--shared_prefix=false", size],
    }


@pytest.fixture(scope="module")
def in_one(workshop, extensions, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one-process")
    code, text = launch_several("cpu", runs_of(folder, workshop, 4), workshop, extensions, folder)
    assert code == 0, text[-4000:]
    return folder


@pytest.fixture(scope="module")
def in_groups(workshop, extensions, tmp_path_factory):
    """The outputs of two groups of two ranks under ZeRO-3, and the text of both launches."""
    folder, texts = tmp_path_factory.mktemp("groups"), []
    runs = runs_of(folder, workshop, 2)
    accumulation = ["--per_device_train_batch_size=1", "--gradient_accumulation_steps=2", "--gradient_checkpointing"]
    runs |= {"accumulation": ["recipe.yaml", *accumulation]}
    again = {
        "resumed": [*runs["checkpoints"], f"--resume_from_checkpoint={folder}/checkpoints/checkpoint-2"],
        "lora-again": runs["lora"],
    }
    config = shared_rows("zero3_cpu", folder, processes=4)
    for launched in (runs, again):
        code, text = launch_several(config, launched, workshop, extensions, folder)
        assert code == 0, text[-4000:]
        texts.append(text)
    return folder, texts


@pytest.mark.slow
@pytest.mark.parametrize("name", ["accumulation", "weighted", "checkpoints", "resumed"])
def test_groups_equal_one_process(name, in_groups, in_one, one_process, workshop):
    one = {"accumulation": one_process, "resumed": in_one / "checkpoints"}.get(name, in_one / name)
    compare(in_groups[0] / name, one, workshop, tokens=name != "resumed")
    report = json.loads((in_groups[0] / name / "run_report.json").read_text())
    assert "2 pairs per device × 1 accumulation × 2 groups of 2 processes" in in_groups[1][0]
    if name != "resumed":
        assert report["steps"] == 4


@pytest.mark.slow
def test_lora_and_its_reference_in_groups(in_groups, in_one):
    """Each sequence is scored by one group and written by one rank; a second run finds all of them."""
    folder, (_, text) = in_groups
    for name in ("lora", "lora-again"):
        own, one = (load_file(out / "adapter_model.safetensors") for out in (folder / name, in_one / "lora"))
        assert set(own) == set(one) and len(one) == 8
        for key, wanted in one.items():
            assert (own[key] - wanted).norm() <= 1e-3 * wanted.norm() + 1e-6, key
    assert losses(folder / "lora")[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert "reference log-probs of train: 32 of 32 sequences" in text
    assert {path.name.split("-")[1] for path in (folder / "cache").glob("*/*.safetensors")} == {"0", "2"}
