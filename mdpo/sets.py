"""The sets that a recipe names → rows: loaded, mixed, held out."""

import json
from collections import Counter
from pathlib import Path

from datasets import Dataset, DatasetDict, concatenate_datasets, get_dataset_split_names, load_dataset, load_from_disk

from mdpo.types import UserError

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}


def load_sets(
    mixer: dict[str, float], splits: list[str] | None, configs: list[str] | None = None
) -> list[tuple[str, Dataset]]:
    """[(split, rows)] of every set in the mix: the first `fraction` of the rows of splits to train on, and all rows of
    the others. With `splits` None all splits are taken, and the fraction is of each.

    A set is a local .jsonl/.json/.parquet/.arrow file, a folder of them, a saved `datasets` folder, or a hub name. What
    has no splits is "train". Each row gets a `key`: the set as the recipe names it and the row's number, from 1.
    Raises UserError."""
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
            if splits is None or "train" in split:
                kept = int(fraction * len(rows) + 1e-9)  # 0.29 of 100 is 28.999999999999996
                if not kept:
                    raise UserError(f"dataset {name!r}: a share of {fraction} of its {len(rows)} rows is no row.")
                rows = rows.select(range(kept))
            parts.append((split, rows))
    return parts


def _load(name: str, splits: list[str] | None, config: str | None) -> dict[str, Dataset]:
    path, config = Path(name).expanduser(), config or None
    saved = any((path / f).exists() for f in ("state.json", "dataset_dict.json"))
    if config and (path.is_file() or saved):
        raise UserError(f'dataset_configs: {name} has no configurations; give "" for it.')
    try:
        if path.is_file():
            if path.stat().st_size == 0:
                raise UserError(f"dataset file {name} is empty.")
            if broken := _broken_line(path):  # the loader lets broken lines and wrong encodings pass
                raise UserError(f"dataset file {name}: {broken}")
            return {"train": _load_file(path)}
        if path.is_dir():
            found = load_from_disk(str(path)) if saved else load_dataset(str(path), config)
            if not isinstance(found, DatasetDict):
                return {"train": found}
            return {split: rows for split, rows in found.items() if splits is None or split in splits}
        if path.suffix in BUILDERS or name.startswith((".", "/", "~")):
            raise UserError(f"dataset file {name} does not exist (looked in {Path.cwd()}).")
        there = get_dataset_split_names(name, config)
        wanted = there if splits is None else [split for split in splits if split in there]
        return {split: load_dataset(name, config, split=split) for split in wanted}
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
