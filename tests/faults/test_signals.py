"""Preemption in every phase and by every signal: a checkpoint of all ranks, the marker, no final model."""

import os
import re
import signal
import subprocess
import sys

import pytest
from faults.runs import ROOT, differing, steps, wait

from mdpo.runs.preemption import EXIT_CODE, MARKER

pytestmark = pytest.mark.slow


def assert_preempted(run, out) -> None:
    """The run ended as preempted, and left only what the next start needs."""
    assert run.end() == EXIT_CODE, run.log[-3000:]
    assert (out / MARKER).exists()
    assert not (out / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_in_training(name, forge, workshop, undisturbed, tmp_path):
    out = tmp_path / "out"
    run = forge.run(workshop / "recipe.yaml", f"--output_dir={out}")
    run.until(lambda: steps(out), "a checkpoint")
    run.signal(getattr(signal, name))
    assert_preempted(run, out)
    step = steps(out)[-1]
    assert f"preempted at step {step}" in run.log and (out / MARKER).read_text() == f"{name}\n"
    run = forge.run(workshop / "recipe.yaml", f"--output_dir={out}")
    assert run.end() == 0, run.log[-3000:]
    assert f"resuming from {out}/checkpoint-{step}" in run.log
    assert not (out / MARKER).exists()
    assert differing(out, undisturbed) == []


def test_in_every_phase(forge, workshop, undisturbed, tmp_path):
    """Preempted a little later each time, from the first line on, through pairs, model, evaluations and training:
    each start gets further or is at the same place, and the numbers at the end are the undisturbed run's. A run that is
    being finished is finished."""
    out, flags = tmp_path / "out", ["--eval_on_start=true", "--per_device_eval_batch_size=1"]
    expected = tmp_path / "wanted"
    run = forge.run(workshop / "recipe.yaml", f"--output_dir={expected}", *flags)
    assert run.end() == 0, run.log[-3000:]
    phases = ["resuming from|global batch", "pairs ┃|training pairs", "8 ranks of", "held-out pairs: loss"]
    for phase in phases * 2:
        run = forge.run(workshop / "recipe.yaml", f"--output_dir={out}", *flags)
        run.until(lambda phase=phase, run=run: any(text in run.log for text in phase.split("|")), phase)
        run.signal(signal.SIGTERM)
        assert_preempted(run, out)
    run = forge.run(workshop / "recipe.yaml", f"--output_dir={out}", *flags)
    assert run.end() == 0, run.log[-3000:]
    assert differing(out, expected) == []


def test_in_the_reference_pass(forge, workshop, tmp_path):
    """Scored log-probs are cached."""
    out, cache = tmp_path / "out", tmp_path / "cache"
    flags = [f"--output_dir={out}", "--precompute_ref_log_probs", f"--reference_cache_dir={cache}"]
    flags += ["--precompute_ref_batch_size=1", "--disable_tqdm=false"]
    run = forge.run(workshop / "recipe.yaml", *flags)
    run.until(lambda: re.search(r"reference log-probs of train: +[1-9]\d*%", run.log), "a scored batch")
    run.signal(signal.SIGTERM)
    assert_preempted(run, out)
    assert list(cache.glob("*/*.safetensors"))
    run = forge.run(workshop / "recipe.yaml", *flags)
    assert run.end() == 0, run.log[-3000:]
    assert "reference log-probs of train: 0 of" not in run.log


@pytest.mark.parametrize("config", ["zero2_cpu", "zero3_cpu", "cpu"])
def test_launchers(config, launched, tmp_path):
    """TERM to a ZeRO launcher, which forwards it. TERM to one without DeepSpeed, which dies and forwards nothing. USR1
    to one rank of two: both stop together."""
    out = tmp_path / "out"
    run = launched(config, "--num_train_epochs=50", "--per_device_train_batch_size=1", f"--output_dir={out}")
    run.until(lambda: steps(out), "a checkpoint")
    if config == "zero3_cpu":
        os.kill(run.trainers()[1], signal.SIGUSR1)
    else:
        run.launcher.send_signal(signal.SIGTERM)
    assert run.end() != 0
    assert (out / MARKER).exists(), run.log[-3000:]
    assert not (out / "model.safetensors").exists()
    assert f"preempted at step {steps(out)[-1]};" in run.log


def test_while_it_imports(workshop, tmp_path):
    """The signal waits for the ten seconds of imports, until the run knows where its marker goes."""
    command = [sys.executable, "run_dpo.py", workshop / "recipe.yaml", f"--output_dir={tmp_path}/out"]
    with open(tmp_path / "log.txt", "w") as log:
        run = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        wait(lambda: blocks(run.pid, signal.SIGUSR1), "the beginning of the imports")
        run.send_signal(signal.SIGUSR1)
        assert run.wait(300) == EXIT_CODE
    assert (tmp_path / "out" / MARKER).read_text() == "SIGUSR1\n"


def blocks(process: int, number: int) -> bool:
    if b"run_dpo.py" not in open(f"/proc/{process}/cmdline", "rb").read().split(b"\0"):
        return False  # the test's own fork, which blocks everything until it is a program of its own
    mask = re.search(r"SigBlk:\s+(\w+)", open(f"/proc/{process}/status").read())
    return bool(int(mask[1], 16) >> (number - 1) & 1)


SCRIPT = """
import sys, time
from mdpo.runs.preemption import defer_signals, requested
from mdpo.runs.entrypoint import run

def main(argv):
    with defer_signals():
        print("here", flush=True)
        while True:
            time.sleep(0.01)

sys.exit(run(main, []))
"""


def test_a_second_signal_stops_at_once():
    """Not the launcher's copy of the first one, which comes at the same time; the next one that somebody sends."""
    run = subprocess.Popen(
        ["env", "--default-signal=INT", sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.stdout.readline() == "here\n"
    for _ in range(2):
        run.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        run.wait(4)
    run.send_signal(signal.SIGINT)
    assert run.wait(60) == EXIT_CODE
    err = run.stderr.read()
    assert err.count("stopping at the next step") == 1 and "SIGINT again: stopped at once" in err
