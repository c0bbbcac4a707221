"""What is known of a loop so far, as plain numbers and texts: the page of the loop is drawn from them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mdpo.errors import UserError
from mdpo.rollouts.iterations import DONE, PAIRS, TRAJECTORIES
from mdpo.rollouts.pairing import report_of
from mdpo.rollouts.records import Trajectory
from mdpo.rollouts.stage_figures import Place, StageFigures, stage_figures, trajectory_at
from mdpo.rollouts.tables import wilson
from mdpo.types import Message

SHOWN_TASKS = 3
HEAD, TAIL = 2000, 1000  # characters of a long message that are shown: at its beginning and at its end
FIRST, LAST = 6, 14  # messages of a long trajectory
SHARES = {"right": "accuracy", "any": "any_correct", "all": "all_correct"}


def loop_figures(stages: Iterable[tuple[int, Path]]) -> dict[str, Any]:
    """Of (iteration, folder) in order:

    stages       [(iteration, name, whether it is finished)]
    evaluations  iteration -> figures of its held-out trajectories
    samples      iteration -> figures of the trajectories that its pairs are made of
    pairs        iteration -> what scripts/pair_rollouts.py reports
    training     iteration -> the folder of its training
    tasks        held-out tasks, with a trajectory of each iteration
    broken       one line for each finished stage whose files cannot be read

    Only finished stages are read."""
    facts = {"stages": [], "evaluations": {}, "samples": {}, "pairs": {}, "training": {}, "tasks": [], "broken": []}
    held_out = dict[int, tuple[Path, StageFigures]]()
    for n, folder in stages:
        finished, name = (folder / DONE).is_file(), folder.name
        facts["stages"].append((n, name, finished))
        if not finished:
            continue
        try:
            if name in ("evaluate", "sample"):
                found = stage_figures(folder / TRAJECTORIES)
                facts["evaluations" if name == "evaluate" else "samples"][n] = with_intervals(found.figures)
                if name == "evaluate":
                    held_out[n] = (folder / TRAJECTORIES, found)
            elif name == "pair":
                facts["pairs"][n] = _report(report_of(folder / PAIRS))
            elif name == "train":
                facts["training"][n] = folder
        except UserError as error:
            facts["broken"].append(str(error))
    try:
        facts["tasks"] = side_by_side(held_out)
    except UserError as error:
        facts["broken"].append(str(error))
    return facts


def _report(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        counts = [report[name] for name in ("pairs_by", "trajectories", "tasks", "paired", "pairs", "longer")]
        if not all(isinstance(n, int) for n in counts[1:]):
            raise ValueError("a count is no number")
        return {**report, "left_out": dict(report["left_out"]), "unpaired": dict(report["unpaired"])}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).", "pairs") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is no report of pairs ({error}).", "pairs") from error


def with_intervals(figures: dict[str, Any]) -> dict[str, Any]:
    """`shares` beside them: (share, low, high) of right answers, of tasks with a right one and of those with no wrong
    one, over independent tasks."""
    shares = {name: (figures[key], *wilson(figures[key], figures["tasks"])) for name, key in SHARES.items()}
    return {**figures, "shares": shares}


def telling(outcomes: dict[str, list[bool]], most: int = SHOWN_TASKS) -> list[str]:
    """Keys of the tasks to look at, of whether each was right in each iteration: first one that became right, then one
    that became wrong, then others of these, others that changed in between, and the rest."""
    kinds: list[list[str]] = [[], [], [], []]
    for key, right in sorted(outcomes.items()):
        kind = 2 if len(set(right)) > 1 else 3
        if right[0] != right[-1]:
            kind = 0 if right[-1] else 1
        kinds[kind].append(key)
    gained, lost, *others = kinds
    first = gained[:1] + lost[:1]
    return [*first, *gained[1:], *lost[1:], *sum(others, [])][:most]


def side_by_side(held_out: dict[int, tuple[Path, StageFigures]]) -> list[dict[str, Any]]:
    """[{"key", "prompt", "columns": one for each iteration}] of the tasks that each iteration has a trajectory of."""
    places: list[dict[str, Place]] = [found.places for _, found in held_out.values()]
    keys = set(places[0]).intersection(*places[1:]) if places else set()
    shown = []
    for key in telling({key: [place[key].correct for place in places] for key in keys}):
        read = {n: trajectory_at(path, found.places[key].offset) for n, (path, found) in held_out.items()}
        prompts = [one.messages[: one.prompt_messages] for one in read.values()]
        same = all(prompt == prompts[0] for prompt in prompts)
        columns = [_column(n, one, one.prompt_messages if same else 0) for n, one in read.items()]
        shown.append({"key": key, "prompt": readable(prompts[0]) if same else [], "columns": columns})
    return shown


def _column(n: int, one: Trajectory, begin: int) -> dict[str, Any]:
    failed = sum(ended != "ok" for _, ended in one.calls)
    facts = {"iteration": n, "right": one.correct, "reward": one.reward, "ended": one.ended, "error": one.error}
    counts = {"turns": one.turns, "calls": len(one.calls), "failed": failed}
    return {**facts, **counts, "messages": readable(one.messages[begin:])}


def readable(messages: list[Message]) -> list[dict[str, str]]:
    """[{"role", "text"}]; of many messages the first and the last, of a long one its beginning and its end."""
    left_out = len(messages) - FIRST - LAST
    if left_out > 1:
        gap = {"role": "", "text": f"… {left_out} messages …"}
        return [*map(_message, messages[:FIRST]), gap, *map(_message, messages[-LAST:])]
    return [_message(message) for message in messages]


def _message(message: Message | Any) -> dict[str, str]:
    message = message if isinstance(message, dict) else {"content": message}
    parts = [_text(message.get(name)) for name in ("reasoning_content", "thinking", "content")]
    parts += [_call(call) for call in message.get("tool_calls") or []]
    text = "\n".join(part for part in parts if part)
    left_out = len(text) - HEAD - TAIL
    if left_out > 0:
        text = f"{text[:HEAD]}\n… {left_out:,} characters …\n{text[-TAIL:]}"
    return {"role": str(message.get("role", "")), "text": text}


def _call(call: Any) -> str:
    function = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(function, dict):
        return f"→ {_text(function)}"
    arguments = function.get("arguments", {})
    given = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return f"→ {function.get('name')}({given})"


def _text(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        return "\n".join(part["text"] for part in content)
    return json.dumps(content, ensure_ascii=False)
