"""Whole or invisible: manifests, publishing, keeping; what is the same run; which pairs come first."""

import contextlib
import json
import os
import shutil

import pytest
from errors import refused

from mdpo.runs import checkpoints
from mdpo.runs import run_fingerprint as run_identity
from mdpo.runs.checkpoints import SAVING, commit, faults, newest_complete, remove_older, sealed
from mdpo.runs.output_dir import _named
from mdpo.runs.run_fingerprint import differences
from mdpo.storage import MANIFEST


def saved(folder, step, resumable=True, **files):
    """A small checkpoint, written as the trainer does."""
    staged, final = folder / SAVING / f"checkpoint-{step}", folder / f"checkpoint-{step}"
    staged.mkdir(parents=True)
    for name, text in {"model.safetensors": "weights", "optimizer.pt": "states", **files}.items():
        (staged / name).write_text(text)
    names = checkpoints.files_of(staged)
    commit(staged, final, {"step": step, "resumable": resumable, "run": {}, "files": sealed(staged, names)})
    return final


def test_a_published_checkpoint_is_whole_and_every_damage_has_its_name(tmp_path):
    folder = saved(tmp_path, 5)
    assert faults(folder) == [] and not (tmp_path / SAVING).exists()
    (folder / "model.safetensors").write_text("weightz")
    assert faults(folder) == ["model.safetensors has other contents than were written"]
    assert checkpoints.wrong_sizes(folder) == []
    (folder / "model.safetensors").write_text("weig")
    (folder / "optimizer.pt").unlink()
    assert faults(folder) == ["model.safetensors has 4 bytes of 7", "optimizer.pt is missing"]
    for text in ("{", "[]", '{"files": 3}'):
        (folder / MANIFEST).write_text(text)
        assert len(faults(folder)) == 1 and MANIFEST in faults(folder)[0]


def test_the_newest_complete_one_by_number_and_what_was_skipped(tmp_path):
    for step in (9, 10, 100):
        saved(tmp_path, step)
    saved(tmp_path, 200, resumable=False)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-100" / "optimizer.pt").write_text("")
    found, lines = newest_complete(tmp_path)
    assert found == tmp_path / "checkpoint-10"
    assert lines == [
        f"{tmp_path}/checkpoint-200: save_only_model left the optimizer's state out.",
        f"{tmp_path}/checkpoint-100: optimizer.pt has 0 bytes of 6.",
    ]
    assert newest_complete(tmp_path / "nothing") == (None, [])


def test_a_run_s_folder_in_the_place_of_its_checkpoint(tmp_path):
    """The newest one of it is named; one of its checkpoints is taken, and a folder without any is as damaged."""
    older, newer = saved(tmp_path / "run", 5), saved(tmp_path / "run", 10)
    with refused("resume_from_checkpoint", newer):
        _named(tmp_path / "run", tmp_path / "out")
    assert _named(older, tmp_path / "out") == older
    with refused("resume_from_checkpoint", MANIFEST):
        _named(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(("module", "name"), [(os, "rename"), (os, "fsync"), (shutil, "rmtree"), (json, "dump")])
def test_a_kill_between_any_two_steps_of_publishing_leaves_the_old_one_or_the_new_one(
    module, name, tmp_path, monkeypatch
):
    """Each call of `name` ends the process once; what then stands under the checkpoint's name is whole."""
    real, seen = getattr(module, name), set()
    for fatal in range(6):
        folder = tmp_path / str(fatal)
        saved(folder, 5)
        calls = iter(range(100))

        def dies(*args, calls=calls, fatal=fatal, **kwargs):
            if next(calls) == fatal:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(module, name, dies)
            saved(folder, 5, **{"model.safetensors": "newer"})
        if (folder / "checkpoint-5").exists():
            assert faults(folder / "checkpoint-5") == []
            seen.add((folder / "checkpoint-5" / "model.safetensors").read_text())
    assert "newer" in seen  # later kills come too late to matter
    assert seen <= {"weights", "newer"}


def test_the_limit_counts_whole_ones_and_keeps_the_newest_and_the_best(tmp_path):
    for step in (1, 2, 3, 4):
        saved(tmp_path, step)
    (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()
    remove_older(tmp_path, 1, keep=str(tmp_path / "checkpoint-1"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-3", "checkpoint-4"]
    remove_older(tmp_path, None, keep=None)
    assert len(list(tmp_path.iterdir())) == 3


FACTS = {
    "keys": {"beta": 0.1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "fused_ops": True},
    "names": {"dataset_mixer": {"a.jsonl": 1.0}},
    "processes": 2,
    "global_batch": 8,
    "zero_stage": 2,
    "versions": {"torch": "2"},
    "contents": {"pairs": "aaaa", "model": "bbbb"},
}


@pytest.mark.parametrize(
    ("change", "refused", "rounding"),
    [
        ({}, [], []),
        ({"keys": {**FACTS["keys"], "beta": 0.2}}, ["beta: 0.1 → 0.2"], []),
        ({"keys": {**FACTS["keys"], "fused_ops": False}}, [], ["fused_ops: True → False"]),
        ({"keys": {**FACTS["keys"], "group_pairs": True}}, ["group_pairs: False → True"], []),  # of before the key
        ({"keys": {**FACTS["keys"], "group_pairs": False}}, [], []),
        ({"names": {"dataset_mixer": {"b.jsonl": 1.0}}}, [], []),
        (
            {"names": {"dataset_mixer": {"b.jsonl": 1.0}}, "contents": {"pairs": "cccc", "model": "bbbb"}},
            ["pairs: aaaa… → cccc… (dataset_mixer: {'a.jsonl': 1.0} → {'b.jsonl': 1.0})"],
            [],
        ),
        ({"processes": 4, "global_batch": 16}, ["processes: 2 → 4"], []),
        ({"zero_stage": 3}, ["zero_stage: 2 → 3"], []),
        ({"versions": {"torch": "3"}}, [], ["versions of torch: 2 → 3"]),
        (
            {"keys": {**FACTS["keys"], "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}},
            [],
            ["per_device_train_batch_size: 2 → 1", "gradient_accumulation_steps: 2 → 4"],
        ),
        (
            {"keys": {**FACTS["keys"], "per_device_train_batch_size": 1}, "global_batch": 4},
            ["per_device_train_batch_size: 2 → 1"],
            [],
        ),
        ({"keys": {**FACTS["keys"], "learning_rate": 5e-6}}, ["learning_rate: 1e-06 → 5e-06"], []),  # 1e-6: default
    ],
)
def test_what_makes_another_run(change, refused, rounding):
    assert differences(FACTS, {**FACTS, **change}) == (refused, rounding)


def test_every_key_has_one_place():
    """A key that is free, a name or rounding is a key, and in one list; all others make another run."""
    lists = [run_identity.FREE, run_identity.NAMES, run_identity.ROUNDING]
    named = [key for part in lists for key in part]
    assert len(named) == len(set(named))
    assert set(named) - set(run_identity.FIELDS) == {"versions"}
    rest = set(run_identity.FIELDS) - set(named)
    assert {"beta", "learning_rate", "loss_type", "seed", "num_train_epochs", "max_steps", "lora_r", "bf16"} <= rest


def test_a_save_that_the_disk_refuses_is_told_from_a_bug():
    assert checkpoints.is_write_failure(OSError(28, "No space left on device"))
    assert checkpoints.is_write_failure(RuntimeError("[enforce fail] . unexpected pos 5120 vs 5012"))
    assert not checkpoints.is_write_failure(RuntimeError("shape mismatch"))
