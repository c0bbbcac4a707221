"""What a user gets wrong, a folder each in tests/cases: flags.txt, a recipe, data, and expected.txt, whose lines all
stand in the message. Every run ends before weights are loaded, with exit code 1, without a traceback, and leaves what
was there as it was."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT
from tiny import CHATML, tokenizer_for
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

import run_dpo
from mdpo.runs.entrypoint import run

CASES = ROOT / "tests/cases"
NAMES = sorted(path.name for path in CASES.iterdir() if path.is_dir())
THROUGH_THE_COMMAND_LINE = ["data_line_broken", pytest.param("recipe_beta_out_of_range", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a tokenizer and a configuration, without weights: one as it should be, and others."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("model", "without_template", "without_pad", "small_vocabulary", "learned_positions"):
        tokenizer = tokenizer_for(CHATML, "letters", eos="<|im_end|>")
        size = 100 if name == "small_vocabulary" else len(tokenizer)
        LlamaConfig(vocab_size=size, architectures=["LlamaForCausalLM"]).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        (folder / name / "model.safetensors").touch()
        if name == "learned_positions":
            GPT2Config(vocab_size=size, n_positions=24, n_embd=8, n_head=2).save_pretrained(folder / name)
        if name == "without_template":
            (folder / name / "chat_template.jinja").unlink()
        if name == "without_pad":
            path = folder / name / "tokenizer_config.json"
            lines = path.read_text().splitlines()
            path.write_text("\n".join(line for line in lines if "pad_token" not in line and "eos_token" not in line))
    return folder


@pytest.fixture
def place(tmp_path, models):
    """name -> (folder of the case, argv)."""

    def make(name: str) -> list[str]:
        shutil.copytree(models, tmp_path, dirs_exist_ok=True)
        for source in (CASES / "recipe.yaml", CASES / "a.jsonl"):
            shutil.copy(source, tmp_path)
        shutil.copytree(CASES / name, tmp_path, dirs_exist_ok=True)
        flags = tmp_path / "flags.txt"
        given = flags.read_text(encoding="utf-8").splitlines() if flags.exists() else []
        return (["recipe.yaml"] if "--config" not in "".join(given) else []) + given

    return make


def environment(folder: Path) -> dict[str, str]:
    """No hub, no wandb login of the machine's user, no precision left by another run."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HOME": str(folder), "NETRC": str(folder / "netrc")}
    return {**offline, "ACCELERATE_MIXED_PRECISION": "no"}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def check(name: str, code: int, said: str, before: dict[str, bytes], folder: Path) -> None:
    expected = (CASES / name / "expected.txt").read_text(encoding="utf-8").splitlines()
    assert expected
    for line in expected:
        assert line in said, f"{line!r} is not in:\n{said}"
    assert code == 1
    assert "Traceback" not in said and said.count("\nerror: ") == 1
    after = contents(folder)
    assert {path: after.get(path) for path in before} == before


@pytest.mark.parametrize("name", NAMES)
def test_a_mistake_ends_in_one_message(name, place, tmp_path, monkeypatch, capsys):
    assert len(NAMES) > 50
    argv, before = place(name), contents(tmp_path)
    monkeypatch.chdir(tmp_path)
    for key, value in environment(tmp_path).items():
        monkeypatch.setenv(key, value)
    for key in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)

    def weights(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", weights)
    code = run(run_dpo.main, argv)
    out, err = capsys.readouterr()
    check(name, code, out + err, before, tmp_path)


@pytest.mark.parametrize("name", THROUGH_THE_COMMAND_LINE)
def test_the_same_through_the_command_line(name, place, tmp_path):
    argv, before = place(name), contents(tmp_path)
    command = [sys.executable, str(CASES.parent.parent / "run_dpo.py"), *argv]
    env = {**os.environ, **environment(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    check(name, done.returncode, done.stdout + done.stderr, before, tmp_path)


def test_the_message_of_debug_has_a_traceback(place, tmp_path, monkeypatch, capsys):
    argv = place("data_file_empty")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert run(run_dpo.main, [*argv, "--debug"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and err.endswith("error: dataset file a.jsonl is empty.\n")
