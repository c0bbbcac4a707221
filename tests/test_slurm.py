"""scripts/launch.slurm with stand-ins for Slurm's commands, the launcher and the trainer. Each does as the real one:
Slurm signals the first process of each node's step, or all of them, and kills what the first one leaves behind; the
launcher dies of USR1 and turns every code into 1; trainers checkpoint together, then rank 0 leaves a marker.
"""

import json
import os
import random
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from mdpo.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "launch.slurm"
TIMEOUT_S = 240
ODD = ["--run_name=two words", '--hub_model_id=a"b$HOME*', "--tokenizer_name_or_path="]
COMMON = """#!PYTHON -IS
import json, os, signal, subprocess, sys, threading, time
from pathlib import Path
fake = Path(os.environ["FAKE"])
def note(line):
    with open(fake / "calls", "a") as calls:
        calls.write(line + "\\n")
"""
FAKES = {
    "bin/srun": """
words = sys.argv[1:]
command = words[next(i for i, word in enumerate(words) if not word.startswith("--")):]
note("srun " + " ".join(word for word in words if word.startswith("--") and "=" in word and " " not in word))
nodes = []
for node in range(2):
    env = {**os.environ, "SLURM_NODEID": str(node), "SLURM_PROCID": str(node)}
    nodes.append(subprocess.Popen(command, env=env, start_new_session=True))
    (fake / f"node-{node}").write_text(str(nodes[-1].pid))
codes = [0, 0]
def end(i):
    codes[i] = nodes[i].wait()
    try:
        os.killpg(nodes[i].pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
threads = [threading.Thread(target=end, args=(i,)) for i in range(2)]
[t.start() for t in threads], [t.join() for t in threads]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
""",
    "bin/scancel": """
note("scancel " + " ".join(sys.argv[1:]))
name = next(word for word in sys.argv if word.startswith("--signal=")).partition("=")[2]
for node in fake.glob("node-*"):
    kill = os.killpg if os.environ["SIGNALLED"] == "all" else os.kill
    kill(int(node.read_text()), getattr(signal, "SIG" + name))
""",
    "bin/scontrol": """
if sys.argv[1:3] == ["show", "hostnames"]:
    print(*sys.argv[3].split(","), sep="\\n")
elif sys.argv[1:3] == ["show", "job"]:
    print(f"JobId={sys.argv[3]} JobName=mdpo\\n   JobState={os.environ['STATE']} Reason=None")
else:
    note("scontrol " + " ".join(sys.argv[1:]))
""",
    "bin/accelerate": """
words = sys.argv[1:]
at = words.index("run_dpo.py")
flags = dict(zip(words[1:at:2], words[2:at:2]))
own = {"flags": flags, "args": words[at + 1:], "timeout": os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]}
own["allocator"] = os.environ["PYTORCH_ALLOC_CONF"]
(fake / f"launch-{flags['--machine_rank']}").write_text(json.dumps(own))
trainer = [sys.executable, "run_dpo.py", *words[at + 1:]]
sys.exit(1 if subprocess.Popen(trainer, env={**os.environ, "RANK": flags["--machine_rank"]}).wait() else 0)
""",
    "run_dpo.py": """
rank, mode = os.environ["RANK"], os.environ["MODE"]
if mode in ("success", "failure"):
    sys.exit(0 if mode == "success" else 3)
asked = threading.Event()
(fake / f"up-{rank}").touch()
while mode == "late" and not (fake / "go").exists():
    time.sleep(0.01)
for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) != signal.SIG_IGN:
        signal.signal(number, lambda *_: asked.set())
(fake / f"ready-{rank}").touch()
while not asked.wait(0.05):
    pass
(fake / f"asked-{rank}").touch()
if mode == "fails when asked":
    sys.exit(1)
while len(list(fake.glob("asked-*"))) < 2:  # a checkpoint of all ranks
    time.sleep(0.01)
if rank == "0":
    out = next(word for word in sys.argv if word.startswith("--output_dir=")).partition("=")[2]
    time.sleep(0.5)  # rank 1 has ended meanwhile
    Path(out).mkdir(exist_ok=True)
    Path(out, "PREEMPTED").write_text("step 3")
sys.exit(1)
""",
    "scripts/output_dir.py": """
print(next(word for word in sys.argv if word.startswith("--output_dir=")).partition("=")[2])
""",
}


@pytest.fixture
def cluster(tmp_path):
    for name, text in FAKES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(COMMON.replace("PYTHON", sys.executable) + text)
        path.chmod(0o755)
    python = tmp_path / "bin" / "python"  # a link would not find the packages of a virtual environment
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    (tmp_path / "two.yaml").touch()
    (tmp_path / "fake").mkdir()
    return tmp_path


def start(
    cluster,
    mode,
    script=SCRIPT,
    state="RUNNING",
    signalled="first",
    config="two.yaml",
    run=(),
    cwd=None,
    log=None,
    **env,
):
    """The batch shell, as Slurm starts it on the first of two nodes; `run` in place of the odd arguments."""
    environment = {"PATH": f"{cluster / 'bin'}:/usr/bin:/bin", "HOME": "/nowhere", "FAKE": str(cluster / "fake")}
    environment |= {"MODE": mode, "STATE": state, "SIGNALLED": signalled}
    environment |= {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "n07,n08", "SLURM_GPUS_ON_NODE": "4", **env}
    arguments = run or ["recipe.yaml", f"--output_dir={cluster}/out dir", *ODD]
    with open(log, "w") if log else nullcontext(subprocess.PIPE) as output:
        streams = {"text": True, "stdout": output, "stderr": subprocess.STDOUT}
        return subprocess.Popen(["bash", script, config, *arguments], cwd=cwd or cluster, env=environment, **streams)


def real_launcher(cluster):
    """Accelerate's in place of the stand-in, and what it needs: a real address and a port that is free."""
    (cluster / "bin" / "accelerate").unlink()
    (cluster / "bin" / "accelerate").symlink_to(Path(sys.executable).parent / "accelerate")
    env = {"SLURM_JOB_NODELIST": "127.0.0.1,127.0.0.1", "SLURM_GPUS_ON_NODE": "1", "HOME": str(cluster)}
    return env | {"SLURM_JOB_ID": str(free_port() - 10000)}


def free_port() -> int:
    """One of those that the script takes."""
    while True:
        port = random.randrange(10001, 30000)
        with socket.socket() as found:
            if found.connect_ex(("127.0.0.1", port)):
                return port


def until(cluster, job, pattern, count=2, text=""):
    """Waits for so many files with `text` in them, or for one file, while the job runs."""
    deadline = time.monotonic() + TIMEOUT_S
    files = (lambda: [pattern]) if isinstance(pattern, Path) else (lambda: (cluster / "fake").glob(pattern))
    while sum(text in path.read_text() for path in files()) < count:
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline, pattern
        time.sleep(0.02)


def end(cluster, job, log=None):
    """(code, output, calls of Slurm's commands)"""
    output, _ = job.communicate(timeout=TIMEOUT_S)
    output = log.read_text() if log else output
    calls = (cluster / "fake" / "calls").read_text().splitlines()
    return job.returncode, output, [call for call in calls if not call.startswith("srun")]


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
    with pytest.raises(UserError, match="--bet.*beta"):
        output_dir([str(recipe), "--bet=0.2"])


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs shellcheck")
def test_shellcheck_has_nothing_to_say():
    done = subprocess.run(["shellcheck", SCRIPT], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stdout
