"""Pairs that the benchmarks train on, as messages: agent trajectories, or generated chats of given lengths."""

import json
import random
from pathlib import Path

from datasets import Dataset

ROOT = Path(__file__).resolve().parent.parent
GSM8K = ROOT.parent / "shared/data/gsm8k_pairs.jsonl"  # not part of the repository
SHIPPED = ROOT / "recipes/smollm2-135m/data/heldout.jsonl"
WORDS = (
    "the a sum of three numbers is then added to result and we find that it equals price times count so answer".split()
)


def agent_rows(n: int) -> list[dict]:
    """`n` pairs of agent trajectories: GSM8K's where the file exists, else the recipe's held-out pairs."""
    path = GSM8K if GSM8K.exists() else SHIPPED
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    random.Random(0).shuffle(rows)
    return [{side: rows[i % len(rows)][side] for side in ("chosen", "rejected")} for i in range(n)]


def _text(n_words: int, seed: int) -> str:
    generator = random.Random(seed)
    return " ".join(generator.choice(WORDS) for _ in range(n_words))


def chat_rows(n: int, history: int, turns: int, answer: int) -> list[dict]:
    """`n` pairs that share `turns` turns of user and assistant, `history` words in all, and branch at the last answer,
    of about `answer` words."""
    rows = []
    for i in range(n):
        shared = []
        for turn in range(turns):
            shared.append({"role": "user", "content": _text(history // (2 * turns), 1000 * i + 2 * turn)})
            shared.append({"role": "assistant", "content": _text(history // (2 * turns), 1000 * i + 2 * turn + 1)})
        shared.append({"role": "user", "content": _text(12, 7 * i)})
        rows.append({
            side: [*shared, {"role": "assistant", "content": _text(answer + (i * 7 + k * 3) % 11, 99 * i + k)}]
            for k, side in enumerate(("chosen", "rejected"))
        })  # fmt: skip
    return rows


# name -> (function from a number of pairs to rows, pairs a step)
WORKLOADS = {
    "agent pairs": (agent_rows, 4),
    "long shared history": (lambda n: chat_rows(n, history=800, turns=4, answer=110), 2),
    "branch at the last turn": (lambda n: chat_rows(n, history=160, turns=2, answer=60), 4),
    "no sharing": (lambda n: chat_rows(n, history=0, turns=0, answer=200), 4),
}


def explicit(rows: list[dict]) -> list[dict]:
    """Rows with the shared messages as an explicit `prompt`, which trl.DPOTrainer and ours both read."""
    explicit_rows = []
    for row in rows:
        messages = zip(row["chosen"], row["rejected"], strict=False)
        n = next((i for i, (a, b) in enumerate(messages) if a != b), 1)
        explicit_rows.append({"prompt": row["chosen"][:n], **{side: row[side][n:] for side in ("chosen", "rejected")}})
    return explicit_rows


def dataset(name: str, n: int) -> Dataset:
    return Dataset.from_list(WORKLOADS[name][0](n))


def sized_rows(n: int, tokens: int) -> list[dict]:
    """`n` pairs of about `tokens` words over both sides, half of them shared."""
    return chat_rows(n, history=tokens // 4, turns=1, answer=tokens // 4)
