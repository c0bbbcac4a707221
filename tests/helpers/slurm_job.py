"""scripts/launch.slurm with stand-ins for Slurm's commands, the launcher and the trainer. Each acts as the real one:
Slurm signals the first process of each node's step, or all of them, and kills what the first one leaves behind; the
launcher dies of USR1 and turns every code into 1; trainers checkpoint together, then rank 0 leaves a marker.
"""

import random
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from repository import ROOT

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
    """A free port of the range that the script uses."""
    while True:
        port = random.randrange(10001, 30000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


def until(cluster, job, pattern, count=2, text=""):
    """Waits for `count` files that contain `text`, or for one file, while the job runs."""
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
