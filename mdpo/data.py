"""Rows of any supported set → pairs of messages. Nothing here knows a tokenizer."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, concatenate_datasets, get_dataset_split_names, load_dataset, load_from_disk

from mdpo.types import DropPair, Message, Pair, UserError

ROLES = ("system", "developer", "user", "assistant", "tool")
BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}


def row_to_pair(row: dict[str, Any], mask_turns: bool = True) -> Pair:
    """One row in TRL's preference form, messages or plain strings, with or without `prompt`. Raises DropPair.

    With a `prompt`, its assistant turns are context. Without one the prompt is everything before the first assistant
    turn; with `mask_turns` False it is TRL's: the turns (or characters) that both sides begin with.
    """
    prompt, sides = row.get("prompt"), [row.get("chosen"), row.get("rejected")]
    if not all(sides):
        raise DropPair("not a pair")
    tools = json.loads(row["tools"]) if isinstance(row.get("tools"), str) else row.get("tools")
    extra = {"tools": tools or None, "template_kwargs": row.get("chat_template_kwargs") or {}, "margin": _margin(row)}
    if all(isinstance(side, str) for side in sides):
        if isinstance(prompt, str):
            return Pair(prompt + sides[0], prompt + sides[1], len(prompt), margin=extra["margin"])
        n = _common_start(*sides)
        return Pair(*sides, n - 1 if n and sides[0][n - 1] == " " else n, margin=extra["margin"])
    if not all(isinstance(side, list) for side in sides):
        raise DropPair("not a pair")
    chosen, rejected = (normalise_messages(side) for side in sides)
    weights = [_weights(side) for side in sides]
    if isinstance(prompt, list):
        prompt = normalise_messages(prompt)
        if not (mask_turns and all(side[: len(prompt)] == prompt for side in (chosen, rejected))):
            chosen, rejected = prompt + chosen, prompt + rejected
            weights = [[1.0] * len(prompt) + side if side else [] for side in weights]
        n = len(prompt)
    elif mask_turns:
        n = _first_assistant(chosen)
        if chosen[:n] != rejected[: _first_assistant(rejected)]:
            raise DropPair("prompt mismatch")
    else:
        n = _common_start(chosen, rejected)
    if mask_turns and not all(side[-1]["role"] == "assistant" for side in (chosen, rejected)):
        raise DropPair("last turn not from the assistant")
    if any(weights) and not mask_turns:
        raise UserError(
            "Messages have a `weight`, which multiplies a turn's log-ratios: it needs mask_user_turns: true."
        )
    return Pair(chosen, rejected, n, weights=tuple(weights), **extra)


def _margin(row: dict[str, Any]) -> float | None:
    margin = row.get("margin")
    if margin is None:
        return None
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
        raise DropPair("margin is not a finite number")
    return float(margin)


def _weights(messages: list[Message]) -> list[float]:
    """The `weight` of each message, 1 where there is none; an empty list where all are 1. DropPair for a bad one."""
    weights = [m.get("weight") for m in messages]
    if any(w is not None and (isinstance(w, bool) or not (isinstance(w, int | float) and w >= 0)) for w in weights):
        raise DropPair("a message's weight is not a number >= 0")
    if any(w is not None and m["role"] != "assistant" for m, w in zip(messages, weights, strict=True)):
        raise DropPair("a weight on a message that is not the assistant's")
    weights = [1.0 if w is None else float(w) for w in weights]
    return [] if set(weights) == {1.0} else weights


def _common_start(a, b) -> int:
    """First index at which two sequences differ; one less than the shorter where they do not (TRL's rule)."""
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter - 1)


def _first_assistant(messages: list[Message]) -> int:
    return next((i for i, m in enumerate(messages) if m["role"] == "assistant"), len(messages))


def normalise_messages(messages: list[Message]) -> list[Message]:
    """Messages as templates want them: string content, tool-call arguments as objects, no null fields.
    Raises DropPair for an unknown role, missing content, or arguments that are not JSON."""
    return [_normalise(message) for message in messages]


def _normalise(message: Message) -> Message:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        role = message.get("role") if isinstance(message, dict) else type(message).__name__
        raise DropPair(f"unknown role: {role}")
    message = {k: v for k, v in message.items() if v is not None and k != "weight"}
    content = message.get("content", "")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            raise DropPair("content is not text")
        content = "".join(part["text"] for part in content)
    message["content"] = content
    if not message.get("tool_calls"):
        message.pop("tool_calls", None)
        if not content.strip() and message["role"] != "tool":  # a tool may print nothing
            raise DropPair("empty or missing content")
        return message
    message["tool_calls"] = [_normalise_call(call) for call in message["tool_calls"]]
    return message


def _normalise_call(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call in the OpenAI form, its arguments parsed: as a string they would be encoded twice."""
    call = {k: v for k, v in call.items() if v is not None}
    function = {k: v for k, v in (call.get("function") or call).items() if v is not None}
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except json.JSONDecodeError as e:
            raise DropPair("tool call arguments are not JSON") from e
    if "name" not in function:
        raise DropPair("tool call without a name")
    function = {"name": function["name"], "arguments": arguments}
    return {**{k: v for k, v in call.items() if k in ("id", "type")}, "function": function}


def load_sets(
    mixer: dict[str, float], splits: list[str], configs: list[str] | None = None
) -> list[tuple[str, Dataset]]:
    """[(split, rows)] of every set in the mix; of splits to train on, the first `fraction` of the rows.

    A set is a local .jsonl/.json/.parquet/.arrow file, a folder of them, a saved `datasets` folder, or a hub name. Each
    row gets a `key`: the set as the recipe names it and the row's number, from 1. Raises UserError."""
    parts = []
    for i, (name, fraction) in enumerate(mixer.items()):
        found = _load(name, splits, configs[i] if configs else None)
        if not found:
            raise UserError(f"dataset {name!r} has none of the splits {splits}. Set dataset_splits in the recipe.")
        for split, rows in found.items():
            if len(rows) == 0:
                raise UserError(f"dataset {name!r}, split {split!r}: no rows in it.")
            missing = {"chosen", "rejected"} - set(rows.column_names)
            if missing:
                raise UserError(
                    f"dataset {name!r}, split {split!r}: no column {' or '.join(sorted(missing))}. "
                    f"It has: {', '.join(rows.column_names)}."
                )
            source = name if len(found) == 1 else f"{name}[{split}]"
            keys = [f"{source}:{n + 1}" for n in range(len(rows))]
            rows = rows.remove_columns([c for c in ("key",) if c in rows.column_names]).add_column("key", keys)
            if "train" in split and fraction < 1:
                rows = rows.select(range(int(fraction * len(rows))))
            parts.append((split, rows))
    return parts


def _load(name: str, splits: list[str], config: str | None) -> dict[str, Dataset]:
    path = Path(name).expanduser()
    try:
        if path.is_file():
            if path.stat().st_size == 0:
                raise UserError(f"dataset file {name} is empty.")
            if broken := _broken_line(path):  # the loader lets broken lines and wrong encodings pass
                raise UserError(f"dataset file {name}: {broken}")
            return {"train": _load_file(path)}
        if path.is_dir():
            saved = any((path / f).exists() for f in ("state.json", "dataset_dict.json"))
            found = load_from_disk(str(path)) if saved else load_dataset(str(path))
            found = found if isinstance(found, DatasetDict) else {"train": found}
            return {split: rows for split, rows in found.items() if split in splits}
        if path.suffix in BUILDERS or name.startswith((".", "/", "~")):
            raise UserError(f"dataset file {name} does not exist (looked in {Path.cwd()}).")
        there = get_dataset_split_names(name, config)
        return {split: load_dataset(name, config, split=split) for split in splits if split in there}
    except (OSError, ValueError, RuntimeError) as e:
        if path.is_file():
            raise UserError(f"dataset file {name}: {_first_line(e)}") from e
        raise UserError(
            f"dataset {name!r} cannot be had: {_first_line(e)}. Where the hub cannot be reached, put the data into a "
            "local file and name that file in dataset_mixer."
        ) from e


def _load_file(path: Path) -> Dataset:
    suffixes = [s for s in path.suffixes if s in BUILDERS]
    if not suffixes:
        raise UserError(f"dataset file {path}: unknown ending {path.suffix!r}; known are {', '.join(BUILDERS)}.")
    return load_dataset(BUILDERS[suffixes[-1]], data_files=str(path), split="train")


def _broken_line(path: Path) -> str | None:
    """For a .jsonl file: which line is not UTF-8, not JSON or not an object, and why."""
    if path.suffix != ".jsonl":
        return None
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                if line.strip() and not isinstance(json.loads(line.decode("utf-8")), dict):
                    return f"line {number} is not a JSON object."
            except (UnicodeDecodeError, json.JSONDecodeError) as e:
                return f"line {number} cannot be read: {e}."
    return None


def _first_line(error: Exception) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def mix(parts: list[Dataset], seed: int, limit: int | None = None) -> Dataset:
    """All parts in one set, shuffled by `seed`, at most `limit` rows of it."""
    rows = concatenate_datasets(parts).shuffle(seed=seed)
    return rows.select(range(min(limit, len(rows)))) if limit else rows


def hold_out(rows: Dataset, size: int | float, seed: int) -> tuple[Dataset, Dataset]:
    """(train, held out): whole prompts are held out, so that no prompt stands on both sides, until at least `size`
    rows (a share of the rows, where `size` is below 1) are. Raises UserError where nothing would be left to train on.
    """
    wanted = size if size >= 1 else max(1, round(size * len(rows)))
    prompts = Counter(rows["prompt_key"])
    held, count = set(), 0
    for prompt in Dataset.from_dict({"p": sorted(prompts)}).shuffle(seed=seed)["p"]:
        if count >= wanted:
            break
        held.add(prompt)
        count += prompts[prompt]
    if count == len(rows):
        raise UserError(f"test_split_size: {size} leaves no row of {len(rows)} to train on.")
    inside = [prompt in held for prompt in rows["prompt_key"]]
    return (
        rows.select([i for i, out in enumerate(inside) if not out]),
        rows.select([i for i, out in enumerate(inside) if out]),
    )
