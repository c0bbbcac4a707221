"""Damaged checkpoints, full and read-only disks, two runs in one folder, a run resumed under another recipe."""

import json
import os
import shutil
import signal
import subprocess

import pytest
from faults.runs import differing, steps

from mdpo.reporting.run_report import OF_TRAINING, REPORT

pytestmark = pytest.mark.slow


def cut(file):
    os.truncate(file, file.stat().st_size // 2)


def emptied(file):
    file.write_bytes(b"")


def one_byte_changed(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGES = {
    "model.safetensors": (cut, "model.safetensors has"),
    "optimizer.pt": (os.remove, "optimizer.pt is missing"),
    "trainer_state.json": (os.remove, "trainer_state.json is missing"),
    "progress_0.pt": (os.remove, "progress_0.pt is missing"),
    "rng_state.pth": (emptied, "rng_state.pth has 0 bytes of"),
    "scheduler.pt": (one_byte_changed, "scheduler.pt has other contents"),
    "manifest.json": (os.remove, "no manifest.json"),
}


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(forge, workshop, undisturbed, tmp_path):
    """All damages in turn, each on the newest checkpoint of the same finished run; then on all of them."""
    for name, (damage, reason) in DAMAGES.items():
        out = tmp_path / name
        shutil.copytree(undisturbed, out)
        damage(out / "checkpoint-40" / name)
        run = forge.run(workshop / "recipe.yaml", f"--output_dir={out}")
        assert run.end() == 0, run.log[-3000:]
        assert f"skipped {out}/checkpoint-40: {reason}" in run.log
        assert f"resuming from {out}/checkpoint-39" in run.log
        assert differing(out, undisturbed) == []
    cut(out / "checkpoint-39" / "model.safetensors")
    cut(out / "checkpoint-40" / "model.safetensors")
    before = sorted(out.rglob("*"))
    run = forge.run(workshop / "recipe.yaml", f"--output_dir={out}")
    assert run.end() == 1
    assert "holds checkpoints, but none to resume from" in run.log and "Traceback" not in run.log
    assert [path for path in before if not path.exists()] == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("trouble", ["full", "read-only"])
def test_a_disk_that_cannot_be_written(trouble, forge, workshop, undisturbed, small_disk, tmp_path):
    """The run ends with a message, the checkpoint before stays complete, and the same command resumes from it."""
    out, flags = small_disk / "out", ["--save_total_limit=20"]
    run = forge.run(workshop / "recipe.yaml", f"--output_dir={out}", *flags)
    if trouble == "read-only":
        run.until(lambda: steps(out), "a checkpoint")
        run.signal(signal.SIGSTOP)
        subprocess.run(["mount", "--bind", out, out], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", out], check=True)
        run.signal(signal.SIGCONT)
    assert run.end() == 1, run.log[-3000:]
    assert "could not be written" in run.log and "Traceback" not in run.log
    whole = steps(out)
    assert whole and whole[-1] < 40
    if trouble == "read-only":
        subprocess.run(["umount", "-l", out], check=True)
    subprocess.run(["mount", "-o", "remount,size=300m", small_disk], check=True)
    run = forge.run(workshop / "recipe.yaml", f"--output_dir={out}", *flags)
    assert run.end() == 0, run.log[-3000:]
    assert f"resuming from {out}/checkpoint-{whole[-1]}" in run.log
    assert differing(out, undisturbed) == []


def test_another_recipe_never_resumes_and_another_interval_does(forge, workshop, undisturbed, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    shutil.rmtree(out / "checkpoint-40")
    rows = (workshop / "pairs.jsonl").read_text().splitlines()
    (tmp_path / "fewer.jsonl").write_text("\n".join(rows[1:]))
    shutil.copytree(workshop / "model", tmp_path / "model")
    one_byte_changed(tmp_path / "model" / "model.safetensors")
    for flag, difference in (
        ("--beta=0.2", "beta: 0.1 → 0.2"),
        ("--learning_rate=2e-3", "learning_rate: 0.001 → 0.002"),
        ("--lr_scheduler_type=linear", "lr_scheduler_type: cosine → linear"),
        ("--loss_type=ipo", "loss_type: ['sigmoid'] → ['ipo']"),
        ("--per_device_train_batch_size=4", "per_device_train_batch_size: 2 → 4"),
        ("--num_train_epochs=3", "num_train_epochs: 2 → 3"),
        ("--seed=8", "seed: 7 → 8"),
        (f"--dataset_mixer={{{tmp_path}/fewer.jsonl: 1.0}}", "fewer.jsonl"),
        (f"--model_name_or_path={tmp_path}/model", f"{tmp_path}/model"),
    ):
        run = forge.run(workshop / "recipe.yaml", f"--output_dir={out}", flag)
        assert run.end() == 1, flag
        assert "checkpoint-39 is of another run:" in run.log and difference in run.log, run.log[-2000:]
    run = forge.run(workshop / "recipe.yaml", f"--output_dir={out}", "--save_steps=10", "--logging_steps=1")
    assert run.end() == 0, run.log[-3000:]
    assert steps(out) == [39, 40]
    logged = [
        log["step"] for log in json.loads((out / "trainer_state.json").read_text())["log_history"] if "loss" in log
    ]
    assert logged[-2:] == [39, 40]  # 40 by the new interval, with no step counted twice


def test_a_run_at_its_last_step_makes_no_further_one(forge, workshop, tmp_path):
    """In the middle of an epoch, where Trainer makes one more before it looks. The report keeps what training took."""
    out, flags = tmp_path / "out", ["--max_steps=7", f"--output_dir={tmp_path}/out"]
    run = forge.run(workshop / "recipe.yaml", *flags)
    assert run.end() == 0, run.log[-3000:]
    shutil.copytree(out, tmp_path / "whole")
    (out / "model.safetensors").unlink()
    run = forge.run(workshop / "recipe.yaml", *flags)
    assert run.end() == 0, run.log[-3000:]
    assert f"resuming from {out}/checkpoint-7" in run.log and "step 8" not in run.log
    assert differing(out, tmp_path / "whole") == []
    again, whole = (json.loads((folder / REPORT).read_text()) for folder in (out, tmp_path / "whole"))
    assert {key: again[key] for key in OF_TRAINING} == {key: whole[key] for key in OF_TRAINING} and again["steps"] == 7


def test_the_second_run_in_one_folder_is_refused(forge, workshop, tmp_path):
    """Until the first one is gone, killed or not."""
    out = tmp_path / "out"
    first = forge.run(workshop / "recipe.yaml", f"--output_dir={out}", "--num_train_epochs=50")
    first.until(lambda: steps(out), "a checkpoint")
    for flags in ([], ["--overwrite_output_dir"]):
        second = forge.run(workshop / "recipe.yaml", f"--output_dir={out}", *flags)
        assert second.end() == 1
        assert f"is in use by another run (process {first.process} on" in second.log
    first.kill()
    third = forge.run(workshop / "recipe.yaml", f"--output_dir={out}", "--overwrite_output_dir")
    assert third.end() == 0, third.log[-3000:]
