"""The pairs that benchmarks train on: real or made, in messages, and rows of exact token lengths."""

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
    """Agent trajectories: GSM8K pairs where they are at hand, else the shipped ones; `n` of them."""
    path = GSM8K if GSM8K.exists() else SHIPPED
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    random.Random(0).shuffle(rows)
    return [{side: rows[i % len(rows)][side] for side in ("chosen", "rejected")} for i in range(n)]


def _text(words: int, seed: int) -> str:
    generator = random.Random(seed)
    return " ".join(generator.choice(WORDS) for _ in range(words))


def chat_rows(n: int, history: int, turns: int, answer: int) -> list[dict]:
    """Pairs that share `turns` turns of user and assistant, `history` words together, and leave each other's path at
    the last answer, of about `answer` words."""
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


# name -> (rows of a number of pairs, pairs a step)
WORKLOADS = {
    "agent pairs": (agent_rows, 4),
    "long shared history": (lambda n: chat_rows(n, history=800, turns=4, answer=110), 2),
    "branch at the last turn": (lambda n: chat_rows(n, history=160, turns=2, answer=60), 4),
    "no sharing": (lambda n: chat_rows(n, history=0, turns=0, answer=200), 4),
}


def explicit(rows: list[dict]) -> list[dict]:
    """With the shared messages as a prompt, as a plain trl.DPOConfig and ours both read it."""
    found = []
    for row in rows:
        both = zip(row["chosen"], row["rejected"], strict=False)
        n = next((i for i, (a, b) in enumerate(both) if a != b), 1)
        found.append({"prompt": row["chosen"][:n], **{side: row[side][n:] for side in ("chosen", "rejected")}})
    return found


def dataset(name: str, n: int) -> Dataset:
    return Dataset.from_list(WORKLOADS[name][0](n))


def sized_rows(n: int, tokens: int) -> list[dict]:
    """Pairs of about `tokens` words over both sides, half of them shared."""
    return chat_rows(n, history=tokens // 4, turns=1, answer=tokens // 4)
