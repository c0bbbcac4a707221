"""What a run meets around itself: folders that cannot be written to, servers that do not answer, terminals of another
encoding, umasks, files with byte order marks, tokenizers of another package."""

import errno
import importlib
import io
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import threading
import types
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import datasets
import numpy as np
import pytest
from errors import refused
from repository import ROOT
from tiny import CHATML, agent_rows, save_workshop, tokenizer_for
from transformers import AutoTokenizer
from trl import ModelConfig

import run_dpo
from mdpo.config import caches
from mdpo.config.schema import DataArguments
from mdpo.console import say, speak_on_any_terminal
from mdpo.masking.chat_template import ChatTemplate
from mdpo.masking.tokenizer import fast_tokenizer, load_tokenizer
from mdpo.reference.logp_cache import ReferenceCache
from mdpo.runs import preflight, trackers
from mdpo.runs.entrypoint import run
from mdpo.storage import as_new_files

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
NOWHERE = "/proc/nothing-can-be-made-here"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tokenizer_for(CHATML, "byte", eos="<|im_end|>")
    save_workshop(folder, tokenizer, "per_device_train_batch_size: 2\nmax_steps: 2\nsave_steps: 1\n")
    return folder


@pytest.fixture
def start(made, tmp_path, monkeypatch, capsys):
    """A function: run_dpo.py with flags, in this process -> (exit code, what it says)."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")

    def started(*flags):
        code = run(run_dpo.main, [str(made / "recipe.yaml"), f"--output_dir={tmp_path}/out", *flags])
        said = capsys.readouterr()
        return code, said.out + said.err

    return started


# ------------------------------------------------------------------------------------------------------ modes


def modes(folder: Path) -> set[int]:
    return {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_every_file_of_a_run_follows_the_umask(umask, start, tmp_path):
    before = os.umask(umask)
    try:
        flags = ["--precompute_ref_log_probs=true", f"--reference_cache_dir={tmp_path}/cache"]
        assert start("--use_peft=true", "--lora_target_modules=[q_proj, v_proj]", *flags)[0] == 0
    finally:
        os.umask(before)
    assert len(list(tmp_path.rglob("*.safetensors"))) >= 3 + 1  # two checkpoints, the adapter, a shard
    assert modes(tmp_path) == {0o666 & ~umask}


def test_programs_stay_programs_and_a_kept_default_wins(tmp_path):
    for name, mode in (("zero_to_fp32.py", 0o744), ("model.safetensors", 0o600)):
        (tmp_path / name).touch()
        (tmp_path / name).chmod(mode)
    before = os.umask(0o027)
    try:
        as_new_files(tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "zero_to_fp32.py").stat().st_mode) & 0o111 == 0o100
    assert stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode) == 0o640
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "zero_to_fp32.py"]


# ------------------------------------------------------------------------------------------------------ folders


def test_a_data_cache_that_cannot_be_written_is_named(start, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", Path(NOWHERE))
    code, said = start()
    assert code == 1 and "Traceback" not in said
    assert f"error: HF_DATASETS_CACHE (or HF_HOME): {NOWHERE}, which holds tokenized rows, cannot be written" in said


def test_a_reference_cache_that_cannot_be_written_is_named_where_it_is_used(start, monkeypatch):
    code, said = start("--precompute_ref_log_probs=true", f"--reference_cache_dir={NOWHERE}")
    assert code == 1 and f"reference_cache_dir: {NOWHERE}, which holds the reference's log-probs" in said
    monkeypatch.setattr(caches, "default_folder", lambda: Path(NOWHERE))
    assert "error: reference_cache_dir" in start("--precompute_ref_log_probs=true")[1]
    assert start("--max_steps=1", "--save_strategy=no")[0] == 0


@pytest.mark.parametrize(
    ("variable", "report_to"), [("TRACKIO_DIR", "trackio"), ("TENSORBOARD_LOGGING_DIR", "tensorboard")]
)
def test_a_trackers_folder_that_cannot_be_written_is_named(variable, report_to, monkeypatch):
    args = types.SimpleNamespace(
        report_to=[report_to], deepspeed_plugin=None, precompute_ref_log_probs=False, trust_remote_code=False
    )
    caches.refuse_unwritable(args)
    monkeypatch.setenv(variable, NOWHERE)
    with refused(variable, f"{variable}: {NOWHERE}, which holds "):
        caches.refuse_unwritable(args)


def test_no_folder_for_what_torch_compiles_or_for_temporary_files():
    """Before anything is imported that would fail on it."""
    nowhere = (
        "import tempfile\ndef none(): raise FileNotFoundError(2, 'No usable folder')\ntempfile.gettempdir = none\n"
    )
    for code, variable, env in (
        ("import mdpo", "TORCHINDUCTOR_CACHE_DIR", {"TORCHINDUCTOR_CACHE_DIR": NOWHERE}),
        (f"{nowhere}import mdpo", "TMPDIR", {}),
    ):
        bare = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}  # torch sets it
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, env={**bare, **env}, capture_output=True, text=True)
        assert done.returncode == 1 and f"ImportError: {variable}: " in done.stderr
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": NOWHERE}
    done = subprocess.run([sys.executable, "run_dpo.py"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith(f"error: TORCHINDUCTOR_CACHE_DIR: {NOWHERE} cannot be")
    assert done.stderr.count("\n") == 1


def test_a_disk_that_fills_up_while_rows_are_kept(start, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(datasets.Dataset, "map", full)
    code, said = start()
    assert code == 1 and "Traceback" not in said and "No space left on device. Set HF_DATASETS_CACHE" in said


def test_a_reference_pass_survives_a_disk_that_fills_up(tmp_path, monkeypatch, capsys):
    """Its hours are worth more than the cache: said once, and the numbers in memory are used."""
    cache = ReferenceCache(tmp_path / "cache")

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("mdpo.reference.logp_cache.write_shard", full)
    for key in (b"a" * 16, b"b" * 16):
        cache.add(key, np.zeros(1, np.float32))
        cache.flush()
    out = capsys.readouterr().out
    assert out.count("reference_cache_dir") == 1 and "No space left on device" in out


# ------------------------------------------------------------------------------------------------------ wandb


@pytest.fixture
def server():
    """A function: a status that an HTTP server answers with to everything -> its URL and what it was asked."""
    running = []

    def serve(status):
        asked = []

        class Answer(BaseHTTPRequestHandler):
            def do_POST(self):
                asked.append((self.path, self.headers.get("Authorization")))
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *args):
                pass

        running.append(HTTPServer(("127.0.0.1", 0), Answer))
        threading.Thread(target=running[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{running[-1].server_port}", asked

    yield serve
    for one in running:
        one.shutdown()
        one.server_close()


@pytest.mark.parametrize(
    ("status", "trouble"),
    [
        *((status, None) for status in (200, 400, 404)),
        *((status, f"answers HTTP {status}") for status in (500, 503)),
        *((status, f"does not take the login (HTTP {status}: `wandb login --relogin`)") for status in (401, 403)),
    ],
)
def test_what_a_wandb_server_answers(status, trouble, server):
    url, asked = server(status)
    assert trackers.server_trouble(url, "secret") == trouble
    [(path, login)] = asked
    assert path == "/graphql" and login.startswith("Basic ")


def test_a_wandb_server_without_a_login_of_ours_is_not_asked_for_one(server):
    assert trackers.server_trouble(server(401)[0], None) is None  # an identity token is the client's own affair


def test_a_wandb_server_that_accepts_and_says_nothing(monkeypatch):
    monkeypatch.setattr(trackers, "ANSWER_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert trackers.server_trouble(url, "secret") == "gives no answer within 0 s"


def test_a_wandb_server_that_answers_a_letter_at_a_time(monkeypatch):
    """Every byte comes in time, and the answer never does."""
    monkeypatch.setattr(trackers, "ANSWER_S", 0.5)
    over = threading.Event()

    def drip(listening):
        peer, _ = listening.accept()
        while not over.wait(0.1):
            peer.send(b"H")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=drip, args=(listening,), daemon=True).start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        assert trackers.server_trouble(url, "secret").startswith("gives no answer within")
        over.set()


def test_a_proxy_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    said = trackers.server_trouble("http://wandb.invalid", "secret")
    assert said.startswith("cannot be reached through the proxy that is set (HTTPS_PROXY, HTTP_PROXY)")


def test_an_unreachable_wandb_ends_a_run_before_the_tokenizer(start, monkeypatch):
    import wandb

    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"  # nobody listens there any more
    for name, value in {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": url, "WANDB_MODE": "online"}.items():
        monkeypatch.setenv(name, value)
    wandb.teardown()  # settings of an earlier test
    monkeypatch.setattr(preflight, "load_tokenizer", lambda *_: pytest.fail("came as far as the tokenizer"))
    try:
        code, said = start("--report_to=wandb")
    finally:
        wandb.teardown()
    assert code == 1 and "Traceback" not in said
    assert f"report_to: wandb, but {url} cannot be reached (Connection refused). Keep the run's log" in said
    assert "WANDB_MODE=offline" in said


def test_an_error_of_wandb_where_training_begins_has_no_traceback(capsys):
    from wandb.errors import CommError

    def main(argv):
        raise CommError("entity nobody not found")

    assert run(main, []) == 1
    err = capsys.readouterr().err
    assert err.startswith("\nerror: report_to: wandb: entity nobody not found. Keep the run's log on disk")


# ------------------------------------------------------------------------------------------------------ terminals


@pytest.mark.parametrize(
    ("encoding", "written"),
    [
        ("ascii", "2 x 3 - 4 -> \\xfc \\u6c34 \\U0001f40e ..."),
        ("latin-1", "2 × 3 - 4 -> ü \\u6c34 \\U0001f40e ..."),
        ("utf-8", "2 × 3 – 4 → ü 水 🐎 …"),
    ],
)
def test_what_a_terminal_cannot_show_is_written_in_words(encoding, written, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    monkeypatch.delenv("RANK", raising=False)
    speak_on_any_terminal()
    say("2 × 3 – 4 → ü 水 🐎 …")
    assert raw.getvalue().decode(encoding) == written + "\n"


def test_bytes_of_a_file_name_stay_bytes(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="utf-8"))
    speak_on_any_terminal()
    say(os.fsdecode(b"/data/\xf6"))
    assert raw.getvalue() == b"/data/\xf6\n"


@pytest.fixture
def unusual(made, tmp_path):
    """(recipe, flags) of a run whose data is not ASCII."""
    rows = agent_rows(6)
    for row in rows:
        for side in ("chosen", "rejected"):
            row[side][0] = {"role": "user", "content": row[side][0]["content"] + " – Größe × 水 🐎 …"}
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    flags = [f"--dataset_mixer={{{data}: 1.0}}", "--test_split_size=2", "--eval_strategy=steps", "--eval_steps=2"]
    return str(made / "recipe.yaml"), flags


def test_a_run_and_the_scripts_on_an_ascii_terminal(unusual, tmp_path, monkeypatch):
    recipe, flags = unusual
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    out = f"{tmp_path}/out"
    for name, *argv in (
        ("run_dpo", recipe, f"--output_dir={out}", *flags),
        ("check_data", recipe, *flags),
        ("show_masks", recipe, *flags),
        ("show_masks", recipe, *flags, f"--html={tmp_path}/page.html"),
        ("plan_memory", recipe, *flags, f"--config_file={ROOT}/training_configs/cpu.yaml"),
        ("evaluate", out, f"--recipe={recipe}", *flags[:2]),
        ("compare_runs", out, out, f"--out={tmp_path}/compare.html"),
    ):
        raw = io.BytesIO()
        for stream in ("stdout", "stderr"):
            monkeypatch.setattr(sys, stream, io.TextIOWrapper(raw, encoding="ascii", write_through=True))
        code = run(importlib.import_module(name).main, argv)
        text = raw.getvalue().decode("ascii")
        assert code == 0 and text, f"{name}\n{text[-2000:]}"
    assert "β = 0.1" in Path(out, "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_run_in_a_locale_without_letters(unusual, tmp_path):
    """Every open() that names no encoding would take ASCII."""
    recipe, flags = unusual
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "run_dpo.py", recipe, f"--output_dir={tmp_path}/out", *flags]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True)
    text = (done.stdout + done.stderr).decode("ascii")
    assert done.returncode == 0 and "warning: file names are ascii here" in text, text[-2000:]
    assert "β = 0.1" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    command[3] = f"--output_dir={tmp_path}/öut"
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True)
    assert done.returncode == 1 and b"Traceback" not in done.stdout + done.stderr
    assert b"its bytes are no text in ascii" in done.stderr


def test_an_argument_in_no_encoding_is_refused(capsys):
    assert run(lambda argv: pytest.fail("was started"), [os.fsdecode(b"--output_dir=/data/\xf6")]) == 1
    assert "its bytes are no text in" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ text files


def template_of(made, path: Path):
    model = ModelConfig(model_name_or_path=str(made / "model"))
    tokenizer = load_tokenizer(model, DataArguments({"x": 1.0}, chat_template=str(path)))
    return ChatTemplate(tokenizer)


@pytest.mark.parametrize("change", [lambda text: b"\xef\xbb\xbf" + text, lambda text: text.replace(b"\n", b"\r\n")])
def test_a_template_file_of_an_editor_on_windows(change, made, tmp_path):
    """A byte order mark and line ends, of which no template means anything."""
    text = b"{%- for m in messages -%}\n<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\n"
    (tmp_path / "plain.jinja").write_bytes(text)
    (tmp_path / "windows.jinja").write_bytes(change(text))
    plain, windows = (template_of(made, tmp_path / name) for name in ("plain.jinja", "windows.jinja"))
    assert windows.render(TURNS) == plain.render(TURNS)
    assert plain.render(TURNS).startswith("<|im_start|>user\nHi<|im_end|>\n")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (CHATML.encode("utf-16"), "(byte 0)"),
        (CHATML.encode("utf-16-le"), "UTF-16 or binary"),
        (CHATML.replace("user", "usér").encode("latin-1") + b"\xe9", "(byte "),
        (b"\xef\xbb\xbf \n", "empty"),
    ],
)
def test_a_template_file_of_another_encoding_is_refused(content, words, made, tmp_path):
    (tmp_path / "own.jinja").write_bytes(content)
    with refused("chat_template", f"{tmp_path}/own.jinja ", words, "UTF-8"):
        template_of(made, tmp_path / "own.jinja")


def test_a_byte_order_mark_in_a_models_own_template(made, tmp_path, capsys):
    folder = shutil.copytree(made / "model", tmp_path / "model")
    own = folder / "chat_template.jinja"
    own.write_bytes(b"\xef\xbb\xbf" + own.read_bytes())
    tokenizer = load_tokenizer(ModelConfig(model_name_or_path=str(folder)), DataArguments({"x": 1.0}))
    assert ChatTemplate(tokenizer).render(TURNS).startswith("<|im_start|>user")
    assert f"chat template of {folder}: its byte order mark" in capsys.readouterr().out
    raw = AutoTokenizer.from_pretrained(folder)  # the wrong twin
    assert ChatTemplate(raw).render(TURNS).startswith("\ufeff")


def test_a_deepspeed_file_that_is_no_json_is_named(start, tmp_path):
    (tmp_path / "ds.json").write_bytes(b"\xef\xbb\xbf{}")
    code, said = start(f"--deepspeed={tmp_path}/ds.json")
    assert code == 1 and f"error: --deepspeed: {tmp_path}/ds.json is no JSON in UTF-8 (Unexpected UTF-8 BOM" in said


# ------------------------------------------------------------------------------------------------------ tokenizers


@pytest.fixture
def mistral(made, tmp_path):
    """A folder as Mistral's models have it: a tokenizer.json, and mistral-common's own file beside it."""
    folder = shutil.copytree(made / "model", tmp_path / "mistral")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mistral"}))
    (folder / "tekken.json").write_text("{}")
    return folder


def test_mistral_commons_class_is_not_taken(mistral, monkeypatch):
    """Where that package is installed; the same with the package itself: docs/log.md."""

    class MistralCommonBackend:
        """As that class: no `is_fast`, no template."""

    real = AutoTokenizer.from_pretrained
    asked = []

    def from_pretrained(name, mistral_format=None, **kwargs):
        asked.append(mistral_format)
        return real(name, **kwargs) if mistral_format is False else MistralCommonBackend()

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    tokenizer = fast_tokenizer(str(mistral))
    assert tokenizer.is_fast and tokenizer.chat_template == CHATML and asked == [False]

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: MistralCommonBackend())  # its own config
    assert fast_tokenizer(str(mistral)).chat_template == CHATML


def test_mistral_commons_file_alone_is_refused(mistral):
    (mistral / "tokenizer.json").unlink()
    with refused("tokenizer", mistral, "tekken.json", "tokenizer_name_or_path"):
        fast_tokenizer(str(mistral))


def test_a_slow_tokenizer_is_refused_with_what_to_do(made, monkeypatch):
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: types.SimpleNamespace(is_fast=False))
    with refused("tokenizer", made / "model", "SimpleNamespace", "tokenizer_name_or_path"):
        fast_tokenizer(str(made / "model"))
