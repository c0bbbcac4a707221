"""Pairs that the benchmarks train on, as messages: agent trajectories, or generated chats of given lengths."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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


def branch_rows(n: int, prompt: int = 392, answer: int = 149, answers: int = 8) -> list[dict]:
    """`n` pairs of answers to prompts of `prompt` words: of `answers` answers, of about `answer` words each, the first
    half are right, and each of these is compared with each wrong one. 8 answers are 16 pairs, each answer in 4."""
    rows: list[dict] = []
    while len(rows) < n:
        seed = 10_000 * len(rows)
        question = {"role": "user", "content": _text(prompt, seed)}
        texts = [_text(answer - 5 + (3 * k) % 11, seed + 1 + k) for k in range(answers)]
        sides = [[question, {"role": "assistant", "content": text}] for text in texts]
        right, wrong = sides[: answers // 2], sides[answers // 2 :]
        rows += [{"chosen": a, "rejected": b} for a in right for b in wrong]
    return rows[:n]


def thinking_rows(
    n: int, turns: int = 4, prompt: int = 200, thought: int = 80, answer: int = 40, output: int = 40
) -> list[dict]:
    """`n` pairs of two trajectories from one question, of `prompt` words: `turns` turns of a thought and an answer, and
    a user's message of `output` words between two of them."""
    rows = []
    for i in range(n):
        question = {"role": "user", "content": _text(prompt, 1000 * i)}
        row = {}
        for k, side in enumerate(("chosen", "rejected")):
            messages = [question]
            for turn in range(turns):
                seed = 1000 * i + 100 * k + 10 * turn
                text = (
                    f"<think>\n{_text(thought + (i * 7 + k * 3) % 11, seed + 1)}\n</think>\n\n{_text(answer, seed + 2)}"
                )
                messages += [
                    {"role": "assistant", "content": text},
                    {"role": "user", "content": _text(output, seed + 3)},
                ]
            row[side] = messages[:-1]
        rows.append(row)
    return rows


# ChatML that takes the thoughts of earlier turns out, as Qwen3's does, and writes nothing behind the last end of turn:
# where an answer is one turn, TRL then supervises the tokens that we do.
WITHOUT_THOUGHTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{{ m['content'] if m['role'] != 'assistant' or loop.last else m['content'].split('</think>')[-1].lstrip() }}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Workload:
    """`rows` makes so many pairs. `pairs` of them are a step; our side takes them in one micro-batch, and so does the
    side that it is compared with, unless `fit`: then that one takes the largest micro-batch that memory holds, and
    accumulates gradients."""

    rows: Callable[[int], list[dict]]
    pairs: int
    against: str = "trl"  # or "padded": ours with shared_prefix false
    together: int = 1  # so many consecutive pairs have one prompt, and stay together when rows are shuffled
    template: str | None = None  # instead of the model's own
    alike: bool = False  # both sides supervise the same tokens: their losses have to agree at every step
    fit: bool = False


WORKLOADS = {
    "agent pairs": Workload(agent_rows, 4),
    "long shared history": Workload(lambda n: chat_rows(n, history=800, turns=4, answer=110), 2),
    "branch at the last turn": Workload(lambda n: chat_rows(n, history=160, turns=2, answer=60), 4),
    "no sharing": Workload(lambda n: chat_rows(n, history=0, turns=0, answer=200), 4),
    "branches": Workload(branch_rows, 16, together=16, template=WITHOUT_THOUGHTS, alike=True, fit=True),
    "thinking": Workload(thinking_rows, 2, "padded", template=WITHOUT_THOUGHTS, alike=True, fit=True),
}


def tokenizer(model: str, template: str | None):
    """The tokenizer of a model's folder, with another chat template; None without one: trainers load their own."""
    if template is None:
        return None
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(model)
    loaded.chat_template = template
    return loaded


def sized_rows(n: int, tokens: int) -> list[dict]:
    """`n` pairs of about `tokens` words over both sides, half of them shared."""
    return chat_rows(n, history=tokens // 4, turns=1, answer=tokens // 4)
