"""Write what the loop of recipes/smollm2-135m learns from and is asked: trajectories for SFT, and questions.

    python recipes/smollm2-135m/data/make_tasks.py [FOLDER]

SFT shows how questions of make_pairs.py's short training templates are answered. The loop asks those of the held-out
templates: what it learns of them it has from its own trajectories. No file of make_pairs.py has one of the questions.
The same seed gives the same bytes.
"""

import json
import sys
from pathlib import Path

import make_pairs
import pair_templates as T

DATA = Path(__file__).resolve().parent
# A template needs enough numbers for questions that no other file has: the film's hours and minutes are 40 questions.
SHORT = [template for template in T.SHORT if not template[0].startswith("A film")]
KNOWN = (SHORT, T.SHORT_WORDS, T.TRAIN_RANGES, T.TRAIN_NAMES)
NEW = (T.HELDOUT, T.SHORT_WORDS, T.HELDOUT_RANGES, T.HELDOUT_NAMES)
FILES = {  # name: (rows, source); of the first one the whole trajectory
    "loop_sft": (160, KNOWN),
    "loop_tasks": (120, NEW),  # nobody shows the policy how templates of these are answered
    "loop_heldout": (300, NEW),
    "loop_known": (300, KNOWN),
}


def main():
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DATA
    folder.mkdir(parents=True, exist_ok=True)
    used = {question(row) for name in make_pairs.FILES for row in rows_of(DATA / f"{name}.jsonl")}
    for name, (n, source) in FILES.items():
        right = [make_pairs.draw_sides(f"{name}-{i:03d}", i, 1, used, *source)[0][1] for i in range(n)]
        make_pairs.fill_outputs([message for messages in right for message in messages])
        rows = [as_task(f"{name}-{i:03d}", messages) for i, messages in enumerate(right)]
        if name == "loop_sft":
            rows = [{"key": row["key"], "messages": messages} for row, messages in zip(rows, right, strict=True)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{folder / name}.jsonl: {len(rows)} rows")


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def question(row):
    return asked(row.get("chosen") or row["messages"])


def asked(messages):
    return messages[0]["content"].partition("\n\n")[2]


def as_task(key, messages):
    answer = messages[-1]["content"].partition("\\boxed{")[2].partition("}")[0]
    return {"key": key, "question": asked(messages), "answer": answer}


if __name__ == "__main__":
    main()
