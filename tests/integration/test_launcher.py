"""A run that is meant for GPUs does not train on the CPU without a word."""

import os
import subprocess
import sys

import pytest
import torch
import yaml
from errors import refused
from repository import ROOT

import mdpo.config.launcher
from mdpo.config.launcher import launch_request, nvidia_driver, refuse_parallel_launch, refuse_unusable_gpus


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine whose torch finds no GPU, in no launch; `driver` writes the kernel driver's version file."""
    for name in ("ACCELERATE_USE_CPU", "ACCELERATE_USE_DEEPSPEED", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(mdpo.config.launcher, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(mdpo.config.launcher, "launch_request", lambda: (None, False))
    return monkeypatch


def driver(tmp_path):
    text = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  470.57.02  Release Build\nGCC version:  gcc 12\n"
    (tmp_path / "version").write_text(text)


def test_a_laptop_trains_on_its_cpu(machine):
    assert nvidia_driver() is None
    assert not refuse_unusable_gpus(False)


@pytest.mark.parametrize("variable", [("ACCELERATE_USE_DEEPSPEED", "true"), ("WORLD_SIZE", "8")])
def test_a_launch_for_gpus_that_torch_cannot_use_is_an_error(machine, variable, tmp_path):
    machine.setenv(*variable)
    driver(tmp_path)
    with refused("use_cpu", torch.__version__, "CUDA", "driver: 470.57.02", "zero2_cpu.yaml", "use_cpu: true"):
        refuse_unusable_gpus(False)
    refuse_unusable_gpus(True)  # the recipe asks for the CPU
    machine.setattr(mdpo.config.launcher, "launch_request", lambda: ("x.yaml", True))  # the accelerate file does
    refuse_unusable_gpus(False)
    machine.setattr(torch.accelerator, "is_available", lambda: True)
    machine.setattr(mdpo.config.launcher, "launch_request", lambda: ("x.yaml", False))
    refuse_unusable_gpus(False)


def test_one_process_beside_a_driver_is_told(machine, tmp_path):
    driver(tmp_path)
    (line,) = refuse_unusable_gpus(False)
    assert line.startswith("warning: training on the CPU: torch") and "470.57.02" in line
    machine.setenv("CUDA_VISIBLE_DEVICES", "")  # asks for the CPU
    assert not refuse_unusable_gpus(False)
    machine.delenv("CUDA_VISIBLE_DEVICES")
    machine.setenv("ACCELERATE_USE_CPU", "True")
    assert not refuse_unusable_gpus(False)


STAND_IN = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, 'run_dpo.py']))"
ASK = (
    "import sys; sys.path.insert(0, {root!r}); from mdpo.config.launcher import launch_request; print(launch_request())"
)


@pytest.mark.parametrize(
    ("words", "content", "expected"),
    [
        (["--config_file", "gpu.yaml"], {"use_cpu": False}, ("gpu.yaml", False)),
        (["--config_file=cpu.yaml", "--num_processes", "2"], {"use_cpu": True}, ("cpu.yaml", True)),
        (["--config_file", "gpu.yaml", "--use_cpu"], {"use_cpu": False}, ("gpu.yaml", True)),
    ],
)
def test_the_accelerate_file_is_found_above_this_process(tmp_path, words, content, expected):
    """The launcher stands in for `accelerate launch`, with a process between; arguments behind the script are ours."""
    (tmp_path / expected[0]).write_text(yaml.safe_dump(content))
    (tmp_path / "run_dpo.py").write_text(ASK.format(root=str(ROOT)))
    launcher = [sys.executable, "-c", STAND_IN, "launch", *words, "run_dpo.py", "--use_cpu"]
    done = subprocess.run(launcher, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "HF_HOME": "/x"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == str(expected)


@pytest.mark.parametrize("content", [{}, {"parallelism_config": {}}, {"parallelism_config": {"tp_size": 1}}])
def test_a_launch_of_whole_pairs_passes(tmp_path, monkeypatch, content):
    above(tmp_path, monkeypatch, content)
    refuse_parallel_launch()


def test_an_accelerate_file_that_splits_sequences_is_refused_though_a_launch_on_cpus_hands_it_to_nobody(
    tmp_path, monkeypatch
):
    above(tmp_path, monkeypatch, {"parallelism_config": {"parallelism_config_tp_size": 2, "dp_shard_size": 1}})
    with refused("parallelism_config", "parallelism_config_tp_size: 2 in x.yaml "):
        refuse_parallel_launch()


@pytest.mark.parametrize(
    ("content", "flags"),
    [
        ({"parallelism_config": {"parallelism_config_sp_size": 2}}, []),
        ({}, ["--parallelism_config_sp_size", "2"]),
        ({}, ["--parallelism_config_sp_size=2"]),
    ],
)
def test_sequence_parallel_that_the_launcher_keeps_to_itself(tmp_path, monkeypatch, content, flags):
    """It passes on a file's parallelism_config, and flags beside it, but neither without the other."""
    above(tmp_path, monkeypatch, content, *flags)
    with refused("parallelism_config", "sp_size: 2", "--use_deepspeed"):
        refuse_parallel_launch()
    monkeypatch.setenv("PARALLELISM_CONFIG_SP_SIZE", "2")
    refuse_parallel_launch()


def above(folder, monkeypatch, content, *flags):
    (folder / "x.yaml").write_text(yaml.safe_dump(content))
    words = ["python", "accelerate", "launch", "--config_file", "x.yaml", *flags, "run_dpo.py"]
    monkeypatch.setattr(mdpo.config.launcher, "_ancestors", lambda: iter([(words, str(folder))]))


def test_no_launcher_above(monkeypatch):
    monkeypatch.setattr(
        mdpo.config.launcher, "_ancestors", lambda: iter([(["bash"], "/"), (["python", "-m", "pytest"], "/")])
    )
    assert launch_request() == (None, False)
