"""SIGKILL at random moments; the resumed run ends with the numbers of an undisturbed one."""

import os
import random
import re
import shutil
import signal
import time

import pytest
from faults.runs import differing, existing, steps

from mdpo.runs.checkpoints import SAVING

pytestmark = pytest.mark.slow
KILLS = 24


def last_step(run) -> int:
    """The last step that the run has logged."""
    return max((int(step) for step in re.findall(r"^step (\d+)", run.log, re.MULTILINE)), default=0)


def test_killed_again_and_again_on_one_cpu(forge, workshop, undisturbed, tmp_path, capsys):
    """To the bit."""
    chance, out = random.Random(7), tmp_path / "out"
    kills = resumes = lost = finished = 0
    while kills < KILLS:
        before = steps(out)
        run = forge.run(workshop / "recipe.yaml", f"--output_dir={out}")
        if kills % 3 == 0:  # while a checkpoint is written
            run.until(lambda r=run: r.ended() or existing(out / SAVING, "*"), "a checkpoint in the making")
            time.sleep(chance.uniform(0, 0.02))
        elif kills % 3 == 1:  # anywhere
            time.sleep(chance.uniform(0, 4))
        else:  # after one more checkpoint, so that the run comes to its end
            run.until(lambda r=run, b=before: r.ended() or steps(out) > b, "one more checkpoint")
            time.sleep(chance.uniform(0, 0.5))
        run.kill()
        if run.ended() and run.code == 0:  # it had finished before the kill: start over
            assert differing(out, undisturbed) == []
            shutil.rmtree(out)
            finished += 1
            continue
        kills += 1
        resumes += "resuming from" in run.log
        lost += max(0, last_step(run) - max(steps(out), default=0))
    run = forge.run(workshop / "recipe.yaml", f"--output_dir={out}")
    assert run.end() == 0, run.log[-3000:]
    wrong = differing(out, undisturbed)
    with capsys.disabled():
        print(f"\n{kills} kills, {resumes + 1} resumes, {finished + 1} runs to their end, {lost} steps repeated, "
              f"{len(wrong)} differing numbers")  # fmt: skip
    assert wrong == []
    assert resumes >= KILLS // 4
    assert not (out / SAVING).exists()


@pytest.mark.parametrize("stage", [2, 3])
def test_killed_under_zero(stage, launched, workshop, tmp_path):
    """Two processes. The first kill takes all of them while a checkpoint is written, the second one rank alone, whose
    launcher then ends the other."""
    config, out, whole = f"zero{stage}_cpu", tmp_path / "out", tmp_path / "whole"
    flags = ["--per_device_train_batch_size=1", "--save_steps=4", "--max_steps=20", "--save_total_limit=3"]
    run = launched(config, *flags, f"--output_dir={whole}")
    assert run.end() == 0, run.log[-3000:]

    run = launched(config, *flags, f"--output_dir={out}")
    run.until(lambda: (out / SAVING / "checkpoint-8").exists() or 8 in steps(out), "checkpoint-8 in the making")
    run.kill()
    run = launched(config, *flags, f"--output_dir={out}")
    run.until(lambda: steps(out)[-1] >= 12, "checkpoint-12")
    os.kill(run.trainers()[1], signal.SIGKILL)
    assert run.end() != 0
    newest = out / f"checkpoint-{steps(out)[-1]}"
    if stage == 2:
        (newest / "latest").write_text("global_step3")  # DeepSpeed reads there which folder to load
    else:
        (newest / "rng_state_1.pth").unlink()
    run = launched(config, *flags, f"--output_dir={out}")
    assert run.end() == 0, run.log[-3000:]
    assert f"skipped {newest}: {'latest has' if stage == 2 else 'rng_state_1.pth is missing'}" in run.log
    assert f"resuming from {out}/checkpoint-" in run.log
    assert differing(out, whole, tolerance=1e-6) == []


def test_killed_while_the_operator_is_built(launched, tmp_path):
    """The build leaves a lock, on which the next start would hang, and compilers, which outlive it."""
    flags = ["--per_device_train_batch_size=1", "--max_steps=2", f"--output_dir={tmp_path}/out"]
    folder = tmp_path / "extensions"
    for compilers in (False, True):
        run = launched("zero2_cpu", *flags, env={"TORCH_EXTENSIONS_DIR": str(folder)})
        locks = run.until(lambda r=run: [lock for lock in existing(folder, "**/lock") if holders(r, lock)], "the build")
        if compilers:
            run.kill()
        else:
            for process in [run.launcher.pid, *run.trainers().values()]:
                os.kill(process, signal.SIGKILL)
            run.launcher.wait(60)
        assert all(lock.exists() for lock in locks)
    run = launched("zero2_cpu", *flags, env={"TORCH_EXTENSIONS_DIR": str(folder)})
    assert run.end() == 0, run.log[-3000:]
    assert f"Removed {folder}" in run.log
    assert not existing(folder, "**/lock")


def holders(run, lock) -> list[int]:
    descriptors = []
    for process in run.trainers().values():
        try:
            descriptors += [
                descriptor
                for descriptor in os.listdir(f"/proc/{process}/fd")
                if os.readlink(f"/proc/{process}/fd/{descriptor}") == str(lock)
            ]
        except OSError:
            continue
    return descriptors
