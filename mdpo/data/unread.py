"""Messages about rows that are no pairs, and about columns that may contain the question and that nothing reads."""

import re
from typing import Any

from mdpo.data.columns import Row, role_of
from mdpo.data.messages import normalize_messages
from mdpo.errors import DropPair

NO_QUESTION = "no user turn and no prompt"
# Columns about a row; a text in any other one may be the question.
ABOUT = re.compile(
    r"(?i)(^|_)(key|id|ids|uuid|idx|index|hash|md5|sha|source|sources|origin|dataset|split|subset|config|model|models|"
    r"policy|generator|category|categories|type|kind|domain|topic|tag|tags|label|labels|lang|language|license|date|"
    r"time|timestamp|created|url|link|path|file|meta|metadata|score|scores|rating|ratings|reward|rewards|winner|tokens|"
    r"length|version|status|annotator|judge|images?)($|_)"
)
ASKS = re.compile(r"(?i)(^|_)(prompt|question|query|instruction|problem|request|post|input|dialog|dialogue|"
                  r"conversation|messages|history|context|turns)s?($|_)")  # fmt: skip
# What such a name ends with where it is a text after all: model_input, source_text.
TEXT = re.compile(r"(?i)_(prompt|question|query|instruction|problem|request|post|input|dialog|dialogue|text|sentence|"
                  r"document|passage|content)s?$")  # fmt: skip
SENTENCE = re.compile(r"[.?!。？！]\s*$")
UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")  # Thai to Chinese
ROLE_MARKS = re.compile(
    r"(?im)^\W*(human|user|question|instruction|prompt|q|post|subreddit)\W*:|\[INST\]|^#+ *(human|user|instruction|"
    r"question)\b|<[|｜](user|im_start|start_header_id|prompter)|<start_of_turn>"
)
WORDS = 3  # a text of so many words may be a question


class Unread(DropPair):
    """The question may be in a column that nothing reads."""


def words_in(text: str) -> int:
    """How many words a text has; in scripts that put no spaces between them, two letters count as one."""
    return max(len(text.split()), len(UNSPACED.findall(text)) // 2)


def holds_text(value: Any) -> bool:
    """Whether a value contains a text of WORDS words or more, at any depth, or messages."""
    if isinstance(value, str):
        return words_in(value) >= WORDS
    if isinstance(value, dict):
        return role_of(value) is not None or any(map(holds_text, value.values()))
    return isinstance(value, list) and any(map(holds_text, value))


def unread_text(row: Row, used: set[str]) -> str | None:
    """The first column outside `used` that may contain the question; those whose names say so come first."""
    others = [n for n, value in row.items() if n not in used and value and not _about(n, value)]
    named = [n for n in others if ASKS.search(n) and not isinstance(row[n], int | float)]
    return next(iter(named + [n for n in others if holds_text(row[n])]), None)


def _about(name: str, value: Any) -> bool:
    """Whether a column is about its row, by its name, and contains no whole sentence."""
    if not ABOUT.search(name) or TEXT.search(name):
        return False
    return not (isinstance(value, str) and holds_text(value) and SENTENCE.search(value))


def no_question(row: Row, sides: tuple, used: set[str]) -> DropPair | None:
    """Why sides without a prompt cannot be trained on: the question is not there, or in a column that nothing reads.
    None for transcripts, plain texts without such a column, and conversations in which somebody asks."""
    column = unread_text(row, used)
    where = f": rename the column {column}, which nothing reads, to prompt, or take it out" if column else ""
    if all(isinstance(side, str) for side in sides):
        marked = any(ROLE_MARKS.search(side) for side in sides)
        return Unread(f"plain texts without a prompt{where}") if column and not marked else None
    if not all(isinstance(side, list | dict) for side in sides):
        return None
    named = zip(sides, ("chosen", "rejected"), strict=True)
    messages = [normalize_messages(side if isinstance(side, list) else [side], name) for side, name in named]
    if all(any(m["role"] == "user" for m in side) for side in messages):
        return None
    return (Unread if column else DropPair)(NO_QUESTION + where)


PAIRS = """    import json
    with open("pairs.jsonl", "w", encoding="utf-8") as out:
        for row in map(json.loads, open({file!r}, encoding="utf-8")):
            pair = {{"prompt": [{{"role": "user", "content": row[{question!r}]}}],
                    "chosen": row[{chosen!r}], "rejected": row[{rejected!r}]}}
            out.write(json.dumps(pair) + "\\n")"""
GROUPS = """    import collections, json
    groups = collections.defaultdict(lambda: ([], []))
    for row in map(json.loads, open({file!r}, encoding="utf-8")):
        good = {good}
        groups[json.dumps(row[{task!r}])][not good].append(row[{column!r}])
    with open("pairs.jsonl", "w", encoding="utf-8") as out:
        for task, (right, wrong) in groups.items():
            for chosen, rejected in zip(right, wrong):
                pair = {pair}
                out.write(json.dumps(pair) + "\\n")"""
WHOLE, AFTER_PROMPT = (
    '{"chosen": chosen, "rejected": rejected}',
    '{"prompt": json.loads(task), "chosen": chosen, "rejected": rejected}',
)
# Usual names of the parts, in the order in which they are guessed.
BETTER = ("chosen", "preferred", "preferred_response", "better", "accepted", "good", "positive", "pos", "win",
          "winning", "response_chosen", "chosen_output", "output_1")  # fmt: skip
WORSE = ("rejected", "dispreferred", "dispreferred_response", "worse", "bad", "negative", "neg", "lose", "losing",
         "response_rejected", "rejected_output", "output_2")  # fmt: skip
ASKED = ("prompt", "question", "instruction", "query", "input", "problem", "task", "context")
SCORES = ("reward", "rewards", "score", "success", "resolved", "correct", "is_correct", "passed", "solved", "outcome",
          "target", "is_success", "task_success", "final_reward", "label", "verdict")  # fmt: skip
TRAJECTORIES = ("messages", "conversations", "conversation", "trajectory", "traj", "history", "steps", "turns")
TASKS = ("task_id", "instance_id", "problem_id", "question_id", "prompt_id", "task", "question", "problem", "id")


def no_pairs(columns: list[str], name: str) -> str:
    """The message about a dataset in no known form: its columns, and the few lines that make pairs of it."""
    missing = [c for c in ("chosen", "rejected") if c not in columns]
    has = f"It has: {', '.join(columns)}."
    if {"completion", "label"} <= set(columns):
        text = GROUPS.format(file=name, good="row['label']", task=guess(("prompt", *ASKED), columns, "PROMPT"),
                             column="completion", pair=AFTER_PROMPT)  # fmt: skip
        return f"single answers with a label (KTO's form) are no pairs. {has}\n{_of_one('answers', 'prompt')}\n{text}"
    score, column = guess(SCORES, columns, ""), guess(TRAJECTORIES, columns, "")
    if len(missing) == 2 and score and column:
        good = f"row[{score!r}] not in (0, False, None, 'failure', 'fail')"
        text = GROUPS.format(file=name, good=good, task=guess(TASKS, columns, "TASK"), column=column, pair=WHOLE)
        return f"trajectories with a verdict are no pairs. {has}\n{_of_one('trajectories', 'task')}\n{text}"
    parts = {"question": guess(ASKED, columns, "QUESTION"), "chosen": guess(BETTER, columns, "BETTER"),
             "rejected": guess(WORSE, columns, "WORSE")}  # fmt: skip
    return (
        f"no column {' or '.join(missing)}. {has}\nThat is none of the forms in docs/rows.md. Write prompt, chosen and "
        "rejected, for example (without prompt where the sides contain the question):\n"
        f"{PAIRS.format(file=name, **parts)}"
    )


def _of_one(rows: str, group: str) -> str:
    return f"Pair good with bad {rows} of one {group}, and name the new file in dataset_mixer:"


def guess(names: tuple[str, ...], columns: list[str], otherwise: str) -> str:
    return next((name for name in names if name in columns), otherwise)
