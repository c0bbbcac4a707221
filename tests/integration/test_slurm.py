"""scripts/launch.slurm with stand-ins for Slurm's commands, the launcher and the trainer. Each does as the real one:
Slurm signals the first process of each node's step, or all of them, and kills what the first one leaves behind; the
launcher dies of USR1 and turns every code into 1; trainers checkpoint together, then rank 0 leaves a marker.
"""

import json
import os
import runpy
import shutil
import signal
import subprocess
import time

import pytest
from errors import refused
from repository import ROOT
from slurm_job import ODD, SCRIPT, TIMEOUT_S, end, real_launcher, start, until


def leave_marker(cluster):
    (cluster / "out dir").mkdir()
    (cluster / "out dir" / "PREEMPTED").write_text("of an earlier start")


REQUEUED = "scontrol requeue 123456"


def test_a_finished_run_is_not_queued_again_and_nodes_and_arguments_are_right(cluster):
    leave_marker(cluster)
    code, output, calls = end(cluster, start(cluster, "success"))
    assert (code, calls) == (0, []), output
    assert f"start 1: 2 nodes, 4 GPUs a node, head n07:13456, output_dir {cluster}/out dir" in output
    for rank in range(2):
        launch = json.loads((cluster / "fake" / f"launch-{rank}").read_text())
        assert launch["args"] == ["recipe.yaml", f"--output_dir={cluster}/out dir", *ODD]
        assert launch["flags"] == {
            "--config_file": "two.yaml",
            "--num_machines": "2",
            "--machine_rank": str(rank),
            "--num_processes": "8",
            "--main_process_ip": "n07",
            "--main_process_port": str(10000 + 123456 % 20000),
        }
        assert int(launch["timeout"]) > 30 and launch["allocator"] == "expandable_segments:True"
    steps = (cluster / "fake" / "calls").read_text()
    assert "--nodes=2 --ntasks=2 --ntasks-per-node=1" in steps and "--kill-on-bad-exit=0 --wait=0" in steps


def test_a_failed_run_is_not_queued_again_whatever_an_earlier_start_left(cluster):
    leave_marker(cluster)
    code, output, calls = end(cluster, start(cluster, "failure"))
    assert (code, calls) == (1, []), output


def test_the_accelerate_file_counts_processes_where_slurm_gives_no_gpus(cluster):
    assert end(cluster, start(cluster, "success", SLURM_GPUS_ON_NODE=""))[0] == 0
    assert "--num_processes" not in json.loads((cluster / "fake" / "launch-0").read_text())["flags"]


@pytest.mark.parametrize(("signalled", "earlier"), [("first", True), ("all", False)])
def test_the_time_limit_ends_in_a_checkpoint_and_in_the_queue(cluster, signalled, earlier):
    if earlier:
        leave_marker(cluster)
    job = start(cluster, "train", signalled=signalled)
    until(cluster, job, "ready-*")
    job.send_signal(signal.SIGUSR1)
    code, output, calls = end(cluster, job)
    assert (code, calls) == (1, ["scancel --signal=USR1 123456.0", REQUEUED]), output
    assert (cluster / "out dir" / "PREEMPTED").read_text() == "step 3"


@pytest.mark.parametrize("signalled", ["first", "all"])
def test_preemption_with_a_grace_time_signals_the_nodes_alone(cluster, signalled):
    job = start(cluster, "train")
    until(cluster, job, "ready-*")
    for node in range(2):
        kill = os.killpg if signalled == "all" else os.kill
        kill(int((cluster / "fake" / f"node-{node}").read_text()), signal.SIGTERM)
    code, output, calls = end(cluster, job)
    assert (code, calls) == (1, [REQUEUED]), output


@pytest.mark.slow
def test_accelerate_itself_lives_through_the_signal(cluster):
    """The launcher is the real one, with DeepSpeed, on two "nodes" of one process each: trainers are its children, it
    does not die of the signal, and it does not stop one rank because another has ended."""
    env = real_launcher(cluster)
    job = start(cluster, "train", signalled="all", config=ROOT / "training_configs/zero3_cpu.yaml", **env)
    until(cluster, job, "ready-*")
    job.send_signal(signal.SIGUSR1)
    code, output, calls = end(cluster, job)
    assert (code, calls[1:]) == (1, [f"scontrol requeue {env['SLURM_JOB_ID']}"]), output
    assert (cluster / "out dir" / "PREEMPTED").read_text() == "step 3"


def test_a_cancelled_job_stays_cancelled(cluster):
    """`scancel` sends TERM to all of the job, and trainers write a checkpoint; Slurm says COMPLETING meanwhile."""
    job = start(cluster, "train", state="COMPLETING")
    until(cluster, job, "ready-*")
    job.send_signal(signal.SIGTERM)
    code, output, calls = end(cluster, job)
    assert (code, calls) == (1, ["scancel --signal=USR1 123456.0"]), output
    assert (cluster / "out dir" / "PREEMPTED").exists() and "Slurm is ending the job" in output


def test_a_run_that_fails_when_asked_is_not_queued_again(cluster):
    leave_marker(cluster)
    job = start(cluster, "fails when asked")
    until(cluster, job, "ready-*")
    job.send_signal(signal.SIGUSR1)
    code, output, calls = end(cluster, job)
    assert (code, calls) == (1, ["scancel --signal=USR1 123456.0"]), output


def test_trainers_are_asked_once_they_listen(cluster):
    """A signal in the seconds of imports would kill them, and a run that was preempted then would be a failed one."""
    job = start(cluster, "late")
    until(cluster, job, "up-*")
    job.send_signal(signal.SIGUSR1)
    until(cluster, job, "calls", 1, "scancel")
    time.sleep(1)  # for a script that would not wait
    assert job.poll() is None
    (cluster / "fake" / "go").touch()
    code, output, calls = end(cluster, job)
    assert (code, calls) == (1, ["scancel --signal=USR1 123456.0", REQUEUED]), output


def test_wrong_twin_whose_launcher_is_not_deaf(cluster):
    """The stand-ins can tell: where it has no handlers the launcher dies of USR1, and its node with it."""
    line = "    signal.signal(number, lambda *_: None)\n"
    assert line in SCRIPT.read_text()
    twin = cluster / "twin.slurm"
    twin.write_text(SCRIPT.read_text().replace(line, "    pass\n"))
    job = start(cluster, "train", script=twin, signalled="all")
    until(cluster, job, "ready-*")
    job.send_signal(signal.SIGUSR1)
    assert end(cluster, job)[0] == 128 + signal.SIGUSR1


@pytest.mark.parametrize(
    ("env", "arguments", "said"),
    [
        ({"SLURM_JOB_ID": ""}, ["two.yaml"], "start it with sbatch"),
        ({}, [], "the first argument is an accelerate file"),
        ({}, ["recipes/none.yaml"], "there is no recipes/none.yaml"),
    ],
)
def test_a_wrong_start_is_refused(env, arguments, said, cluster):
    environment = {"PATH": f"{cluster / 'bin'}:/usr/bin:/bin", "SLURM_JOB_ID": "1", **env}
    done = subprocess.run(
        ["bash", SCRIPT, *arguments], cwd=cluster, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 2 and said in done.stderr


def test_a_recipe_that_is_refused_starts_nothing(cluster):
    (cluster / "scripts" / "output_dir.py").write_text("raise SystemExit('error: beta: x is not a number.')")
    job = start(cluster, "success")
    output, _ = job.communicate(timeout=TIMEOUT_S)
    assert job.returncode == 1 and "beta: x is not" in output and not (cluster / "fake" / "calls").exists()


# ------------------------------------------------------------------------------------------------ output_dir.py


def test_output_dir_is_what_a_run_would_take(tmp_path, monkeypatch, capsys):
    """From the recipe, a flag, or made from the recipe's place; libraries' words on stdout would be taken for it."""
    output_dir = runpy.run_path(str(ROOT / "scripts" / "output_dir.py"))["main"]
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "recipes" / "tiny" / "dpo" / "config_a.yaml"
    recipe.parent.mkdir(parents=True)
    recipe.write_text("model_name_or_path: no/model\ndataset_mixer: {no/data: 1.0}\nreport_to: none\n")
    before = sorted(tmp_path.rglob("*"))
    output_dir([str(recipe)])
    output_dir([str(recipe), "--output_dir=my out", "--beta=0.2"])
    recipe.write_text(recipe.read_text() + "output_dir: from/the recipe\n")
    output_dir([str(recipe)])
    assert capsys.readouterr().out.splitlines() == ["outputs/tiny/dpo/config_a", "my out", "from/the recipe"]
    assert sorted(tmp_path.rglob("*")) == before
    with refused("bet", "--bet ", "--beta?"):
        output_dir([str(recipe), "--bet=0.2"])


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs shellcheck")
def test_shellcheck_has_nothing_to_say():
    done = subprocess.run(["shellcheck", SCRIPT], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stdout
