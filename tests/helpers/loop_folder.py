"""Folders of loops as scripts/iterate.py leaves them, written by hand: trajectories, reports of pairs, trainings."""

import json
from dataclasses import asdict
from pathlib import Path

from mdpo.rollouts.iterations import DONE, PAIRS, TRAJECTORIES
from mdpo.rollouts.pairing import report_of
from mdpo.rollouts.records import Trajectory

STAGES = [(0, "evaluate")] + [(n, stage) for n in (1, 2) for stage in ("sample", "pair", "train", "evaluate")]
SETTINGS = {"recipe": "recipe.yaml", "iterations": 2, "reference": "moved"}


def stages(folder: Path) -> list[tuple[int, Path]]:
    return [(n, folder / f"iteration-{n}" / name) for n, name in STAGES]


def finish(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DONE).write_text("{}")
    return folder


def trajectory(key: str, right: bool, sample: int = 0, tokens: tuple[int, ...] = (3, 2), **changes) -> Trajectory:
    """Of a turn for each number of `tokens`: calls of `python` between them, an answer at the end."""
    messages = [{"role": "user", "content": f"What is {key}?"}]
    ids, mask = [1, 2, 3], [0, 0, 0]
    for turn, count in enumerate(tokens):
        last = turn == len(tokens) - 1
        said = f"The answer is {right}." if last else f"```python\nprint({turn})\n```"
        messages.append({"role": "assistant", "content": said})
        messages += [] if last else [{"role": "user", "content": f"```output\n{turn}\n```"}]
        ids, mask = [*ids, *range(count), 9], [*mask, *[1] * count, 0]
    calls = [("python", "ok")] * (len(tokens) - 1)
    recorded = [{"input_ids": ids, "assistant_masks": mask}]
    facts = {"reward": float(right), "ended": "done", "turns": len(tokens), "calls": calls, "prompt_messages": 1}
    return Trajectory(
        key, sample, {"question": key}, **{"messages": messages, "sequences": recorded, **facts, **changes}
    )


def write_trajectories(folder: Path, trajectories: list[Trajectory]) -> Path:
    finish(folder)
    lines = [json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in trajectories]
    (folder / TRAJECTORIES).write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
    return folder / TRAJECTORIES


def write_pairs(folder: Path, **changes) -> None:
    finish(folder)
    report = {
        **{"pairs_by": "random", "trajectories": 80, "tasks": 8, "paired": 5, "pairs": 5, "longer": 2},
        **{"left_out": {"not ended by the policy": 3}, "unpaired": {"no two differ in reward": 3}, **changes},
    }
    report_of(folder / PAIRS).write_text(json.dumps(report))


def write_training(folder: Path, history: list[dict], **changes) -> None:
    """`history` is what Trainer logged; beta is 0.2."""
    finish(folder)
    report = {
        **{"recipe": {"beta": 0.2}, "steps": 40, "train_seconds": 90.0, "first_loss": 0.6931},
        **{
            "data": {"sets": {"pairs.jsonl (train)": {"kept": 8}}, "training": {"pairs": 5}},
            "chosen_logps": {"line": "", "fell": False},
            "warnings": [],
        },
    }
    (folder / "run_report.json").write_text(json.dumps({**report, **changes}))
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    (folder / "run_report.html").write_text("<title>a run</title>")


def logs(step: int, reward: float) -> dict:
    """A training log: rewards/chosen is `reward`, that of rejected twice as far down."""
    rewards = {"rewards/chosen": reward, "rewards/rejected": -2 * reward, "rewards/margins": 3 * reward}
    figures = {"loss": 0.5, "rewards/accuracies": 0.75, "logps/chosen": -50.0, "logps/rejected": -60.0}
    return {"step": step, **figures, **rewards}


def write_loop(folder: Path, tasks: int = 4, samples: int = 2) -> Path:
    """Two finished iterations. Task 0 becomes right in iteration 1 and stays so, task 1 becomes wrong in iteration 2,
    task 2 is always right, all others never."""
    right = {0: (False, True, True), 1: (True, True, False), 2: (True, True, True)}
    for n, path in stages(folder):
        if path.name == "pair":
            write_pairs(path, pairs=5 + n)
        elif path.name == "train":
            write_training(path, [logs(step, 0.01 * step * n) for step in range(1, 21)])
        else:
            at = n if path.name == "evaluate" else n - 1
            rows = [
                trajectory(f"task-{i}", right.get(i, (False,) * 3)[at], k) for i in range(tasks) for k in range(samples)
            ]
            write_trajectories(path, rows)
    return folder
