"""Questions → trajectories: the policy writes a turn, its Python code is run, the output comes back as the next turn,
until an answer in \\boxed{} or another end. The form is M-DPO's (arXiv 2409.02392) and ToRA's."""

import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from mdpo.data.files import json_rows
from mdpo.data.messages import conversation, normalize_messages
from mdpo.errors import DropPair, UserError
from mdpo.rollouts.answers import gold_answer, is_right, last_boxed
from mdpo.rollouts.sandbox import RunResult
from mdpo.types import Message

CODE = re.compile(r"```python[ \t]*\r?\n(.*?)(?:```|\Z)", re.DOTALL)
OUTPUT_CHARACTERS = 2000  # of an output that are shown to the policy: the first and the last half
ENDS = ("answered", "no answer", "cut", "too long", "max turns")


@dataclass(frozen=True)
class Question:
    """The messages before the first turn, and the right answer as text."""

    key: str
    messages: list[Message]
    gold: str


@dataclass(frozen=True)
class Reply:
    """One turn of the policy. `ended`: "turn" where it ended its turn; "cut" where the token limit cut it in the
    middle; "too long" where the conversation left no room for a turn (the text is then empty)."""

    text: str
    ended: str = "turn"


@dataclass
class Trajectory:
    """One conversation. `ended` is one of ENDS; `code` lists how each run of code ended (see RunResult)."""

    key: str
    sample: int
    messages: list[Message]
    gold: str
    answer: str | None = None
    correct: bool = False
    ended: str = ""
    turns: int = 0
    code: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class RolloutConfig:
    """`samples` conversations for each question, `batch_size` at a time, of at most `max_turns` turns of the policy."""

    max_turns: int = 6
    batch_size: int = 8
    samples: int = 1
    tool_role: str = "user"


Generate = Callable[[list[list[Message]]], list[Reply]]
RunCode = Callable[[str], RunResult]


def read_questions(path: str, instruction: str = "") -> list[Question]:
    """The rows of a JSON file: `question` (a text) or `prompt` (a text or messages), and `answer`. `instruction` goes
    in front of texts, with an empty line between. Raises UserError with the row's place."""
    if not Path(path).is_file():
        raise UserError(f"rollouts: there is no file {path}.")
    questions, keys = [], set()
    for place, row in json_rows(path):
        where = f"{path}:{place}"
        asked = [name for name in ("question", "prompt") if row.get(name)]
        if len(asked) != 1 or "answer" not in row:
            raise UserError(
                f"{where}: needs `answer` and either `question` or `prompt`; it has {', '.join(row)}.", "question"
            )
        try:
            key = str(row.get("key") or row.get("id") or where)
            questions.append(Question(key, _prompt(row[asked[0]], instruction), gold_answer(row["answer"])))
        except (DropPair, UserError) as error:
            raise UserError(f"{where}: {error}", error.key) from error
        if key in keys:
            raise UserError(f"{where}: the key {key!r} comes twice.", "key")
        keys.add(key)
    if not questions:
        raise UserError(f"rollouts: no rows in {path}.")
    return questions


def _prompt(asked: Any, instruction: str) -> list[Message]:
    asked = conversation(asked)
    if isinstance(asked, str):
        return [{"role": "user", "content": f"{instruction}\n\n{asked}" if instruction else asked}]
    if instruction:
        raise UserError("--instruction goes in front of texts; this prompt is a list of messages.")
    messages = normalize_messages(asked) if isinstance(asked, list) else []
    if not messages or messages[-1]["role"] == "assistant":
        raise UserError("a prompt has to be a text, or messages of which the last is not the assistant's.")
    return messages


def roll_out(
    questions: list[Question], generate: Generate, run_code: RunCode, rules: RolloutConfig
) -> Iterator[Trajectory]:
    """Yields trajectories as they end, each with its answer judged. A slot of the batch that becomes free is filled
    with the next question, so that long conversations block nothing. Programs of a batch run in parallel."""
    jobs = [(question, sample) for question in questions for sample in range(rules.samples)]
    waiting = deque(Trajectory(q.key, n, list(q.messages), q.gold) for q, n in jobs)
    active: list[Trajectory] = []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # more would spend their time limit waiting
        while waiting or active:
            while waiting and len(active) < rules.batch_size:
                active.append(waiting.popleft())
            replies = generate([trajectory.messages for trajectory in active])
            programs = [take_turn(*turn, rules) for turn in zip(active, replies, strict=True)]
            runs = pool.map(lambda code: None if code is None else run_code(code), programs)
            for trajectory, run in zip(active, runs, strict=True):
                if run is not None:
                    trajectory.code.append(run.ended)
                    trajectory.messages.append({"role": rules.tool_role, "content": output_block(run)})
            for trajectory in (t for t in active if t.ended):
                trajectory.correct = is_right(trajectory.answer, trajectory.gold)
                yield trajectory
            active = [trajectory for trajectory in active if not trajectory.ended]


def save_all(trajectories: Iterable[Trajectory], path: str | Path, total: int) -> list[Trajectory]:
    """All trajectories as a list, each written to a JSON Lines file as it ends, with a progress bar on a terminal."""
    done: list[Trajectory] = []
    with Path(path).open("w", encoding="utf-8") as file, tqdm(total=total, desc="rollouts", disable=None) as bar:
        for trajectory in trajectories:
            done.append(trajectory)
            file.write(json.dumps(asdict(trajectory), ensure_ascii=False) + "\n")
            file.flush()
            bar.set_postfix(right=sum(t.correct for t in done), refresh=False)
            bar.update()
    return done


def take_turn(trajectory: Trajectory, reply: Reply, rules: RolloutConfig) -> str | None:
    """Adds the policy's turn, and ends the trajectory or returns the program to run before the next one.

    A box outside code is the answer, whatever code is beside it: the policy did not wait for its output. A turn
    without box and code is the end too, as nothing would come back. A turn that was cut may still contain a box; its
    code is not run.
    """
    if reply.ended == "too long":
        trajectory.ended = "too long"
        return None
    trajectory.messages.append({"role": "assistant", "content": reply.text})
    trajectory.turns += 1
    trajectory.answer, program = last_boxed(CODE.sub("", reply.text)), code_of(reply.text)
    if trajectory.answer is not None:
        trajectory.ended = "answered"
    elif reply.ended == "cut":
        trajectory.ended = "cut"
    elif program is None:
        trajectory.ended = "no answer"
    elif trajectory.turns == rules.max_turns:
        trajectory.ended = "max turns"
    return None if trajectory.ended else program


def code_of(text: str) -> str | None:
    """The Python blocks of a turn as one program; None where there is none. Earlier turns' variables are gone, as in
    the data of recipes/. An unclosed last block extends to the end of the text."""
    blocks = CODE.findall(text)
    return "\n".join(blocks) if blocks else None


def output_block(run: RunResult) -> str:
    """The turn after code: what was printed, in an ```output block, and which limit ended the program, if one did."""
    text, half = run.output, OUTPUT_CHARACTERS // 2
    if len(text) > 2 * half:
        text = f"{text[:half]}\n… {len(text) - 2 * half} characters left out …\n{text[-half:]}"
    text += "\n" * (text != "" and not text.endswith("\n"))
    text += {"timeout": "TimeoutError: the time limit was reached\n", "flood": "OSError: too much output\n"}.get(
        run.ended, ""
    )
    return f"```output\n{text}```"
