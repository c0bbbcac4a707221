"""mdpo/rollouts/processes.py: several processes that generate, against one."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from multiprocessing import Pipe

import psutil
import pytest
import sample as script
from errors import refused
from repository import ROOT
from safetensors.torch import load_file, save_file
from tiny import CHATML, tiny_llama, tokenizer_for

from mdpo.config.loop import Loop
from mdpo.config.recipe import load_recipe
from mdpo.errors import UserError
from mdpo.rollouts import processes
from mdpo.rollouts.episode import Sampled
from mdpo.rollouts.iterations import Iterations
from mdpo.rollouts.loop_checks import check_sampling
from mdpo.rollouts.options import SamplingOptions
from mdpo.rollouts.processes import Child, Processes, counted, environments

N = 24  # tasks


@pytest.fixture
def workshop(tmp_path):
    """A random model and questions."""
    tokenizer = tokenizer_for(CHATML, "byte", eos="<|im_end|>")
    tiny_llama(tokenizer, seed=0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"question": f"{n}: 6 * 7?", "answer": 42, "key": f"q{n}"} for n in range(N)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "r.yaml").write_text(
        f"model_name_or_path: {tmp_path}/model\ndataset_mixer: {{none.jsonl: 1.0}}\ndtype: float32\nbf16: false\n"
    )
    return tmp_path


def arguments(folder, save: str, *more: str) -> list[str]:
    return [f"{folder}/model", f"--recipe={folder}/r.yaml", f"--tasks={folder}/q.jsonl", f"--save={folder}/{save}",
            "--max_new_tokens=30", *more]  # fmt: skip


def rows(path) -> dict[tuple[str, int], dict]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({(row["key"], row["sample"]) for row in found}) == len(found)
    return {(row["key"], row["sample"]): row for row in found}


@pytest.mark.parametrize("backend", ["transformers", "generate"])
def test_two_processes_sample_what_one_does(workshop, backend):
    """Greedily: ids, masks, texts and how it ended are the same, log-probs up to rounding."""
    for count in (1, 2):
        script.main(arguments(workshop, f"{count}.jsonl", f"--backend={backend}", f"--processes={count}"))
    one, two = rows(workshop / "1.jsonl"), rows(workshop / "2.jsonl")
    assert len(one) == N and one.keys() == two.keys()
    for key in one:
        for ours, theirs in zip(one[key]["sequences"], two[key]["sequences"], strict=True):
            known = [[x for x in s.pop("logprobs", []) if x is not None] for s in (ours, theirs)]
            assert known[1] == pytest.approx(known[0], abs=1e-4) and bool(known[0]) == (backend == "transformers")
        assert one[key] == two[key]
    # The count is no setting of a trajectory, nor of a loop's stage.
    script.main(arguments(workshop, "1.jsonl", f"--backend={backend}", "--processes=2"))
    loops = [Iterations(Loop("r", "o", "t", "h", evaluate=own), "p") for own in ({}, {"processes": 2})]
    assert loops[0].evaluated(1).settings == loops[1].evaluated(1).settings
    assert "--processes=2" in loops[1].evaluated(1).command


def test_each_process_has_noise_of_its_own(workshop):
    """The samples of a question, half of them of either process, differ."""
    script.main(arguments(workshop, "t.jsonl", "--processes=2", "--temperature=1", "--samples=8", "--seed=3"))
    found = rows(workshop / "t.jsonl")
    said = {tuple(row["sequences"][0]["input_ids"]) for row in found.values()}
    assert len(found) == 8 * N and len(said) > 0.99 * len(found)  # a random model: two equal texts are no chance


@pytest.fixture
def backend(workshop, monkeypatch):
    """Four processes in use, which are threads here: each turn is what its prompt holds, 100 or more an error."""

    class Thread(Child):
        def __init__(self, number, environment):
            self.number, self.ended, self.turns = number, "", {}
            self.pipe, theirs = Pipe()
            self.process = subprocess.Popen(["sleep", "60"])
            threading.Thread(target=self.answer, args=(theirs,), daemon=True).start()

        def answer(self, pipe):
            pipe.recv()
            pipe.send(({0}, 512))
            while True:
                try:
                    number, prompt, _ = pipe.recv()
                except (EOFError, OSError):
                    return
                pipe.send((number, Sampled([self.number]) if prompt[0] < 100 else UserError("backend: no", "backend")))

    monkeypatch.setattr(processes, "Child", Thread)
    recipe = load_recipe([str(workshop / "r.yaml"), "--report_to=none", f"--output_dir={workshop}"])
    with Processes("model", recipe, SamplingOptions(workshop / "t.jsonl", processes=4), 0) as ready:
        assert (ready.stops, ready.context) == ({0}, 512)
        yield ready
    assert all(child.process.poll() is not None for child in ready.children)


def test_a_conversation_stays_with_its_process_and_all_have_as_many(backend):
    """Also where tools take the time, so that no turn waits when the next conversation begins; the place of one that
    has ended is filled."""

    async def talk() -> set[int]:
        said = set()
        for _ in range(3):
            said |= set((await backend.sample([1], 1)).ids)
            await asyncio.sleep(0.01)
        return said

    async def talks(count: int) -> list[set[int]]:
        found = []
        for _ in range(count):
            found.append(asyncio.create_task(talk()))
            await asyncio.sleep(0.005)
        return await asyncio.gather(*found)

    async def both():
        return await talks(8), await talks(4)

    for found in asyncio.run(both()):
        assert all(len(at) == 1 for at in found)
        numbers = Counter(at.pop() for at in found)
        assert numbers == dict.fromkeys(range(4), len(found) // 4)


def test_a_turn_that_fails_is_its_own(backend):
    async def talks():
        return await asyncio.gather(*(backend.sample([n], 1) for n in (1, 100, 2)), return_exceptions=True)

    one, failed, other = asyncio.run(talks())
    assert isinstance(one, Sampled) and isinstance(other, Sampled)
    assert isinstance(failed, UserError) and failed.key == "backend"


def test_a_file_of_the_current_folder_is_no_module(workshop):
    (workshop / "tokenizers.py").write_text("raise SystemExit(7)")
    command = [sys.executable, f"{ROOT}/scripts/sample.py", *arguments(workshop, "t.jsonl", "--processes=2")]
    subprocess.run(command, cwd=workshop, check=True, capture_output=True)
    assert len(rows(workshop / "t.jsonl")) == N


def test_a_process_that_does_not_end_is_killed(monkeypatch):
    """Its pipe is closed, and a thread of the user's code keeps it."""
    monkeypatch.setattr(processes, "END_S", 0.2)
    child = object.__new__(Child)
    child.number, (child.pipe, theirs) = 3, Pipe()
    child.process = subprocess.Popen(["sleep", "60"])
    theirs.close()
    with refused("processes", "process 3", "-9"):
        child.receive()


def started(folder, *more: str) -> tuple[subprocess.Popen, list[psutil.Process]]:
    """The command in a process of its own that has written a trajectory, and its two."""
    command = [sys.executable, f"{ROOT}/scripts/sample.py", *arguments(folder, "t.jsonl", *more)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    path, deadline = folder / "t.jsonl", time.monotonic() + 120
    while not (path.exists() and path.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    return process, [child for child in children if "process_child" in " ".join(child.cmdline())]


SLOW = ("--processes=2", "--temperature=1", "--samples=40", "--max_new_tokens=60", "--in_flight=4")


@pytest.mark.slow
def test_the_death_of_a_process_is_said_and_nothing_is_lost(workshop):
    process, children = started(workshop, *SLOW)
    assert len(children) == 2
    children[1].kill()
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and "process 1 ended with exit code -9" in said and "Traceback" not in said
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)
    before = rows(workshop / "t.jsonl")
    assert 0 < len(before) < 40 * N
    script.main(arguments(workshop, "t.jsonl", *SLOW[:-1]))
    after = rows(workshop / "t.jsonl")
    assert len(after) == 40 * N and all(after[key] == row for key, row in before.items())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_process_is_left(workshop, number):
    process, children = started(workshop, *SLOW)
    os.kill(process.pid, number)
    process.communicate(timeout=60)
    deadline = time.monotonic() + 20
    while any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_what_stops_a_process_at_its_start_is_said(workshop):
    path = workshop / "model/model.safetensors"
    weights = load_file(path)
    save_file({name: tensor for name, tensor in weights.items() if "q_proj" not in name}, path, {"format": "pt"})
    said = []
    for count in ("1", "2"):
        with refused("model") as error:
            script.main(arguments(workshop, f"{count}.jsonl", f"--processes={count}"))
        said.append(str(error.value))
    assert said[0] == said[1]


def test_devices(monkeypatch, tmp_path):
    """A GPU for each, of those that this process sees; CPUs share their threads."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    assert [e["CUDA_VISIBLE_DEVICES"] for e in environments(3, "cuda")] == ["4", "5", "6"]
    with refused("processes", "4 x 1", "3 are there"):
        environments(4, "cuda")
    with refused("processes", "mps"):
        environments(2, "mps")
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    assert [e["OMP_NUM_THREADS"] for e in environments(3, "cpu")] == ["2"] * 3
    assert environments(16, "cpu")[0]["OMP_NUM_THREADS"] == "1"
    with refused("processes", "evaluate", "4 x 1"):  # of a loop, before its first stage
        check_sampling("evaluate", "t", SamplingOptions(tmp_path, processes=4), "cuda")


@pytest.mark.parametrize(
    ("device", "gpus", "threads", "in_flight", "wanted"),
    [("cuda", 8, 1, None, 8), ("cuda", 1, 64, None, 1), ("cuda", 8, 1, 3, 3), ("cpu", 4, 16, None, 2),
     ("cpu", 0, 1, None, 1), ("cpu", 0, 2, 1, 1), ("mps", 0, 8, None, 1)],
)  # fmt: skip
def test_as_many_as_fit_the_device(device, gpus, threads, in_flight, wanted, monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    _, options, _ = script.parse(["model", "--recipe=r", "--tasks=t", f"--save={tmp_path}/t", "--processes=auto"])
    assert counted(replace(options, in_flight=in_flight), device).processes == wanted


def test_options_of_processes(workshop):
    with refused("in_flight", 1, 2):
        script.main(arguments(workshop, "t.jsonl", "--processes=2", "--in_flight=1"))
    for value in ("0", "-1", "two", "2.0"):
        with pytest.raises(UserError, match="processes"):
            script.main(arguments(workshop, "t.jsonl", f"--processes={value}"))
