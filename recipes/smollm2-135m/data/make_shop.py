"""Write what the loop on the shop needs (recipes/smollm2-135m/shop.yaml), a tool-calling environment with state:

    python recipes/smollm2-135m/data/make_shop.py [FOLDER]

FOLDER (outputs/shop) gets sft.jsonl, trajectories that do what is asked; tasks.jsonl and heldout.jsonl, for the policy;
and model/, SmolLM2 with the chat template of tools.jinja. The same seeds give the same bytes.
"""

import json
import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from mdpo.rollouts.environment import Environments  # noqa: E402
from mdpo.rollouts.shop import Shop, expert, tasks  # noqa: E402

MODEL, TEMPLATE = ROOT / "models/smollm2-135m-instruct", Path(__file__).with_name("tools.jinja")
FILES = {"sft": (160, 1), "tasks": (120, 2), "heldout": (300, 3)}  # name: (rows, seed)


def main():
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "outputs/shop"
    folder.mkdir(parents=True, exist_ok=True)
    tools = list(Environments(Shop).schemas.values())
    for name, (n, seed) in FILES.items():
        rows = tasks(n, seed)
        if name == "sft":
            rows = [{"key": row["key"], "messages": shown(row), "tools": tools} for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{folder / name}.jsonl: {len(rows)} rows")
    if not MODEL.is_dir():
        sys.exit(f"error: there is no {MODEL}; make model first.")
    with_tools = folder / "model"
    shutil.rmtree(with_tools, ignore_errors=True)
    shutil.copytree(MODEL, with_tools, copy_function=linked, ignore=shutil.ignore_patterns("prepared.json", "*.jinja"))
    shutil.copy(TEMPLATE, with_tools / "chat_template.jinja")
    print(f"{with_tools}: SmolLM2 with {TEMPLATE.name}")


def linked(source, target):
    """The same file under another name; a copy where the file system cannot."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def shown(row):
    """The messages of a trajectory that does what is asked."""
    messages = [{"role": "user", "content": row["prompt"]}]
    for tool, answer, arguments in expert(row):
        call = {"type": "function", "function": {"name": tool, "arguments": arguments}}
        messages += [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": answer}]
    return [*messages, {"role": "assistant", "content": "The order is placed."}]


if __name__ == "__main__":
    main()
