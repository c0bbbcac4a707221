"""scripts/evaluate.py: held-out figures are those that training ended with. scripts/sample.py: its command line."""

import json
import re
import shlex
from pathlib import Path

import evaluate
import pytest
import sample
from errors import refused
from repository import ROOT
from tiny import CHATML, agent_rows, tiny_llama, tokenizer_for

import run_dpo
from mdpo.rollouts.answers import gold_answer
from mdpo.rollouts.environment import Environments
from mdpo.rollouts.tasks import read_tasks
from mdpo.runs.entrypoint import run

PAGE = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
RUNS = {
    "full": [],
    "precomputed": ["--precompute_ref_log_probs=true", "--beta=0.3", "--nll_coefficient=0.2"],
    "other reference": ["--ref_model_name_or_path={folder}/reference", "--shared_prefix=false"],
    "adapter": ["--use_peft=true", "--lora_r=4", "--lora_target_modules=all-linear", "--learning_rate=1e-2"],
    "adapter, precomputed": [
        "--use_peft=true",
        "--lora_r=4",
        "--learning_rate=1e-2",
        "--precompute_ref_log_probs=true",
    ],
}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A tiny model, pairs of one to three turns, some held out, and a recipe."""
    folder = tmp_path_factory.mktemp("evaluate")
    tokenizer = tokenizer_for(CHATML, "byte", eos="<|im_end|>")
    tiny_llama(tokenizer, seed=0).save_pretrained(folder / "model")
    tiny_llama(tokenizer, seed=1).save_pretrained(folder / "reference")
    tokenizer.save_pretrained(folder / "model")
    rows = agent_rows(24)
    for i, row in enumerate(rows):
        if i % 3 == 0:  # chosen has one turn
            row["chosen"] = [*row["chosen"][:1], row["chosen"][-1]]
        if i % 3 == 1:  # chosen has three
            row["chosen"] += [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "That is right."}]
    for name, part in (("train", rows[:12]), ("heldout", rows[12:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    questions = [{"question": f"What is {i} * 2?", "answer": f"so\n#### {2 * i}"} for i in range(3)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    (folder / "recipe.yaml").write_text(
        f"""
model_name_or_path: {folder}/model
dtype: float32
dataset_mixer: {{{folder}/train.jsonl: 1.0}}
eval_dataset_mixer: {{{folder}/heldout.jsonl: 1.0}}
max_length: 300
learning_rate: 1.0e-3
num_train_epochs: 1
per_device_train_batch_size: 4
per_device_eval_batch_size: 5
logging_steps: 1
save_strategy: "no"
bf16: false
seed: 7
dataset_num_proc: 1
disable_tqdm: true
"""
    )
    return folder


def trained(workshop, name: str) -> tuple[str, list[str]]:
    """(output folder, flags) of a run, which is made once."""
    out = workshop / name.replace(", ", "-").replace(" ", "-")
    flags = [flag.format(folder=workshop) for flag in RUNS[name]]
    if not out.exists():
        run_dpo.main([str(workshop / "recipe.yaml"), f"--output_dir={out}", "--report_to=none", *flags])
    return str(out), flags


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "adapter" else pytest.mark.slow) for n in RUNS])
def test_held_out_figures_are_those_of_the_run(name, workshop, monkeypatch, capsys):
    out, flags = trained(workshop, name)
    after = json.loads(Path(out, "run_report.json").read_text())["after"]
    before = sorted(Path(out).iterdir())
    capsys.readouterr()
    shown = []
    monkeypatch.setattr(evaluate, "held_out_table", lambda figures: shown.append(figures) or "")
    evaluate.main([out, "--recipe", str(workshop / "recipe.yaml"), *flags])
    [figures] = shown
    printed = capsys.readouterr().out
    for part in ("train", "eval"):  # what the run had scored with the reference is found again
        assert (f"reference log-probs of {part}: 24 of 24 sequences from" in printed) == ("precomputed" in name)
    assert list(figures) == ["1", "2", "3", "all"] and [f["pairs"] for f in figures.values()] == [4, 4, 4, 12]
    wanted = {"pairs": "pairs", "accuracy": "rewards/accuracies", "margin": "rewards/margins", "loss": "loss"}
    for ours, theirs in wanted.items():
        assert figures["all"][ours] == pytest.approx(after[f"eval_{theirs}"], abs=1e-6), ours
        mean = sum(figures[n][ours] for n in "123") / 3  # groups of one size
        assert ours == "pairs" or mean == pytest.approx(figures["all"][ours], abs=1e-9)
    assert abs(after["eval_rewards/margins"]) > 1e-3  # a policy that has left its reference
    assert sorted(Path(out).iterdir()) == before


def test_rollouts_from_the_command_line(workshop, capsys, tmp_path):
    out, _ = trained(workshop, "adapter")
    command = [out, "--recipe", str(workshop / "recipe.yaml"), "--tasks", str(workshop / "questions.jsonl")]
    options = ["--max_new_tokens=12", "--instruction=Use Python."]
    sample.main([*command, *options, f"--save={tmp_path}/t.jsonl"])
    printed = capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert sorted((row["key"], row["task"]["answer"]) for row in rows) == [
        (f"{workshop}/questions.jsonl:{i + 1}", f"so\n#### {2 * i}") for i in range(3)
    ]
    rows.sort(key=lambda row: row["key"])
    assert [row["messages"][0]["content"] for row in rows] == [f"Use Python.\n\nWhat is {i} * 2?" for i in range(3)]
    assert "rollouts: 3 tasks, 3 conversations" in printed
    assert re.search(r"right answers +│ +0\.0000 \(0\.000 to 0\.56", printed)
    # The adapter is in the model: without it other words come out.
    sample.main([f"{workshop}/model", *command[1:], *options, f"--save={tmp_path}/base.jsonl"])
    base = [json.loads(line) for line in (tmp_path / "base.jsonl").read_text().splitlines()]
    base.sort(key=lambda row: row["key"])
    assert [row["messages"][-1] for row in base] != [row["messages"][-1] for row in rows]

    sampling = ["--samples=2", "--temperature=1", "--seed=3", "--max_new_tokens=4", f"--save={tmp_path}/s.jsonl"]
    sample.main([*command, *sampling])
    rows = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert sorted(row["sample"] for row in rows) == [0, 0, 0, 1, 1, 1]
    assert "tasks with a right one" in capsys.readouterr().out
    # The same command continues with what a kill has left out, and another one is refused.
    lines = (tmp_path / "s.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "s.jsonl").write_text("".join(lines[:4]) + lines[4][:50])
    sample.main([*command, *sampling])
    printed = capsys.readouterr().out
    assert "cut by a kill" in printed and "4 of 6 trajectories are there already" in printed
    again = (tmp_path / "s.jsonl").read_text().splitlines(keepends=True)
    assert again[:4] == lines[:4] and len(again) == 6
    with refused("save", "max_new_tokens 4, now 5"):
        sample.main([*command, *sampling, "--max_new_tokens=5"])


MISTAKES = {
    "no folder": (evaluate, ["{folder}/nothing"], "CHECKPOINT: there is no folder"),
    "no weights": (evaluate, ["{folder}"], "CHECKPOINT: .* contains no "),
    "no recipe": (evaluate, ["{folder}/model", "--recipe"], "expected one argument"),
    "key": (evaluate, ["{folder}/model", "--betta=1"], "--betta is not a key; did you mean --beta?"),
    "no held-out pairs": (evaluate, ["{folder}/model", "--eval_dataset_mixer=null"], "has no held-out pairs"),
    "no folder to sample": (sample, ["{folder}/nothing"], "CHECKPOINT: there is no folder"),
    "key of sampling": (sample, ["--betta=1"], "--betta is not a key; did you mean --beta?"),
    "samples": (sample, ["--samples=2"], "--samples: has no effect at temperature 0"),
    "seed": (sample, ["--seed=1"], "--seed: has no effect at temperature 0"),
    "range": (sample, ["--max_turns=0"], "--max_turns: 0 is out of range"),
    "not a number": (sample, ["--temperature=nan"], "--temperature: nan is out of range"),
    "role": (sample, ["--tool_role=moon"], "argument --tool_role: invalid choice: 'moon'"),
    "no tasks": (sample, ["--tasks={folder}/none.jsonl"], "rollouts: there is no file"),
    "save is another file": (sample, ["--save={folder}/train.jsonl"], "is no trajectory"),
    "save has no folder": (sample, ["--save={folder}/none/t"], "has no folder"),
    "calls without an environment": (sample, ["--tool_calls=text"], "without --environment"),
    "code with an environment": (sample, ["--environment=mine", "--code_seconds=1"], "with --environment"),
    "isolation": (sample, ["--environment=mine", "--allow_unisolated_code"], "has no effect with --environment"),
    "environment": (sample, ["--environment=mine"], "path/to/file.py:NAME"),
    "weights": (sample, ["--reward_weights=1,2"], "2 numbers for 1 reward functions"),
    "shard": (sample, ["--shard=2/2"], "argument --shard"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_in_one_line(name, workshop, capsys):
    script, argv, message = MISTAKES[name]
    argv = [word.format(folder=workshop) for word in argv]
    recipe = [] if "--recipe" in argv else ["--recipe", str(workshop / "recipe.yaml")]
    if script is sample:
        argv = [f"--tasks={workshop}/questions.jsonl", *argv]
        argv = argv if argv[1].startswith("{folder}") or "/nothing" in argv[1] else [f"{workshop}/model", *argv]
    assert run(script.main, [*argv, *recipe]) == 1
    assert re.search(message, capsys.readouterr().err)


MINE = '''
def double(n: int) -> int:
    """
    Doubles a number.

    Args:
        n: The number.
    """
    return 2 * n


def long(completions, answer, **columns):
    return [float(len(completions[0][-1]["content"]) > 0 and answer[0].startswith("so"))]
'''


def test_plain_functions_and_a_reward(workshop, capsys, tmp_path):
    """Tools beside which there is no environment; every other task is of one shard."""
    (tmp_path / "mine.py").write_text(MINE)
    tools = f"{tmp_path}/mine.py:double"
    command = [f"{workshop}/model", f"--recipe={workshop}/recipe.yaml", f"--tasks={workshop}/questions.jsonl"]
    command += [f"--tools={tools}", f"--save={tmp_path}/t.jsonl"]
    with refused("rewards"):
        sample.main(command)
    options = [f"--rewards={tmp_path}/mine.py:long", "--reward_weights=0.5", "--max_new_tokens=6", "--shard=0/2"]
    sample.main([*command, *options])
    rows = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert sorted(row["key"][-1] for row in rows) == ["1", "3"]
    for row in rows:
        assert row["rewards"] == {"long": 1.0} and row["reward"] == 0.5 and row["messages"][0]["role"] == "system"
        assert '"name": "double"' in row["messages"][0]["content"] and row["settings"]["tools"] == [tools]
    before = (tmp_path / "t.jsonl").read_bytes()
    sample.main([*command, *options])
    assert (tmp_path / "t.jsonl").read_bytes() == before


def test_a_reference_of_its_own_revision(workshop, monkeypatch):
    """`model_revision` and the like say where the base's weights are: the checkpoint's are elsewhere."""
    loaded = []
    real = evaluate.scoring_arguments.__globals__["load_model"]
    monkeypatch.setitem(
        evaluate.scoring_arguments.__globals__,
        "load_model",
        lambda name, **k: loaded.append((name, k)) or real(name, **k),
    )
    recipe = evaluate.load_recipe([str(workshop / "recipe.yaml"), "--report_to=none", "--model_revision=v1"])
    out = f"{workshop}/reference"  # as good as any
    found = evaluate.scoring_arguments(out, recipe)
    assert found["model"] == out and found["ref_model"] is not None
    assert [(name, k["revision"]) for name, k in loaded] == [(f"{workshop}/model", "v1")]
    assert "revision" not in recipe.training.model_init_kwargs and recipe.training.ref_model_name_or_path is None


def test_a_moved_reference_is_said(workshop, capsys):
    flags = ["--report_to=none", "--sync_ref_model=true", "--ref_model_sync_steps=8"]
    recipe = evaluate.load_recipe([str(workshop / "recipe.yaml"), *flags])
    evaluate.scoring_arguments(f"{workshop}/reference", recipe)
    assert "sync_ref_model: the run's reference moved" in capsys.readouterr().out
    assert not recipe.training.sync_ref_model


def test_an_adapter_without_all_of_its_weights(workshop, tmp_path):
    from safetensors.torch import load_file, save_file

    out, flags = trained(workshop, "adapter")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / file).write_bytes(Path(out, file).read_bytes())
    weights = load_file(tmp_path / "adapter_model.safetensors")
    save_file(dict(list(weights.items())[1:]), tmp_path / "adapter_model.safetensors")
    with refused("weights", tmp_path, "lacks 1 ", min(weights)):
        evaluate.main([str(tmp_path), "--recipe", str(workshop / "recipe.yaml"), *flags])


def test_the_page_shows_the_commands(tmp_path, monkeypatch):
    monkeypatch.setattr("mdpo.rollouts.server_commands.shutil.which", lambda name: name)  # vllm need not be here
    for script in (evaluate, sample):
        commands = re.findall(rf"^ +python scripts/{script.__name__}\.py (.*)$", PAGE, re.MULTILINE)
        assert commands
        for command in commands:
            args, *_, rest = script.parse(shlex.split(command))
            assert Path(args.recipe).is_file() and not rest
    [shown] = re.findall(r'^\{"question".*\}$', PAGE, re.MULTILINE)
    (tmp_path / "q.jsonl").write_text(shown)
    assert gold_answer(read_tasks(f"{tmp_path}/q.jsonl")[0].row["answer"]) == "121"
    namespace: dict = {}
    exec(re.search(r"```python\n(class Counter.*?)```", PAGE, re.DOTALL)[1], namespace)
    assert list(Environments(namespace["Counter"]).schemas) == ["add"]
