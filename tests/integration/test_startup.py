"""Locks of killed builds, and where errors end; run_dpo.main in this process up to the weights."""

import os
import socket
import subprocess
import sys
import time
import types

import pytest
from errors import refused
from peft import LoraConfig
from repository import ROOT
from tiny import CHATML, agent_rows, tiny_llama, tokenizer_for
from transformers import LlamaConfig

import run_dpo
from mdpo.errors import UserError
from mdpo.masking.tokenizer import check_model
from mdpo.runs import failures
from mdpo.runs.entrypoint import clear_stale_build_locks, run


@pytest.fixture
def extensions(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "ext"))
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "ext" / "some_op").mkdir(parents=True)
    return tmp_path / "ext"


def test_stale_lock_is_removed_and_named(extensions, capsys):
    lock = extensions / "some_op" / "lock"
    lock.touch()
    assert clear_stale_build_locks() == [lock]
    assert not lock.exists()
    assert str(lock) in capsys.readouterr().out


def test_lock_of_a_living_build_stays(extensions):
    lock = extensions / "some_op" / "lock"
    hold = f"import os, time; os.open({str(lock)!r}, os.O_CREAT | os.O_EXCL); print('held', flush=True); time.sleep(60)"
    builder = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE)
    try:
        assert builder.stdout.readline() == b"held\n"
        assert clear_stale_build_locks() == []
        assert lock.exists()
    finally:
        builder.kill()
        builder.wait()
    assert clear_stale_build_locks() == [lock]


def test_compilers_of_a_dead_build_do_not_keep_its_lock(extensions):
    """They work in its folder, outlive the one who had the lock open, and would write beside the next build."""
    lock = extensions / "some_op" / "lock"
    lock.touch()
    compiler = subprocess.Popen(["sleep", "60"], cwd=lock.parent)
    assert clear_stale_build_locks() == [lock]
    assert compiler.wait(30) == -9


def test_another_nodes_young_lock_stays(extensions, monkeypatch, capsys):
    lock = extensions / "some_op" / "lock"
    lock.touch()
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert clear_stale_build_locks() == []
    assert f"{lock} is there" in capsys.readouterr().out
    os.utime(lock, (time.time() - 3600,) * 2)
    assert clear_stale_build_locks() == [lock]


def test_only_one_process_of_a_machine_removes(extensions, monkeypatch):
    (extensions / "some_op" / "lock").touch()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert clear_stale_build_locks() == []


def fail(argv):
    raise UserError("data.jsonl: line 3 is broken.\nFix it.")


def test_user_errors_are_short_and_exit_1(capsys):
    assert run(fail, []) == 1
    err = capsys.readouterr().err
    assert err == "\nerror: data.jsonl: line 3 is broken.\nFix it.\n"
    assert run(fail, ["--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_the_main_process_speaks_first(capsys, monkeypatch):
    """Before ranks can ask each other who is not rank 0 waits, then says it in full: the launcher kills the rest as
    soon as one process has ended."""
    waited, left = [], []
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(failures.time, "sleep", lambda s: waited.append((s, capsys.readouterr().err)))
    monkeypatch.setattr(failures, "exit_without_teardown", lambda *how: left.append(how) or sys.exit())
    with pytest.raises(SystemExit):
        run(fail, [])
    assert waited == [(failures.WITHOUT_GROUP_S, "")]
    assert left == [(1, failures.LEAVE_S)]
    assert capsys.readouterr().err == "\nerror [rank 3]: data.jsonl: line 3 is broken.\nFix it.\n"


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run(lambda argv: 1 / 0, [])


@pytest.fixture
def recipe(tmp_path):
    """A recipe whose run would start: tiny model, pairs in a file."""
    tokenizer = tokenizer_for(CHATML, "byte", eos="<|im_end|>")
    tiny_llama(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    from datasets import Dataset

    Dataset.from_list(agent_rows(8)).to_json(tmp_path / "pairs.jsonl")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model_name_or_path: {tmp_path}/model\ndtype: float32\ndataset_mixer: {{{tmp_path}/pairs.jsonl: 1.0}}\n"
        f"output_dir: {tmp_path}/out\nmax_length: 300\nbf16: false\nuse_cpu: true\nreport_to: none\nmax_steps: 1\n"
        "per_device_train_batch_size: 2\nlogging_steps: 1\nsave_strategy: 'no'\n"
    )
    return path


def test_a_run_in_one_process_and_a_used_folder(recipe, capsys, tmp_path):
    assert run(run_dpo.main, [str(recipe), "--test_split_size=2", "--eval_on_start=true"]) == 0
    out = capsys.readouterr().out
    assert "held-out pairs: 2" in out and "0.6931" in out
    for name in ("model.safetensors", "recipe_resolved.yaml", "run_report.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).exists(), name
    assert run(run_dpo.main, [str(recipe)]) == 1
    assert "already holds a run" in capsys.readouterr().err
    assert run(run_dpo.main, [str(recipe), "--overwrite_output_dir", "--sanity_check"]) == 0
    assert "overwrite_output_dir: removed" in capsys.readouterr().out
    resolved = tmp_path / "out" / "recipe_resolved.yaml"
    assert run(run_dpo.main, [str(resolved)]) == 0  # the resolved recipe is a recipe, overwrite_output_dir included


GLOO_RUN = """
import atexit, os, sys, torch, torch.distributed as dist
from mdpo.runs.entrypoint import run

def main(argv):
    global kept
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # threads of gloo fall behind on a busy core
    dist.init_process_group("gloo")
    kept = dist.group.WORLD  # as DeepSpeed does
    atexit.register(print, "last words")
    for _ in range(20):
        dist.all_gather([torch.zeros(10) for _ in range(2)], torch.ones(10))
    if argv:
        raise SystemError("a crash")

sys.exit(run(main, sys.argv[1:]))
"""


def gloo_pair(tmp_path, *argv: str) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of two processes that talk over gloo and keep the process group alive."""
    (tmp_path / "gloo_run.py").write_text(GLOO_RUN)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "gloo_run.py"), *argv],
            env={**os.environ, **settings, "RANK": str(rank), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    found = [process.communicate(timeout=120) for process in processes]
    return [(process.returncode, *text) for process, text in zip(processes, found, strict=True)]


def test_a_finished_run_of_several_processes_is_not_aborted_at_its_exit(tmp_path):
    """With the interpreter's own teardown 11 of 12 such pairs ended in SIGABRT."""
    for _ in range(2):
        for code, out, err in gloo_pair(tmp_path):
            assert (code, out) == (0, "last words\n"), err


def test_a_crash_of_several_processes_keeps_its_traceback(tmp_path):
    """It is the same one on both, and said once, by the rank that comes first."""
    pair = gloo_pair(tmp_path, "crash")
    assert [code for code, _, _ in pair] == [1, 1]
    silent, told = sorted((text for _, _, text in pair), key=len)
    assert "Traceback" in told and "SystemError: a crash" in told and silent == ""


def test_a_configuration_is_looked_for_where_the_model_is(tmp_path):
    """In a subfolder; an adapter has none of its own. A vocabulary that is too small is found there too."""
    tokenizer = tokenizer_for(CHATML)
    for name, size in (("right", len(tokenizer)), ("small", 10)):
        LlamaConfig(vocab_size=size).save_pretrained(tmp_path / "model" / name)
    LoraConfig(base_model_name_or_path="base").save_pretrained(tmp_path / "adapter")

    def check(folder, **kwargs):
        model = types.SimpleNamespace(model_name_or_path=str(tmp_path / folder), model_revision=None)
        args = types.SimpleNamespace(
            pad_token=None,
            trust_remote_code=False,
            router_aux_loss_coef=None,
            model_init_kwargs=kwargs,
            ref_model_name_or_path=None,
        )
        check_model(tokenizer, model, args)

    check("adapter")
    check("model", subfolder="right")
    with refused("tokenizer", "embedding for 10."):
        check("model", subfolder="small")
    with refused("model_name_or_path", tmp_path):
        check("model")
