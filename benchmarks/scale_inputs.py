"""What benchmarks/scale.py measures on: generated pairs, and random models."""

import json
import os
import random
from pathlib import Path
from typing import Any

SMALL = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
ALIKE = 500  # of so many rows one has two sides that are alike, and is dropped


def rows(count: int, seed: int = 0):
    """`count` generated pairs of two or three turns, 100 to 170 tokens a side: two of each prompt, one in ALIKE with
    sides that are alike. Those of a smaller count are the first ones of a larger."""
    for i in range(count):
        prompt, own = random.Random(f"{seed} {i // 2}"), random.Random(f"{seed} {i} answers")
        a, b, c = prompt.randrange(100, 1000), prompt.randrange(2, 100), i // 2
        asked = (
            f"Order {c}: {a} boxes hold {b} {prompt.choice(('pens', 'cups', 'nuts'))} each. "
            f"{prompt.choice(('How many are there?', 'What is the number of all of them?', 'Count them.'))}"
        )
        row: dict[str, Any] = {"prompt": [{"role": "user", "content": asked}]}
        for side in ("chosen", "rejected"):
            found = a * b + (own.randrange(1, 50) if side == "rejected" and i % ALIKE != ALIKE - 1 else 0)
            code = f"Let me compute it, try {i}.\n```python\nn = {a} * {b}\nprint({found - a * b} + n)\n```"
            turns = [code, f"There are {found} in order {c}, of {a} boxes."]
            said = [f"```output\n{found}\n```"]
            if c % 3 == 0:
                turns.append(f"Yes: {a} times {b} is {found}.")
                said.append("Are you sure? Look at it once more.")
            messages = [{"role": "assistant", "content": turns[0]}]
            for text, answer in zip(said, turns[1:], strict=True):
                messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
            row[side] = messages
        yield row


def write_rows(path: Path, count: int) -> None:
    """The generated pairs as JSON Lines; a file that is there is complete."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".part")
        with draft.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows(count))
        os.replace(draft, path)


def long_rows(count: int, tokens: int) -> list[dict]:
    """`count` pairs whose sides have about `tokens` tokens each: a short common prompt, then half in the user's words
    and half in the policy's, which are supervised."""
    import workloads

    def side(seed: int) -> list[dict]:
        texts = [workloads._text(tokens // 2 - 15, seed + part) for part in range(2)]
        asked = {"role": "user", "content": "Go on."}
        return [asked, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": texts[0]},
                {"role": "assistant", "content": texts[1]}]  # fmt: skip

    return [{"chosen": side(10 * i), "rejected": side(10 * i + 5)} for i in range(count)]


def model_folder(folder: Path, source: Path, sizes: dict[str, int]) -> Path:
    """A random Llama of these sizes with the tokenizer of another model."""
    if not (folder / "model.safetensors").exists():
        import torch
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

        tokenizer = AutoTokenizer.from_pretrained(source)
        ends = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        torch.manual_seed(0)
        config = LlamaConfig(
            **sizes, **ends, vocab_size=len(tokenizer), max_position_embeddings=65536, tie_word_embeddings=True
        )
        tokenizer.save_pretrained(folder)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder
