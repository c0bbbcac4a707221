"""benchmarks/gpu_check.py without a GPU: it runs through on tiny models, and what does not fit is a cell, not its
end."""

import os
import subprocess
import sys

import pytest
import torch

from mdpo.config.parsing import ROOT
from mdpo.types import PairBatch


@pytest.fixture
def gpu_check(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_check

    return gpu_check


@pytest.mark.slow
def test_it_runs_through_on_a_cpu():
    """Its first table compares packed with padded batches: in float32 all differences are rounding errors."""
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks/gpu_check.sh"), sys.executable],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "130"}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split("│")[1:-1] for line in done.stdout.splitlines() if "│ float32" in line]
    assert len(rows) == 2
    for *_, logps, loss, gradients in rows:
        assert all(float(difference) <= 1e-5 for difference in (logps, loss, gradients))
    assert "half shared" in done.stdout and "needs an NVIDIA GPU" in done.stdout
    assert "public ones, of another implementation on one A800; not measured here" in done.stdout


def test_memory_that_runs_out_is_a_cell(gpu_check, monkeypatch, capsys):
    def out_of_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert gpu_check.attempt(out_of_memory) == "out of memory"
    monkeypatch.setattr(gpu_check, "model_of", out_of_memory)
    gpu_check.public_row()
    gpu_check.step_speed(0, 512, 1e9)
    gpu_check.numbers(0, 512)
    said = capsys.readouterr().out
    assert said.count("out of memory") >= 8 + 4 + 4 and "Traceback" not in said
    with pytest.raises(ZeroDivisionError):  # other errors are no cells
        gpu_check.attempt(lambda: 1 / 0)


def test_a_part_that_would_end_too_late_is_named(gpu_check, capsys):
    clock = gpu_check.Clock(minutes=1)
    assert clock.allows("numbers", 30) and not clock.allows("steps", 90)
    assert capsys.readouterr().out == "not begun, as its time would be over: steps\n"


def test_a_model_that_fits(gpu_check):
    """3B had run out of an 80 GB card. By hand for 1B: layers 16 · (2 · 2048² + 2 · 2048 · 512 + 3 · 2048 · 8192)."""
    layers, embeddings = gpu_check.weights_of(gpu_check.config(1, 128256))
    assert (layers, embeddings) == (16 * (2 * 2048**2 + 2 * 2048 * 512 + 3 * 2048 * 8192), 2 * 128256 * 2048)
    assert [gpu_check.largest(gb * 1e9, 128256) for gb in (0, 16, 80, 139, 400)] == [0, 0, 1, 3, 8]


def test_flops_by_hand(gpu_check):
    """One pair, prefix 2, own tokens 1 and 1: chosen's 3 tokens see 1 + 2 + 3, rejected's one sees 3."""
    settings = gpu_check.config(0, 512)
    packed = PairBatch(runs=[[3, -1], [1, 1]], input_ids=torch.zeros(1, 4), logp_position=torch.zeros(2))
    layers = gpu_check.weights_of(settings)[0]
    assert gpu_check.step_flops(settings, packed) == 6 * (layers * 4 + 512 * 256 * 2 + 2 * (6 + 3) * 256 * 2)
