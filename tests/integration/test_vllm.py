"""Sampling by a real server: vLLM on a CPU, from an environment of its own (make vllm-env)."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import sample as script
import torch
from errors import refused
from repository import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from mdpo.masking.chat_template import ChatTemplate
from mdpo.rollouts.generate import stop_ids
from mdpo.rollouts.server import Server
from mdpo.rollouts.serving import Servers

PYTHON = Path(os.environ.get("MDPO_VLLM_PYTHON", ROOT / ".venv-vllm/bin/python"))
MODEL = ROOT / "models/smollm2-135m-instruct"
CONTEXT, NEW = 1024, 48  # tokens
VLLM = f"{PYTHON} -m vllm.entrypoints.openai.api_server --model {{model}} --host 127.0.0.1 --port {{port}}"
SERVE = (
    f"env VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 {VLLM} "
    f"--dtype float32 --max-model-len {CONTEXT} --enforce-eager"
)
CLOSE = 1e-3  # nats: float32 by two implementations
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="needs vLLM on a CPU (make vllm-env)"),
    pytest.mark.skipif(not MODEL.exists(), reason="needs SmolLM2 (make model)"),
]


@pytest.fixture(scope="module")
def vllm(tmp_path_factory):
    with Servers(SERVE, str(MODEL), tmp_path_factory.mktemp("vllm") / "served.jsonl") as servers:
        yield servers


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def stops(model):
    return stop_ids(model.generation_config, ChatTemplate(AutoTokenizer.from_pretrained(MODEL)))


def command(folder: Path, backend: str, *more: str, n: int = 5) -> list[str]:
    """Questions that the model answers with Python, or tries to."""
    rows = [
        {"question": f"What is {17 + n} * {3 + n}?", "answer": (17 + n) * (3 + n), "key": f"q{n}"} for n in range(n)
    ]
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "r.yaml").write_text(f"model_name_or_path: {MODEL}\ndtype: float32\ndataset_mixer: {{none.jsonl: 1.0}}\n")
    return [str(MODEL), f"--recipe={folder}/r.yaml", f"--tasks={folder}/q.jsonl", "--bf16=false",
            f"--backend={backend}", f"--save={folder}/{backend}.jsonl", f"--max_new_tokens={NEW}", "--max_turns=3",
            "--instruction=Write a python code block that prints the answer.", *more]  # fmt: skip


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@torch.no_grad()
def log_probs(model, ids: list[int]) -> torch.Tensor:
    """(T - 1, V): of what may follow each token."""
    return model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)


def check_log_probs(model, trajectories: list[dict]) -> int:
    """Those that the server recorded are the model's own; how many were compared."""
    compared = 0
    for trajectory in trajectories:
        for sequence in trajectory["sequences"]:
            ids = sequence["input_ids"]
            ours = log_probs(model, ids).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            theirs = [(t, x) for t, x in enumerate(sequence["logprobs"]) if x is not None]
            assert len(theirs) == sum(sequence["assistant_masks"])
            assert max(abs(ours[t - 1].item() - x) for t, x in theirs) < CLOSE
            compared += len(theirs)
    return compared


def test_greedy_trajectories_are_those_of_the_model_here(vllm, model, stops, tmp_path):
    """They may part where the two likeliest tokens are as likely; each sampled id has the model's log-prob."""
    script.main(command(tmp_path, "server", f"--base_url={vllm.up()[0]}"))
    script.main(command(tmp_path, "transformers"))
    there, here = ({row["key"]: row for row in rows(tmp_path / f"{name}.jsonl")} for name in ("server", "transformers"))
    assert there.keys() == here.keys() and len(there) == 5
    parted = 0
    for key, row in there.items():
        a, b = row["sequences"][0]["input_ids"], here[key]["sequences"][0]["input_ids"]
        same = next((t for t, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
        if same is not None:
            parted += 1
            first, second = log_probs(model, a[: same + 1])[-1].topk(2).values.tolist()
            assert first - second < CLOSE, (key, same, first - second)
        else:
            assert a == b and row["ended"] == here[key]["ended"] and row["messages"] == here[key]["messages"]
    assert parted <= 1 and any(row["turns"] > 1 for row in there.values())
    assert check_log_probs(model, list(there.values())) > 100
    check_ends(there.values(), stops)


def check_ends(trajectories, stops) -> None:
    """A turn ends in its stop, or has all its tokens."""
    ended = {row["ended"] for row in trajectories}
    assert ended <= {"done", "cut", "max turns", "too long"}
    for row in trajectories:
        for sequence in row["sequences"]:
            mask = sequence["assistant_masks"]
            turns, length = [], 0
            for t, supervised in enumerate([*mask, 0]):
                if not supervised and length:
                    turns.append((length, sequence["input_ids"][t - 1]))
                length = length + 1 if supervised else 0
            assert turns and all(last in stops or n == NEW for n, last in turns)


def test_samples_have_the_log_probs_of_the_model(vllm, model, stops, tmp_path):
    """At any temperature those without it; four samples of a task are four."""
    options = ("--temperature=0.7", "--samples=4", "--max_turns=1")
    script.main(command(tmp_path, "server", f"--base_url={vllm.up()[0]}", *options, n=2))
    trajectories = rows(tmp_path / "server.jsonl")
    assert check_log_probs(model, trajectories) > 50 and len(trajectories) == 8
    assert len({tuple(row["sequences"][0]["input_ids"]) for row in trajectories}) > 4
    check_ends(trajectories, stops)


def test_a_prompt_that_is_too_long(vllm, tmp_path):
    """Sampling knows the context that is served; the server's own words are shown otherwise."""
    (address,) = vllm.up()
    told = command(tmp_path, "server", f"--base_url={address}")
    (tmp_path / "q.jsonl").write_text(json.dumps({"question": "one, two, " * 600, "answer": 3}) + "\n")
    script.main(told)
    (row,) = rows(tmp_path / "server.jsonl")
    assert row["ended"] == "too long" and row["sequences"] == []
    with Server([address], str(MODEL), {2}, 49152) as server, refused("base_url", CONTEXT, "input tokens"):
        asyncio.run(server.sample([28] * (CONTEXT + 1), 4))


def test_a_server_that_is_killed_is_reported(vllm, tmp_path, monkeypatch):
    """It was not started by sampling: what has ended is kept, and the same command continues when it is there again."""
    monkeypatch.setattr("mdpo.rollouts.server.TRIES", 2)
    (served,) = vllm.servers
    told = command(tmp_path, "server", f"--base_url={served.address}", "--in_flight=1", n=8)
    path = tmp_path / "server.jsonl"
    before = psutil.Process(served.process.pid).children(recursive=True)

    def kill():
        while not path.exists() or not path.read_text():
            time.sleep(0.05)
        os.kill(before[0].pid, signal.SIGKILL)

    threading.Thread(target=kill).start()
    with refused("base_url", served.address, "2 tries failed"):
        script.main(told)
    kept = path.read_text()
    assert 1 <= len(kept.splitlines()) < 8
    while served.starts < 2 or not vllm.up():  # by the fixture
        time.sleep(0.2)
    assert not any(process.is_running() for process in before)  # the engine, too
    script.main(told)
    assert path.read_text().startswith(kept)
    assert sorted(row["key"] for row in rows(path)) == [f"q{n}" for n in range(8)]


TRANSFORMERS = (
    f"env HF_HUB_OFFLINE=1 {PYTHON.with_name('transformers')} serve {{model}} --host 127.0.0.1 --port {{port}}"
)


def test_a_server_without_token_ids(model, tmp_path):
    """transformers serve, started by sampling: greedy messages are those of the model here, without their ids."""
    script.main(command(tmp_path, "chat", f"--serve={TRANSFORMERS} --device cpu"))
    script.main(command(tmp_path, "transformers"))
    there, here = ({row["key"]: row for row in rows(tmp_path / f"{name}.jsonl")} for name in ("chat", "transformers"))
    assert len(there) == 5
    for key, row in there.items():
        assert row["messages"] == here[key]["messages"] and row["ended"] == here[key]["ended"] and not row["sequences"]
    assert any(row["turns"] > 1 for row in there.values())


ENVIRONMENT = '''
class Words:
    def reset(self, **row):
        return None


def even(completions, **row):
    """Half of the answers are right, and no policy can know which: of 8 to a task, two differ."""
    return [float(len(completions[0][0]["content"]) % 2 == 0)]
'''


def loop_file(folder: Path) -> Path:
    (folder / "words.py").write_text(ENVIRONMENT)
    for name, n in (("tasks", 4), ("held_out", 2)):
        tasks = [
            {"prompt": ("Say hi.", "Greet me.", "Say hello.", "Good day!")[i], "key": f"{name}-{i}"} for i in range(n)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tasks))
    (folder / "r.yaml").write_text(
        f"model_name_or_path: {MODEL}\ndtype: float32\nbf16: false\ndataset_mixer: {{none.jsonl: 1.0}}\n"
        "max_length: 300\nlearning_rate: 1.0e-6\nnum_train_epochs: 1\nper_device_train_batch_size: 2\n"
        "max_steps: 2\ndisable_tqdm: true\ndataset_num_proc: 1\nreport_to: none\n"
    )
    sampling = {"backend": "server", "serve": SERVE, "environment": f"{folder}/words.py:Words", "max_turns": 1,
                "rewards": f"{folder}/words.py:even", "max_new_tokens": 40, "in_flight": 4}  # fmt: skip
    loop = {"recipe": f"{folder}/r.yaml", "output_dir": f"{folder}/out", "tasks": f"{folder}/tasks.jsonl",
            "held_out_tasks": f"{folder}/held_out.jsonl", "iterations": 1, "stop_when_worse": False,
            "sample": {**sampling, "samples": 8, "temperature": 1.0}, "evaluate": sampling,
            "pair": {"pairs": "all"}}  # fmt: skip
    (folder / "loop.yaml").write_text(json.dumps(loop))
    return folder / "loop.yaml"


def test_a_loop_serves_its_policies(tmp_path):
    """From the first to the last stage; the engine is killed in the middle of sampling. Every trajectory is there once,
    the new policy is served, and no process is left."""
    path, out, seen = loop_file(tmp_path), tmp_path / "out", {}
    told = [sys.executable, str(ROOT / "scripts/iterate.py"), str(path)]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(told, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT)
    trajectories, killed = out / "iteration-1/sample/trajectories.jsonl", None
    while process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            seen[child.pid] = child
        if killed is None and trajectories.exists() and trajectories.read_text():
            engines = [
                child for child in seen.values() if child.is_running() and "EngineCore" in " ".join(child.cmdline())
            ]
            killed = engines[0]
            killed.kill()
        time.sleep(0.1)
    text = (tmp_path / "said").read_text()
    assert process.returncode == 0 and killed, text
    assert "start 1 of 3 begins" in text and "answers again" in text and text.count("1 of 1 servers answer") == 3
    jobs = sorted((row["key"], row["sample"]) for row in rows(trajectories))
    assert jobs == [(f"tasks-{i}", k) for i in range(4) for k in range(8)]
    policies = [rows(out / f"iteration-{n}/evaluate/trajectories.jsonl")[0]["policy"] for n in (0, 1)]
    assert policies[0] == rows(trajectories)[0]["policy"] != policies[1]
    assert f"--model {out}/iteration-1/train" in (out / "iteration-1/evaluate/trajectories.server-0.log").read_text()
    time.sleep(1)
    assert not [child for child in seen.values() if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
