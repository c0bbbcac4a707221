"""ZeRO-2 reduces gradients while backward goes on: what the engine is told, what it holds, and that results stay."""

import json
import subprocess
import types

import pytest
from errors import refused
from launches import TIMEOUT_S, command_of, compare, environment_of, on_two_cpus
from repository import ROOT

from mdpo.config.deepspeed_file import find_deepspeed_file
from mdpo.memory.sharding import overlap_reduction


def plugin(**zero):
    return types.SimpleNamespace(deepspeed_config={"zero_optimization": zero})


@pytest.mark.parametrize(
    ("zero", "after"),
    [
        ({"stage": 2}, True),
        ({"stage": 2, "overlap_comm": False}, False),  # the user's word
        ({"stage": 3}, None),  # DeepSpeed's own default does it
        ({"stage": 1}, None),
    ],
)
def test_when_it_is_set(zero, after):
    made = plugin(**zero)
    said = overlap_reduction(made)
    assert made.deepspeed_config["zero_optimization"].get("overlap_comm") is after
    assert (said is not None) is (zero == {"stage": 2}) and overlap_reduction(None) is None


def test_a_key_that_accelerate_passes_over_is_named(monkeypatch):
    """What its launcher sets for a file with `deepspeed_config: {overlap_comm: false}`: names without values."""
    monkeypatch.setenv("ACCELERATE_CONFIG_DS_FIELDS", "zero_stage,overlap_comm,mixed_precision")
    with refused("overlap_comm", "deepspeed_config_file"):
        find_deepspeed_file()


def test_deepspeed_s_defaults_are_what_is_relied_on():
    """By stage; and an accelerate file has no key for it, so that it is set by run_dpo.py."""
    from accelerate.commands.launch import launch_command_parser
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    assert [DeepSpeedZeroConfig(stage=stage).overlap_comm for stage in (2, 3)] == [False, True]
    assert "overlap_comm" not in vars(launch_command_parser().parse_args(["run_dpo.py"]))


@pytest.mark.slow
def test_the_file_for_gpus_overlaps_and_equals_one_process(workshop, extensions, one_process, tmp_path):
    """Two processes under zero2_for_dpo.yaml, with buckets so small that both of them are filled in each backward.
    A CPU has no streams: that copies wait for each other on a GPU cannot be seen here."""
    config, notes = on_two_cpus("zero2_for_dpo", tmp_path), tmp_path / "notes.json"
    command = command_of(config, workshop, tmp_path / "out", "--per_device_train_batch_size=2")
    at = command.index("run_dpo.py")
    command[at : at + 1] = ["tests/helpers/overlap_worker.py", str(notes)]
    env = environment_of(extensions, {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests/helpers'}"})
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert done.stdout.count("overlap_comm: true") == 1
    seen = json.loads(notes.read_text())
    assert seen["overlap_comm"] is True
    assert seen["used"] == [0, 1]
    assert [3000, 3000] in seen["buffers"]  # what mdpo/memory/breakdown.py plans: two buckets
    compare(tmp_path / "out", one_process, workshop)
