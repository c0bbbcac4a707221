"""scripts/iterate.py: two iterations of a tiny model, killed and started again; what a loop refuses."""

import dataclasses
import io
import json
import random
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import iterate
import pytest
from errors import refused
from loop_folder import trajectory, write_loop, write_trajectories
from repository import ROOT
from rich.console import Console
from tiny import CHATML, tiny_llama, tokenizer_for
from transformers import AutoTokenizer

from mdpo.config.loop import Loop, read_loop
from mdpo.masking.chat_template import ChatTemplate
from mdpo.memory.sharding import Sharding
from mdpo.reference.fingerprint import named_digest
from mdpo.reporting.loop_page import LOOP_PAGE, LoopPage
from mdpo.rollouts.iterations import DONE, Iterations, Stage, alone, contents_of, got_worse
from mdpo.rollouts.options import flags
from mdpo.rollouts.sft_recipe import last_checkpoint
from mdpo.rollouts.supervised import sft_rows

ENVIRONMENT = """
class Letters:
    \"\"\"Its reward is 1 where the answer has an even number of characters: no policy can know.\"\"\"

    def reset(self, **row):
        return None


def even(completions, **row):
    return [float(len(completions[0][0]["content"]) % 2 == 0)]
"""
STAGES = ["0/evaluate"] + [f"{n}/{stage}" for n in (1, 2) for stage in ("sample", "pair", "train", "evaluate")]


@pytest.fixture
def workshop(tmp_path):
    tokenizer = tokenizer_for(CHATML, "byte", eos="<|im_end|>")
    model = tiny_llama(tokenizer, seed=0)
    model.generation_config.eos_token_id = list(range(5, len(tokenizer), 4))  # a random model ends its turns so
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "letters.py").write_text(ENVIRONMENT)
    for name, n in (("tasks", 6), ("held_out", 4)):
        rows = [{"prompt": f"{name} {i}: what is {i} * 2?", "key": f"{name}-{i}"} for i in range(n)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(
        f"""
model_name_or_path: {tmp_path}/model
dtype: float32
dataset_mixer: {{{tmp_path}/none.jsonl: 1.0}}
max_length: 300
learning_rate: 1.0e-3
num_train_epochs: 1
per_device_train_batch_size: 2
logging_steps: 1
bf16: false
dataset_num_proc: 1
disable_tqdm: true
report_to: none
"""
    )
    return tmp_path


def loop_file(folder: Path, **changes) -> Path:
    sampling = {"environment": f"{folder}/letters.py:Letters", "rewards": f"{folder}/letters.py:even",
                "max_turns": 1, "max_new_tokens": 8}  # fmt: skip
    loop = {
        "recipe": f"{folder}/recipe.yaml", "output_dir": f"{folder}/out", "tasks": f"{folder}/tasks.jsonl",
        "held_out_tasks": f"{folder}/held_out.jsonl", "iterations": 2, "stop_when_worse": False,
        "sample": {**sampling, "samples": 4, "temperature": 1.0}, "evaluate": sampling, "pair": {"pairs": "all"},
        "train": {"learning_rate": 1e-4}, **changes,
    }  # fmt: skip
    path = folder / "loop.yaml"
    path.write_text(json.dumps(loop))  # JSON is YAML
    return path


def start(folder: Path) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "scripts/iterate.py"), str(folder / "loop.yaml")]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(folder: Path) -> list[str]:
    return [stage for stage in STAGES if (folder / "out" / f"iteration-{stage}" / DONE).is_file()]


def check_whole(folder: Path) -> None:
    """All stages are there, and each trajectory once."""
    assert finished(folder) == STAGES
    for stage in ("0/evaluate", "1/sample", "1/evaluate", "2/sample", "2/evaluate"):
        path = folder / "out" / f"iteration-{stage}" / "trajectories.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        jobs = sorted((row["key"], row["sample"]) for row in rows)
        name, n, samples = ("tasks", 6, 4) if "sample" in stage else ("held_out", 4, 1)
        assert jobs == sorted((f"{name}-{i}", k) for i in range(n) for k in range(samples))
    figures = json.loads((folder / "out/loop.json").read_text())
    assert all({"all_correct", "tokens", "reward_interval"} <= f.keys() for f in figures)
    text = (folder / "out" / LOOP_PAGE).read_text(encoding="utf-8")
    assert "finished: <b>9</b> stages" in text and "cannot be read" not in text and text.count("<figure ") == 9
    links = [f"iteration-{n}/train/run_report.html" for n in (1, 2)]
    assert re.findall('<a href="([^"]*)"', text) == links and all((folder / "out" / link).is_file() for link in links)
    assert len(re.findall('<div class="task">', text)) == 3 and text.count("<b>iteration 2</b>") == 3
    assert [f["iteration"] for f in figures] == [0, 1, 2] and all(f["conversations"] == 4 for f in figures)


@pytest.mark.slow
def test_a_loop_that_is_killed_goes_on_where_it_was(workshop):
    """SIGKILL, or SIGTERM as of a preemption, at random moments, of the loop itself: its stage ends with it, and
    nothing is lost or done twice."""
    loop_file(workshop)
    rng, kept, stopped = random.Random(7), [], 0
    for n in range(12):
        process = start(workshop)
        time.sleep(rng.uniform(4, 25))
        if process.poll() is not None:
            assert process.returncode == 0, process.communicate()[0][-2000:]
            break
        process.send_signal(signal.SIGTERM if n % 4 == 3 else signal.SIGKILL)
        said, stopped = process.communicate(timeout=120)[0], stopped + 1
        # Before Python listens to it, SIGTERM ends a process at once.
        assert process.returncode in ((75, -signal.SIGTERM) if n % 4 == 3 else (-signal.SIGKILL,)), said[-2000:]
        deadline = time.monotonic() + 60
        while orphans := processes_in(workshop):
            assert time.monotonic() < deadline, orphans
            time.sleep(0.2)
        assert finished(workshop)[: len(kept)] == kept
        kept = finished(workshop)
    last = start(workshop)
    said = last.communicate()[0]
    check_whole(workshop)
    assert last.returncode == 0 and stopped >= 10
    assert "held-out tasks" in said and f"page  {workshop}/out/{LOOP_PAGE}" in said
    assert f"{workshop}/out: {len(kept)} of 9 stages are finished" in said


SFT = """
per_device_train_batch_size: 2
max_steps: 6
save_steps: 1
learning_rate: 1.0e-3
bf16: false
use_cpu: true
report_to: none
"""


@pytest.mark.slow
def test_a_loop_with_sft_and_adapters(workshop):
    """One iteration. SFT is killed behind its first checkpoint, and resumed; the merged policy is another one."""
    (workshop / "sft.yaml").write_text(SFT)
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "What is 3 * 4?"}]
    (workshop / "experts.jsonl").write_text(f"{json.dumps({'messages': turns})}\n" * 4)
    text = (workshop / "recipe.yaml").read_text()
    (workshop / "recipe.yaml").write_text(f"{text}use_peft: true\nlora_r: 4\nlora_target_modules: all-linear\n")
    loop_file(workshop, iterations=1, sft=f"{workshop}/sft.yaml", sft_data=f"{workshop}/experts.jsonl")
    process, sft = start(workshop), workshop / "out/iteration-0/sft"
    while process.poll() is None and last_checkpoint(sft) is None:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    while processes_in(workshop):
        time.sleep(0.2)
    process = start(workshop)
    said = process.communicate()[0]
    assert process.returncode == 0, said[-2000:]
    assert "--resume_from_checkpoint=" in said
    assert json.loads((sft / "checkpoint-6/trainer_state.json").read_text())["global_step"] == 6
    policies = [named_digest(str(workshop / "out" / name), None, workshop) for name in (
        "../model", "iteration-0/sft", "iteration-1/merge/model")]  # fmt: skip
    assert len(set(policies)) == 3 and None not in policies
    rows = [json.loads(line) for line in (workshop / "out/iteration-1/evaluate/trajectories.jsonl").open()]
    assert {row["policy"] for row in rows} == {policies[2]}


def processes_in(folder: Path) -> list[str]:
    """Command lines of processes that work on a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if any(str(folder / "out") in word for word in words):
            found.append(" ".join(words))
    return found


@pytest.mark.slow
def test_a_loop_that_trains_under_zero3_goes_on_after_a_kill(workshop):
    """Two processes, killed with the loop between two steps: all end with it, and the next start resumes their last
    checkpoint. Sampling loads what the ranks gathered."""
    saved = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-3}
    zero3 = f"{ROOT}/training_configs/zero3_cpu.yaml"
    loop_file(workshop, iterations=1, accelerate_config=zero3, train=saved)
    train = workshop / "out/iteration-1/train"
    with (workshop / "said").open("w") as file:
        command = [sys.executable, str(ROOT / "scripts/iterate.py"), str(workshop / "loop.yaml")]
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        while process.poll() is None and last_checkpoint(train) is None:
            time.sleep(0.05)
        assert process.poll() is None, (workshop / "said").read_text()[-2000:]
        assert len(processes_in(workshop)) >= 3  # the launcher and two ranks
        process.kill()
        process.wait()
    written = (train / "checkpoint-1/trainer_state.json").stat().st_mtime
    deadline = time.monotonic() + 60
    while orphans := processes_in(workshop):
        assert time.monotonic() < deadline, orphans
        time.sleep(0.2)
    process = start(workshop)
    said = process.communicate()[0]
    assert process.returncode == 0, said[-2000:]
    assert "--overwrite_output_dir=false" in said and "first training loss 0.6931" in said
    assert (train / "checkpoint-1/trainer_state.json").stat().st_mtime == written  # not trained again
    rows = [json.loads(line) for line in (workshop / "out/iteration-1/evaluate/trajectories.jsonl").open()]
    policies = [named_digest(str(folder), None, workshop) for folder in (train, workshop / "model")]
    assert {row["policy"] for row in rows} == {policies[0]} and policies[0] != policies[1]


@pytest.mark.slow
def test_a_request_to_stop_reaches_the_stage(workshop):
    loop_file(workshop)
    process = start(workshop)
    while not processes_in(workshop):
        time.sleep(0.1)
    time.sleep(3)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 75 and said.rstrip().endswith("stopped by SIGTERM") and not processes_in(workshop)


@pytest.mark.slow
def test_a_loop_whose_disk_is_full_goes_on_when_it_is_not(workshop):
    """On a disk of 300 kB, which the first model does not fit on."""
    loop_file(workshop)
    out = workshop / "out"
    out.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", out], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        process = start(workshop)
        said = process.communicate()[0]
        assert process.returncode == 1 and "No space left on device" in said and "Traceback" not in said, said[-3000:]
        assert 0 < len(finished(workshop)) < len(STAGES)
        subprocess.run(["mount", "-o", "remount,size=300m", out], check=True)
        process = start(workshop)
        said = process.communicate()[0]
        assert process.returncode == 0, said[-2000:]
        check_whole(workshop)
    finally:
        subprocess.run(["umount", "-l", out], check=True)


def test_the_stages_of_a_loop(workshop):
    """Policies, references and files are handed on from stage to stage."""
    loop = read_loop(loop_file(workshop, reference="first", accelerate_config="zero2_for_dpo.yaml"))
    stages = [stage for _, stage in Iterations(loop, "first/policy").stages()]
    out = f"{workshop}/out"
    assert [str(s.folder) for s in stages] == [f"{out}/iteration-{stage}" for stage in STAGES]
    sample, pair, train, evaluate = (s.command for s in stages[5:])
    assert sample[2] == f"{out}/iteration-1/train" and evaluate[2] == f"{out}/iteration-2/train"
    assert f"{out}/iteration-2/sample/trajectories.jsonl" == pair[2]
    assert {"--model_name_or_path=" + f"{out}/iteration-1/train", "--ref_model_name_or_path=first/policy",
            f"--output_dir={out}/iteration-2/train", "--learning_rate=0.0001"} <= set(train)  # fmt: skip
    assert train[1:5] == ["-m", "accelerate.commands.launch", "--config_file", "zero2_for_dpo.yaml"]
    assert f'--dataset_mixer={{"{out}/iteration-2/pair/pairs.jsonl": 1.0}}' in train
    assert "--seed=2" in sample
    moved = Iterations(read_loop(loop_file(workshop)), "p").trained(2).command
    assert not any(word.startswith("--ref_model") for word in moved)


def test_the_stages_of_sft_and_of_adapters(workshop):
    """SFT comes first, its policy is the one of iteration 0; an adapter is merged before it is sampled."""
    config = workshop / "s.yaml"
    config.write_text("learning_rate: 1.0e-5\n")
    loop = read_loop(loop_file(workshop, iterations=1, sft=str(config), sft_data="d.jsonl", reference="first"))
    iterations = Iterations(loop, "p", adapters=True, max_length=300)
    stages, out = [stage for _, stage in iterations.stages()], f"{workshop}/out"
    names = ["0/rows", "0/sft", "0/evaluate", "1/sample", "1/pair", "1/train", "1/merge", "1/evaluate"]
    assert [str(s.folder) for s in stages] == [f"{out}/iteration-{name}" for name in names]
    rows, sft, first, sample, _, train, merge, last = (s.command for s in stages)
    assert rows[2] == "d.jsonl" and {"--model_name_or_path=p", "--max_length=300"} <= set(rows)
    assert sft[1:4] == [str(ROOT / "scripts/sft.py"), "--config", str(config)] and {
        "--model_name_or_path=p", f"--dataset_name={out}/iteration-0/rows", f"--output_dir={out}/iteration-0/sft",
        "--max_length=300"} == set(sft[4:])  # fmt: skip
    assert stages[1].settings["sft"] == {"learning_rate": 1e-5} and "--overwrite_output_dir=true" in train
    assert f"--max_length={2**31 - 1}" in Iterations(loop, "p").sft().command  # not TRL's own limit
    policy = f"{out}/iteration-0/sft"
    assert f"--model_name_or_path={policy}" in sample and f"--model_name_or_path={merge[3]}" in last
    assert first[2] == sample[2] == policy and f"--model_name_or_path={policy}" in train
    assert merge[2:4] == [f"{out}/iteration-1/train", f"{out}/iteration-1/merge/model"] and last[2] == merge[3]
    assert merge[4:] == ["--keep_rounded"]
    assert stages[6].anew == Path(merge[3])
    assert f"--ref_model_name_or_path={policy}" in iterations.trained(2).command


def test_sft_that_was_begun_otherwise_is_refused(workshop):
    """Its checkpoints would go on with the schedule of the first start."""
    config = workshop / "s.yaml"
    config.write_text("learning_rate: 1.0e-5\n")
    loop = read_loop(loop_file(workshop, sft=str(config), sft_data="d.jsonl"))
    Iterations(loop, "p").sft().begun()
    Iterations(loop, "p").sft().begun()
    config.write_text("learning_rate: 2.0e-5\n")
    with refused("sft", workshop / "out/iteration-0/sft"):
        Iterations(loop, "p").sft().begun()


def test_one_loop_at_a_time(workshop):
    code = "from pathlib import Path\nfrom mdpo.rollouts.iterations import alone\n"
    code += f"alone(Path({str(workshop)!r})).__enter__()"
    with alone(workshop):
        second = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert second.returncode and str(workshop) in second.stderr.splitlines()[-1]
    assert not subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode


def test_training_that_left_a_checkpoint_is_resumed(workshop, monkeypatch):
    """Whatever the recipe says of overwriting."""
    stages = Iterations(read_loop(loop_file(workshop)), "p")
    monkeypatch.setattr("mdpo.rollouts.iterations.newest_complete", lambda folder: (folder / "checkpoint-1", []))
    assert "--overwrite_output_dir=false" in stages.trained(1).command


def test_null_is_no_option():
    assert flags({"instruction": None, "isolated": False, "listed": [1, 2], "on": True}) == ["--listed=1,2", "--on"]


def test_sft_resumes_its_last_whole_checkpoint(tmp_path):
    for step, state in ((9, '{"a": 1}'), (10, '{"a": 1}'), (11, '{"a'), (12, None), (13, '{"a": 1}')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
        if step != 13:  # save_only_model: what training would need is not there
            (tmp_path / f"checkpoint-{step}" / "scheduler.pt").touch()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10" and last_checkpoint(tmp_path / "none") is None


def test_a_changed_key_of_a_finished_stage_is_refused(workshop):
    stages = Iterations(read_loop(loop_file(workshop)), "p")
    first = stages.evaluated(0)
    first.folder.mkdir(parents=True)
    (first.folder / DONE).write_text(json.dumps(first.settings))
    assert first.finished()
    other = Iterations(read_loop(loop_file(workshop, evaluate={"max_turns": 3})), "p")
    with refused("evaluate", first.folder):
        other.run(lambda n, stage: True)
    assert not (workshop / "out/iteration-1").exists()


def test_an_edited_recipe_is_refused_where_its_key_counts(workshop):
    """By the key's name, of training and of sampling; what changes no result may change."""
    finished_loop(workshop)
    text = (workshop / "recipe.yaml").read_text()
    for edit, key, stage in (
        ("dtype: float32\nbeta: 0.7", "beta", "iteration-1/train"),
        ("dtype: bfloat16", "dtype", "iteration-0"),
    ):
        (workshop / "recipe.yaml").write_text(text.replace("dtype: float32", edit))
        with refused(key, stage, key):
            iterate.main([str(loop_file(workshop))])
    (workshop / "recipe.yaml").write_text(text.replace("logging_steps: 1", "logging_steps: 2\nsave_steps: 7"))
    iterate.main([str(loop_file(workshop))])


def test_other_processes_than_those_of_finished_training_are_refused(workshop):
    """Half of them would halve the batch; another stage of ZeRO computes the same."""
    file = workshop / "two.yaml"
    said = {"num_processes": 2, "use_cpu": True, "mixed_precision": "no", "deepspeed_config": {"zero_stage": 2}}
    file.write_text(json.dumps(said))
    finished_loop(workshop, accelerate_config=str(file))
    for edit, key in (({"num_processes": 1}, "num_processes"), ({"mixed_precision": "bf16"}, "mixed_precision")):
        file.write_text(json.dumps(said | edit))
        with refused(key, "iteration-1/train"):
            iterate.main([str(workshop / "loop.yaml")])
    file.write_text(json.dumps(said | {"deepspeed_config": {"zero_stage": 3}}))
    iterate.main([str(workshop / "loop.yaml")])


def test_files_that_were_edited_behind_a_stage_are_said(workshop, capsys):
    """Rewards and tasks: what is finished is kept, and nobody takes it for what the files say now."""
    stages = finished_loop(workshop)
    iterate.main([str(workshop / "loop.yaml")])
    assert "was edited" not in capsys.readouterr().out
    for name in ("letters.py", "held_out.jsonl"):
        (workshop / name).write_text((workshop / name).read_text() + "\n")
    iterate.main([str(workshop / "loop.yaml")])
    lines = [line for line in capsys.readouterr().out.splitlines() if "was edited" in line]
    folders = [str(stage.folder) for stage in stages if stage.folder.name in ("sample", "evaluate")]
    assert [line.partition(":")[0] for line in lines] == folders
    both = [line for line in lines if f"{workshop}/held_out.jsonl, {workshop}/letters.py" in line]
    assert [line.partition(":")[0] for line in both] == [f for f in folders if f.endswith("evaluate")]


def finished_loop(folder: Path, **changes) -> list[Stage]:
    """The stages of a loop whose folders were written by hand, each of them finished."""
    write_loop(folder / "out")
    stages = [stage for _, stage in iterate.checked(read_loop(loop_file(folder, **changes))).stages()]
    for stage in stages:
        stage.finish(contents_of(stage.files))
    return stages


def test_it_says_what_is_finished_and_draws_after_each_stage(workshop, capsys, monkeypatch):
    """Once at the start for the stages of earlier runs, then after each of the two that are missing."""
    stages, drawn = finished_loop(workshop), []
    for stage in stages[-2:]:
        (stage.folder / DONE).unlink()
    monkeypatch.setattr(Stage, "run", lambda self: (self.folder / DONE).write_text(json.dumps(self.settings)))
    draw = LoopPage.draw
    monkeypatch.setattr(LoopPage, "draw", lambda self, *args: drawn.append(finished(workshop)) or draw(self, *args))
    iterate.main([str(workshop / "loop.yaml")])
    assert [len(done) for done in drawn] == [7, 8, 9]
    lines = capsys.readouterr().out.splitlines()
    out, done = (
        f"{workshop}/out",
        "iteration 0: evaluate; iteration 1: sample, pair, train, evaluate; iteration 2: sample, pair",
    )
    assert lines[0] == f"{out}: 7 of 9 stages are finished ({done}); next: iteration 2, train"
    assert lines[-1] == f"page  {out}/{LOOP_PAGE}"
    iterate.main([str(workshop / "loop.yaml")])
    first, *_ = capsys.readouterr().out.splitlines()
    assert first == f"{out}: 9 of 9 stages are finished ({done}, train, evaluate)" and len(drawn) == 4


def test_a_page_that_cannot_be_written_ends_no_loop(workshop, capsys):
    finished_loop(workshop)
    (workshop / "out" / LOOP_PAGE).mkdir()
    iterate.main([str(workshop / "loop.yaml")])
    text = capsys.readouterr().out
    assert text.count("warning: loop_report.html could not be written") == 1 and "page  " not in text


def test_a_loop_that_got_worse_says_so_on_its_page(workshop, capsys):
    """32 of 40 tasks are right, then 12."""
    stages = finished_loop(workshop)
    loop_file(workshop, stop_when_worse=True)
    for stage, right in ((stages[0], 32), (stages[4], 12)):
        write_trajectories(stage.folder, [trajectory(f"task-{i}", i < right) for i in range(40)])
        (stage.folder / DONE).write_text(json.dumps(stage.settings))
    iterate.main([str(workshop / "loop.yaml")])
    text = (workshop / "out" / LOOP_PAGE).read_text(encoding="utf-8")
    assert "iteration 1 got worse by more than the interval: stopped." in capsys.readouterr().out
    assert "Warning: Iteration 1 got worse by more than the interval: stopped." in text and "stopped after" in text


def test_a_loop_begins():
    stage = Stage(Path("out/iteration-0/evaluate"), [], {})
    assert (
        iterate.progress("out", [(0, stage, False)]) == "out: 0 of 1 stages are finished; next: iteration 0, evaluate"
    )


def test_the_table_fits_a_terminal_of_80_columns():
    """Each row is one line, with pass^k where tasks have several samples."""
    figures = {"accuracy": 0.625, "all_correct": 0.25, "tasks": 8, "turns": 12.5, "reward": -0.6251}
    for samples, column in ((1, ""), (20, "pass^20")):
        found = [{**figures, "iteration": n, "samples": samples, "calls": {"ok": 9, "error": 1234}} for n in (0, 10)]
        console = Console(width=80, file=io.StringIO())
        console.print(iterate.table(found))
        lines = console.file.getvalue().splitlines()
        assert len(lines) == 1 + 3 + 2 + 1 and all(len(line) <= 80 for line in lines) and column in lines[2]
        assert lines[4].split()[1:6] == ["0", "│", "0.625", "(0.31", "to"] and "…" not in "".join(lines)


def test_worse_is_below_the_interval():
    """Of 80 right of 100 the interval begins at 0.711 (Wilson, by hand: (0.8 + 0.0192 - 0.0792) / 1.0384 = 0.7111)."""
    common = {"tasks": 100, "conversations": 100, "ended": {"environment error": 0}}
    before = {**common, "accuracy": 0.8, "reward_interval": (0.711, 0.87)}
    assert not got_worse(before, {**common, "accuracy": 0.72}) and got_worse(before, {**common, "accuracy": 0.71})
    # 10 of 100 have ended with the environment: 0.65 is 65 of 90, 0.722.
    broken = {**common, "ended": {"environment error": 10}}
    assert not got_worse(before, {**broken, "accuracy": 0.65}) and got_worse(before, {**broken, "accuracy": 0.63})
    assert got_worse(before, {**common, "accuracy": 0.0, "ended": {"environment error": 100}})


def test_where_no_answer_is_right_the_reward_decides():
    """A judge that gives parts of 1."""
    common = {"tasks": 100, "conversations": 100, "ended": {"environment error": 0}, "accuracy": 0.0}
    before = {**common, "reward": 0.5, "reward_interval": (0.45, 0.55)}
    for reward, worse in ((0.46, False), (0.44, True), (None, True)):
        assert got_worse(before, {**common, "reward": reward, "reward_interval": None}) is worse
    assert not got_worse({**before, "reward_interval": None}, {**common, "reward": 0.1, "reward_interval": None})


OF_SAMPLING = {"temperature": 1.0}
BAD = {
    "unknown key": ({"iteration": 3}, "iteration", "did you mean iterations"),
    "type": ({"iterations": "three"}, "iterations", "'three'"),
    "true is no number": ({"iterations": True}, "iterations", "True"),
    "none": ({"iterations": 0}, "iterations", "0"),
    "reference": ({"reference": "old"}, "reference", "'old'"),
    "option of sampling": ({"sample": {"temperature": 1.0, "temperatur": 1}}, "sample", "--temperatur=1"),
    "a seed of servers": (
        {"sample": {"seed": 1, "temperature": 1.0, "backend": "server", "base_url": "http://a"}},
        "",
        "seed",
    ),
    "greedy samples": ({"sample": {}}, "sample", "temperature"),
    "option of pairing": ({"pair": {"pairs": "some"}}, "", "some"),
    "a recipe's key": ({"train": {"betta": 1}}, "betta", "beta"),
    "SFT of nothing": ({"sft": "{folder}/recipe.yaml"}, "sft", "sft_data"),
    "no file of SFT": ({"sft": "none.yaml", "sft_data": "{folder}/tasks.jsonl"}, "sft", "none.yaml"),
    "a model of SFT": ({"sft": "{folder}/recipe.yaml", "sft_data": "{folder}/tasks.jsonl"}, "sft", "recipe.yaml:2"),
    "a misspelt key of SFT": (
        {"sft": "{folder}/sft.yaml", "sft_data": "{folder}/tasks.jsonl"},
        "sft",
        "num_train_epochs",
    ),
    "an adapter of SFT": ({"sft": "{folder}/lora.yaml", "sft_data": "{folder}/tasks.jsonl"}, "sft", "use_peft"),
    "a template of training alone": ({"train": {"chat_template": "t.jinja"}}, "train", "chat_template"),
    "an own policy of training": ({"train": {"output_dir": "x"}}, "train", "output_dir"),
    "an own file of pairs": ({"pair": {"out": "x"}}, "pair", "out"),
    "a reference in the recipe": ({"recipe": "{folder}/other.yaml"}, "reference", "ref_model_name_or_path"),
    "no accelerate file": ({"accelerate_config": "none.yaml"}, "accelerate_config", "none.yaml"),
    "several machines": (
        {"accelerate_config": f"{ROOT}/training_configs/zero3_two_nodes.yaml"},
        "accelerate_config",
        "2;",
    ),
    "SFT in rows that ranks share": (
        {
            "accelerate_config": f"{ROOT}/training_configs/zero3_sequence_parallel.yaml",
            "sft": "{folder}/sft.yaml",
            "sft_data": "{folder}/tasks.jsonl",
        },
        "accelerate_config",
        "parallelism_config",
    ),
    "a server that is there": (
        {"sample": {**OF_SAMPLING, "backend": "server", "base_url": "http://127.0.0.1:1/v1"}},
        "sample",
        "base_url",
    ),
    "no such environment": ({"sample": {**OF_SAMPLING, "environment": "none.py:Env"}}, "", "none.py"),
    "weights of other rewards": ({"evaluate": {"reward_weights": "1,2,3"}}, "", "reward_weights"),
    "no tasks": ({"tasks": "none.jsonl"}, "tasks", "none.jsonl"),
    "no held-out tasks": ({"held_out_tasks": "none.jsonl"}, "held_out_tasks", "none.jsonl"),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_named_before_a_stage_runs(name, workshop):
    changes, key, detail = BAD[name]
    text = (workshop / "recipe.yaml").read_text()
    (workshop / "other.yaml").write_text(f"{text}ref_model_name_or_path: {workshop}/model\n")
    (workshop / "sft.yaml").write_text("num_train_epoch: 1\n")
    (workshop / "lora.yaml").write_text("use_peft: true\n")
    changes = {k: v.format(folder=workshop) if isinstance(v, str) else v for k, v in changes.items()}
    path = loop_file(workshop, **changes)
    with pytest.raises(iterate.UserError) as caught:
        iterate.main([str(path)])
    assert detail in str(caught.value) and (not key or caught.value.key == key), (caught.value.key, caught.value)
    assert not (workshop / "out").exists()


SMALL = ROOT / "recipes/smollm2-135m/loop.yaml"  # whose questions are there
LOOPS = sorted(set((ROOT / "recipes").glob("*/loop.yaml")) - {SMALL})


@pytest.mark.parametrize("path", LOOPS, ids=lambda path: path.parent.name)
def test_the_shipped_loops(path, monkeypatch):
    """Recipe and options are right; the questions are the user's to bring. Each trains its own family's full recipe, or
    on one machine what fits there."""
    monkeypatch.chdir(ROOT)
    loop, family = read_loop(path), path.parent.name
    served = "serve" in loop.sample  # by a vLLM that is not here
    with refused(*(("serve", "/opt/vllm/bin/vllm") if served else ("tasks", "data/questions.jsonl"))):
        iterate.checked(loop)
    one = Sharding.read(loop.accelerate_config).machines == 1
    kind = "lora" if served else "full"
    assert served == (family in ("llama-3.3-70b", "qwen3-30b-a3b"))
    assert one and loop.recipe == f"recipes/{family}/dpo/config_{kind}.yaml"
    assert loop.output_dir == f"outputs/{family}-loop" and loop.sample["samples"] == 20
    assert loop.evaluate == {key: x for key, x in loop.sample.items() if key not in ("temperature", "samples")}
    command = f"python scripts/iterate.py recipes/{family}/loop.yaml"
    assert command in path.read_text(encoding="utf-8").partition("\n")[0]
    assert f"    {command}\n" in (path.parent / "README.md").read_text(encoding="utf-8")


def test_each_family_has_a_loop(monkeypatch):
    assert {path.parent for path in [*LOOPS, SMALL]} == set((ROOT / "recipes").iterdir())
    monkeypatch.chdir(ROOT)
    stages = [stage for _, stage in iterate.checked(read_loop(SMALL)).stages()]
    assert [stage.folder.name for stage in stages[:4]] == ["rows", "sft", "evaluate", "sample"]


def test_the_shop_s_loop(tmp_path, monkeypatch):
    """Its tasks are made anew: no task is there twice, and SFT learns each trajectory whole."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["make_shop.py", str(tmp_path)])
    runpy.run_path("recipes/smollm2-135m/data/make_shop.py", run_name="__main__")
    loop = read_loop(ROOT / "recipes/smollm2-135m/shop.yaml")
    named = {"policy": "model", "sft_data": "sft.jsonl", "tasks": "tasks.jsonl", "held_out_tasks": "heldout.jsonl"}
    assert {key: getattr(loop, key) for key in named} == {key: f"outputs/shop/{name}" for key, name in named.items()}
    loop = dataclasses.replace(loop, **{key: str(tmp_path / name) for key, name in named.items()})
    stages = [stage for _, stage in iterate.checked(loop).stages()]
    assert [stage.folder.name for stage in stages[:4]] == ["rows", "sft", "evaluate", "sample"]
    rows = [json.loads(line) for name in ("tasks", "heldout") for line in (tmp_path / f"{name}.jsonl").open()]
    assert len({json.dumps([row["prompt"], row["goal"], row["catalog"]]) for row in rows}) == len(rows) == 420
    template = ChatTemplate(AutoTokenizer.from_pretrained(loop.policy))
    rows, report = sft_rows([tmp_path / "sft.jsonl"], template, loop.train["max_length"])
    assert len(list(rows)) == report.taken == report.sequences == 160 and not report.left_out


def test_the_loop_of_the_page():
    text = (ROOT / "recipes/gemma-2-9b-it/loop.yaml").read_text(encoding="utf-8")
    assert text.partition("\n")[2] in (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")


def test_a_file_that_is_no_loop(tmp_path):
    for text, key in (("- a", "loop"), ("a: [", "loop"), ("recipe: a", "output_dir")):
        (tmp_path / "l.yaml").write_text(text)
        with refused(key, tmp_path / "l.yaml"):
            read_loop(tmp_path / "l.yaml")
    with refused("loop", "none.yaml"):
        read_loop(tmp_path / "none.yaml")
    assert Loop("r", "o", "t", "h").iterations == 3
