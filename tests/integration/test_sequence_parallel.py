"""Sequence parallel: rows that several ranks share are the same rows in one process."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from launches import compare, launch, launch_several, losses
from repository import ROOT

WORKER = "tests/helpers/sequence_parallel_worker.py"
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
    """Log-probs, statistics, loss and gradients; tokens and scored positions are dealt out evenly."""
    found = found_by(ranks, tmp_path)
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
        assert {rank["tokens"] for rank in of_ranks} == {-(-tokens // ranks)}
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


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_equals_one_process(stage, workshop, extensions, one_process, tmp_path):
    config = shared_rows(f"zero{stage}_cpu", tmp_path)
    flags = ["--per_device_train_batch_size=4", f"--eval_dataset_mixer={{{workshop}/pairs.jsonl: 1.0}}"]
    code, text = launch(config, workshop, extensions, tmp_path / "out", *flags)
    assert code == 0, text[-4000:]
    assert "4 pairs per device × 1 accumulation × 1 groups of 2 processes" in text
    compare(tmp_path / "out", one_process, workshop)
    report = json.loads((tmp_path / "out/run_report.json").read_text())
    assert report["after"]["eval_pairs"] == 16
