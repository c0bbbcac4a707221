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
    model_with_tools(folder / "model")
    tools = list(Environments(Shop).schemas.values())
    for name, (n, seed) in FILES.items():
        rows = tasks(n, seed)
        if name == "sft":
            rows = [{"key": row["key"], "messages": shown(row), "tools": tools} for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{folder / name}.jsonl: {len(rows)} rows")


def model_with_tools(target):
    """SmolLM2's files beside the chat template of tools.jinja; what is there already is kept or refused."""
    template = target / "chat_template.jinja"
    if target.exists():
        if not template.is_file() or template.read_bytes() != TEMPLATE.read_bytes():
            sys.exit(
                f"error: {target} is there and has not the chat template {TEMPLATE.name}; move it, or name a FOLDER."
            )
        print(f"{target}: there already")
        return
    if not MODEL.is_dir():
        sys.exit(f"error: there is no {MODEL}; make model first.")
    unfinished = target.with_name("model.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    ignored = shutil.ignore_patterns("prepared.json", "*.jinja")
    shutil.copytree(MODEL, unfinished, copy_function=linked, ignore=ignored)
    shutil.copy(TEMPLATE, unfinished / template.name)
    unfinished.rename(target)
    print(f"{target}: SmolLM2 with {TEMPLATE.name}")


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
