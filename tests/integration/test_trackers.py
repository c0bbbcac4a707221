"""What wandb (offline), TensorBoard and trackio are given, read back from disk: figures by turn too."""

import importlib.util
import json
import os
import sqlite3
import struct

import pytest
from tiny import CHATML, tokenizer_for
from trainers import mdpo_trainer

from mdpo.reporting.progress import StepTimer, show_progress

HAVE = {name: importlib.util.find_spec(name) is not None for name in ("tensorboard", "trackio")}
WANTED = {  # of training, at steps 1 and 2
    *("loss", "tokens_per_second", "peak_memory_gb", "rewards/margins"),
    *("margins/turn_1", "margins/turn_2", "accuracies/2_turns", "pairs/2_turns"),
}
EVALUATED = {"loss", "margins/turn_2", "accuracies/2_turns"}


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A function: two steps and an evaluation that one tracker is told of -> the trainer's log history by step."""

    def train(tracker, **options):
        for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": tmp_path}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("WANDB_SILENT", "true")
        tokenizer, timer = tokenizer_for(CHATML, "byte", eos="<|im_end|>"), StepTimer()
        trainer = mdpo_trainer(tmp_path, tokenizer, report_to=[tracker], eval_strategy="steps", eval_steps=2, **options)
        trainer.add_callback(timer)
        show_progress(trainer, timer)
        trainer.train()
        logs = trainer.state.log_history
        assert [log["step"] for log in logs if "loss" in log] == [1, 2] and WANTED <= set(logs[0])
        return [log for log in logs if "loss" in log], next(log for log in logs if "eval_loss" in log)

    return train


def records(data: bytes):
    """Of a .wandb file, a LevelDB log behind a header of 7 bytes: blocks of 32 KiB, records split over their ends."""
    at, whole, first, full = 7, b"", 2, 1
    while at + 7 <= len(data):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        part, at = data[at + 7 : at + 7 + length], at + 7 + length
        whole = part if kind in (full, first) else whole + part
        if kind in (full, 4):  # whole, or the last part
            yield whole


@pytest.mark.slow
def test_wandb_offline(tmp_path, trained):
    import wandb
    from wandb.proto import wandb_internal_pb2

    steps, evaluated = trained("wandb")
    wandb.finish()
    wandb.teardown()  # waits until the client has written its file
    [folder] = (tmp_path / "wandb").glob("offline-run-*")
    [file] = folder.glob("run-*.wandb")
    found = []
    for data in records(file.read_bytes()):
        items = wandb_internal_pb2.Record.FromString(data).history.item
        found.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    for step, log in enumerate(steps):
        rows = [row for row in found if row.get("train/global_step") == step + 1 and "train/loss" in row]
        assert rows and all(rows[0][f"train/{name}"] == pytest.approx(log[name]) for name in WANTED)
    [row] = [row for row in found if "eval/loss" in row]
    assert all(row[f"eval/{name}"] == pytest.approx(evaluated[f"eval_{name}"]) for name in EVALUATED)


@pytest.mark.slow
@pytest.mark.skipif(not HAVE["tensorboard"], reason="no tensorboard here: pip install '.[trackers]'")
def test_tensorboard(tmp_path, trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    steps, evaluated = trained("tensorboard")
    [folder] = {os.path.dirname(file) for file in map(str, tmp_path.rglob("events.out.tfevents*"))}
    events = EventAccumulator(folder)
    events.Reload()
    for name in WANTED:
        scalars = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert scalars == [(step + 1, pytest.approx(log[name])) for step, log in enumerate(steps)], name
    for name in EVALUATED:
        assert events.Scalars(f"eval/{name}")[-1].value == pytest.approx(evaluated[f"eval_{name}"])


@pytest.mark.slow
@pytest.mark.skipif(not HAVE["trackio"], reason="no trackio here: pip install '.[trackers]'")
def test_trackio(tmp_path, trained):
    from trackio.utils import TRACKIO_DIR  # of the process: trackio reads it once, at its first import

    project = f"{tmp_path.parent.name}-{tmp_path.name}"
    steps, _ = trained("trackio", project=project)
    [file] = TRACKIO_DIR.rglob(f"{project}*.db")
    with sqlite3.connect(file) as database:
        rows = [json.loads(text) for (text,) in database.execute("select metrics from metrics order by id")]
    logged = [row for row in rows if "train/loss" in row]
    assert len(logged) == 2
    for row, log in zip(logged, steps, strict=True):
        assert all(row[f"train/{name}"] == pytest.approx(log[name]) for name in WANTED)
    assert any("eval/margins/turn_2" in row for row in rows)
