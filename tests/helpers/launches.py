"""Real launches: command, environment, results."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from repository import ROOT
from safetensors.torch import load_file

LAUNCHER = [sys.executable, "-m", "accelerate.commands.launch"]
TIMEOUT_S = 400  # the first start compiles DeepSpeed's operator


def launcher_of(config, port="0", more=()):
    file = config if isinstance(config, Path) else f"training_configs/{config}.yaml"
    return [*LAUNCHER, "--config_file", str(file), "--main_process_port", port, *more]


def command_of(config, workshop, out, *flags, recipe="recipe.yaml"):
    return [*launcher_of(config), "run_dpo.py", str(workshop / recipe), f"--output_dir={out}", *flags]


def command_of_several(config, runs: dict[str, list[str]], workshop, folder, worker="several_runs", **launcher):
    """Runs in the processes of one launch, name -> [recipe, flag, …]; their outputs are folder/name."""
    commands = [[n, [str(workshop / run[0]), *run[1:], f"--output_dir={folder / n}"]] for n, run in runs.items()]
    (folder / "runs.json").write_text(json.dumps(commands))
    return [*launcher_of(config, **launcher), f"tests/helpers/{worker}.py", str(folder / "runs.json")]


def environment_of(extensions, env=None):
    variables = {"TORCH_EXTENSIONS_DIR": str(extensions), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **variables, **(env or {})}


def launch(config, workshop, extensions, out, *flags, env=None, **options):
    return finished(command_of(config, workshop, out, *flags, **options), environment_of(extensions, env))


def launch_several(config, runs, workshop, extensions, folder, worker="several_runs", env=None):
    command = command_of_several(config, runs, workshop, folder, worker)
    return finished(command, environment_of(extensions, {"PYTHONPATH": str(ROOT), **(env or {})}))


def finished(command, env) -> tuple[int, str]:
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=TIMEOUT_S)
    return result.returncode, result.stdout + result.stderr


def losses(out):
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [log for log in history if "loss" in log]


def compare(out, one, workshop, tokens=True):
    weights, expected = load_file(out / "model.safetensors"), load_file(one / "model.safetensors")
    base = load_file(workshop / "model" / "model.safetensors")
    assert set(weights) == set(expected)
    for name in expected:
        moved = (expected[name] - base[name]).norm()
        assert moved > 0, f"{name} was not trained"
        assert (weights[name] - expected[name]).norm() <= 1e-3 * moved, name
    for a, b in zip(losses(out), losses(one), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
        assert a["rewards/margins"] == pytest.approx(b["rewards/margins"], abs=1e-3)
        assert a["num_tokens"] == b["num_tokens"] or not tokens


def on_two_cpus(config, folder, **more) -> Path:
    """An accelerate file for GPUs, changed to two CPU processes. The launcher's flag --cpu would start one process
    without DeepSpeed."""
    raw = yaml.safe_load((ROOT / f"training_configs/{config}.yaml").read_text())
    path = folder / f"{config}_on_cpu.yaml"
    path.write_text(yaml.safe_dump({**raw, "use_cpu": True, "mixed_precision": "no", "num_processes": 2, **more}))
    return path


def plus_on_cpus(folder, processes=4, partition=2, **zero) -> Path:
    """The accelerate file of ZeRO++ for GPUs, changed to CPU processes in groups of `partition`. Nothing is too small
    to be sharded there, as all weights of a tiny model would be; `zero` changes further keys of zero_optimization."""
    raw = yaml.safe_load((ROOT / "training_configs/zero3_plus_plus_two_nodes.yaml").read_text())
    engine = json.loads((ROOT / raw["deepspeed_config"]["deepspeed_config_file"]).read_text())
    sizes = {"zero_hpz_partition_size": partition, "stage3_param_persistence_threshold": 0}
    engine["zero_optimization"] |= sizes | zero
    (folder / "engine.json").write_text(json.dumps(engine))
    raw["deepspeed_config"]["deepspeed_config_file"] = str(folder / "engine.json")
    (folder / "plus.yaml").write_text(
        yaml.safe_dump({**raw, "use_cpu": True, "num_machines": 1, "num_processes": processes})
    )
    return folder / "plus.yaml"
