"""mdpo/rollouts/serving.py: servers that sampling starts, against a little one that dies, hangs and talks nonsense."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import sample as script
from errors import refused
from peft import LoraConfig, get_peft_model
from repository import ROOT
from tiny import CHATML, tiny_llama, tokenizer_for
from transformers import AutoModelForCausalLM

from mdpo.config.loop import Loop
from mdpo.rollouts import serving
from mdpo.rollouts.iterations import Iterations
from mdpo.rollouts.server_commands import PORTS, device_groups, free_ports, served_words
from mdpo.rollouts.serving import Servers

LITTLE = f"{sys.executable} -S {ROOT}/tests/helpers/little_server.py {{model}} {{port}}"
N = 40  # tasks


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(serving, "LOOK_S", 0.05)


@pytest.fixture
def workshop(tmp_path):
    """A model that nobody loads, tasks, and what the server answers to each: the right box."""
    tokenizer = tokenizer_for(CHATML, "byte", eos="<|im_end|>")
    tiny_llama(tokenizer, seed=0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    turn = [*tokenizer("It is \\boxed{42}.").input_ids, tokenizer.eos_token_id]
    (tmp_path / "model/answer.json").write_text(json.dumps(turn))
    rows = [{"question": f"{n}: 6 * 7?", "answer": 42, "key": f"q{n}"} for n in range(N)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "r.yaml").write_text(f"model_name_or_path: {tmp_path}/model\ndataset_mixer: {{none.jsonl: 1.0}}\n")
    return tmp_path


def arguments(folder: Path, serve: str = LITTLE, model: str = "model", *more: str) -> list[str]:
    return [f"{folder}/{model}", f"--recipe={folder}/r.yaml", f"--tasks={folder}/q.jsonl", "--dtype=float32",
            "--bf16=false", "--backend=server", f"--serve={serve}", f"--save={folder}/t.jsonl", "--max_new_tokens=100",
            "--in_flight=4", *more]  # fmt: skip


def processes(folder: Path, model: str = "model") -> list[tuple[int, int]]:
    """(server, its child), in the order of their starts."""
    path = folder / model / "processes"
    lines = path.read_text().splitlines() if path.exists() else []
    return [tuple(map(int, line.split()[:2])) for line in lines]


def alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def all_end(folder: Path) -> None:
    """Nothing of any server is left, at once or in a moment."""
    started = [process for pair in processes(folder) for process in pair]
    deadline = time.monotonic() + 20
    while left := [process for process in started if alive(process)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    assert started


def check_whole(folder: Path) -> None:
    keys = [json.loads(line)["key"] for line in (folder / "t.jsonl").read_text().splitlines()]
    assert sorted(keys) == sorted(f"q{n}" for n in range(N))


def test_servers_are_started_and_stopped(workshop, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.setattr(serving, "SAID_S", 0.0)  # a line of progress at every look
    script.main(arguments(workshop, LITTLE, "model", "--servers=2", "--gpus_per_server=2"))
    check_whole(workshop)
    all_end(workshop)
    lines = (workshop / "model/processes").read_text().splitlines()
    assert sorted(line.split()[2] for line in lines) == ["4,5", "6,7"]
    said = capsys.readouterr().out
    assert said.count("2 of 2 servers answer") == 1 and "1.0000" in said
    assert {path.name for path in workshop.glob("t.server-*.log")} == {"t.server-0.log", "t.server-1.log"}
    script.main(arguments(workshop, LITTLE))  # all is there: none is started
    assert len(processes(workshop)) == 2


def test_servers_that_are_killed_are_started_again(workshop, monkeypatch, capsys):
    """SIGKILL at random moments, ten times, of either server or of the child of one: every trajectory is there once."""
    monkeypatch.setattr(serving, "DEATHS", 20)
    rng, killed = random.Random(5), []

    def kill():
        while not (workshop / "t.jsonl").read_text():
            time.sleep(0.02)
        while len(killed) < 10:
            time.sleep(rng.uniform(0.05, 0.3))
            running = [process for pair in processes(workshop) for process in pair if alive(process)]
            if len((workshop / "t.jsonl").read_text().splitlines()) == N:
                return
            if running:
                killed.append(rng.choice(running))
                os.kill(killed[-1], signal.SIGKILL)

    monkeypatch.setattr(script, "sample", lambda *rest, now=script.sample: [threading.Thread(target=kill).start(),
                                                                           now(*rest)][1])  # fmt: skip
    (workshop / "t.jsonl").touch()
    script.main(arguments(workshop, LITTLE, "model", "--servers=2", "--in_flight=2"))
    check_whole(workshop)
    all_end(workshop)
    assert len(killed) == 10 and "begins" in capsys.readouterr().out
    assert len(processes(workshop)) >= 2 + len(killed) // 2 - 1  # two kills may be of one server, the last one too late


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_is_left_of_a_sampling_that_is_killed(workshop, number):
    """Nor of a server that has just begun; the same command continues."""
    rng, command = random.Random(int(number)), [sys.executable, str(ROOT / "scripts/sample.py")]
    command += arguments(workshop, f"{LITTLE} slow")
    for n in range(3):
        there = len(processes(workshop))
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(processes(workshop)) == there:
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.7))
        process.send_signal(number)
        assert process.wait(60) == (75 if number == signal.SIGTERM else -number), n
        all_end(workshop)
    script.main(arguments(workshop))
    check_whole(workshop)


FORKS = """
import multiprocessing, sys, time
from pathlib import Path
from mdpo.rollouts.serving import Servers
with Servers(sys.argv[1], sys.argv[2], Path(sys.argv[3])):
    multiprocessing.get_context("fork").Process(target=time.sleep, args=(300,)).start()  # as an environment may
    print("there", flush=True)
    time.sleep(300)
"""


def test_a_child_that_holds_the_keeper_s_stdin_keeps_no_server(workshop):
    command = [sys.executable, "-c", FORKS, LITTLE, str(workshop / "model"), str(workshop / "t.jsonl")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while "there" not in process.stdout.readline():
        assert process.poll() is None
    (child,) = (c for c in psutil.Process(process.pid).children() if "server_keeper" not in " ".join(c.cmdline()))
    process.kill()
    process.wait()
    all_end(workshop)
    assert child.is_running()  # it was there all the time
    child.kill()


def test_nothing_is_left_of_a_keeper_that_is_killed(workshop, monkeypatch):
    monkeypatch.setattr(serving, "DEATHS", 1)
    with Servers(LITTLE, str(workshop / "model"), workshop / "t.jsonl") as servers:
        (server,) = servers.servers
        first, ((number, child),) = server.process.pid, processes(workshop)
        os.kill(first, signal.SIGKILL)
        while len(processes(workshop)) < 2 or not servers.up():
            time.sleep(0.05)
        assert not alive(number) and servers.starts(server.address) == 2
        os.kill(child, signal.SIGKILL)  # it has a session of its own: only its keeper could have known of it
    (_, (number, child)) = processes(workshop)
    assert not alive(number) and not alive(child)


def test_a_server_that_dies_while_it_starts(workshop):
    with refused("serve", "exit code 3", "no such model", workshop / "t.server-0.log"):
        script.main(arguments(workshop, f"{LITTLE} dies"))


def test_a_server_that_never_answers(workshop, monkeypatch):
    monkeypatch.setattr(serving, "START_S", 1.0)
    with refused("serve", "did not answer within 1 s"):
        script.main(arguments(workshop, f"{LITTLE} silent"))
    all_end(workshop)


def test_a_server_that_talks_nonsense(workshop, monkeypatch):
    monkeypatch.setattr("mdpo.rollouts.server.TRIES", 2)
    with refused("serve", "no choice"):
        script.main(arguments(workshop, f"{LITTLE} garbage"))
    all_end(workshop)


def test_a_server_that_dies_too_often_is_given_up(workshop, monkeypatch):
    monkeypatch.setattr(serving, "DEATHS", 1)
    with Servers(LITTLE, str(workshop / "model"), workshop / "t.jsonl") as servers:
        for n in (1, 2):
            while len(processes(workshop)) < n or not servers.up():
                time.sleep(0.02)
            os.kill(processes(workshop)[-1][0], signal.SIGKILL)
        with refused("serve", "no server is left", "t.server-0.log"):
            while True:
                servers.up()
                time.sleep(0.02)
    all_end(workshop)


def test_an_adapter_is_served_merged(workshop, monkeypatch):
    """In a folder of a moment, in which the little server finds its answer and writes down its number."""
    base = AutoModelForCausalLM.from_pretrained(workshop / "model", dtype="float32")
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(workshop / "adapter")
    seen = []

    class Seeing(Servers):
        def __init__(self, command, model, *rest):
            seen.append((model, sorted(path.name for path in Path(model).iterdir())))
            Path(model, "answer.json").write_text((workshop / "model/answer.json").read_text())
            super().__init__(command, model, *rest)

    monkeypatch.setattr("mdpo.rollouts.sampling.Servers", Seeing)
    script.main(arguments(workshop, LITTLE, "adapter"))
    check_whole(workshop)
    ((folder, files),) = seen
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(files) and not Path(folder).exists()


@pytest.mark.parametrize(
    ("serve", "details"),
    [("vllm --port {port}", ["{model}"]), ("vllm {model}", ["{port}"]), ("nix-da {model} {port}", ["nix-da"]),
     ("'x {model} {port}", ["quotation"])],
)  # fmt: skip
def test_commands_that_cannot_be_started(serve, details, workshop):
    with refused("serve", *details):
        script.main(arguments(workshop, serve))


def test_options_beside_serve(workshop):
    with refused("base_url"):
        script.main(arguments(workshop, LITTLE, "model", "--base_url=http://127.0.0.1:9/v1"))
    for option in ("--servers=2", "--gpus_per_server=2"):
        with refused(option.strip("-").partition("=")[0], "--serve"):
            script.main([a for a in arguments(workshop, LITTLE, "model", option) if not a.startswith("--serve=")])
    with refused("processes", "--servers"):
        script.main(arguments(workshop, LITTLE, "model", "--processes=2"))
    with refused("serve", "--backend"):
        script.main([a for a in arguments(workshop) if not a.startswith("--backend")])


def test_servers_are_no_setting_of_a_stage():
    """A loop's finished stages are not refused where others serve; its samples have no seed, as servers take none."""
    own = {"backend": "server", "temperature": 1.0}
    served = {**own, "serve": LITTLE, "servers": 2, "gpus_per_server": 1, "in_flight": 8, "tools_at_once": 3}
    loops = [Iterations(Loop("r", "o", "t", "h", sample=options), "p") for options in (own, served)]
    assert loops[0].sampled(1).settings == loops[1].sampled(1).settings
    assert loops[0].sampled(1).settings["sample"] == own
    command = loops[1].sampled(1).command
    assert {f"--serve={LITTLE}", "--servers=2", "--gpus_per_server=1", "--in_flight=8", "--tools_at_once=3"} <= set(
        command
    )
    assert not any(word.startswith("--seed") for word in command)


def test_words_devices_and_ports(monkeypatch):
    words = served_words("env A='{\"b\": 1}' python -m x {model} --port={port}", "my model", 7)
    assert words == ["env", 'A={"b": 1}', "python", "-m", "x", "my model", "--port=7"]
    assert device_groups(3, 0) == [{}] * 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert device_groups(2, 1) == [{"CUDA_VISIBLE_DEVICES": "2"}, {"CUDA_VISIBLE_DEVICES": "3"}]
    with refused("gpus_per_server", "2 x 2", "where 2"):
        device_groups(2, 2)
    ports = free_ports(5)
    assert len(set(ports)) == 5 and all(PORTS[0] <= port < PORTS[1] for port in ports)
