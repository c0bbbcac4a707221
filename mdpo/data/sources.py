"""The datasets that a recipe names → rows: loaded, mixed, held out."""

import glob
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import (
    Dataset,
    DatasetDict,
    concatenate_datasets,
    get_dataset_split_names,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.exceptions import DatasetsError

from mdpo.console import first_line
from mdpo.data.files import kind_of, number_rows, read_files
from mdpo.data.forms import refuse_no_pairs
from mdpo.data.whole_columns import texts
from mdpo.errors import UserError


@dataclass
class DatasetSplit:
    """One split of one dataset: the dataset as the recipe names it, with [split] behind it where it has several."""

    name: str
    split: str
    rows: Dataset  # `mdpo.data.files.whole_row` makes a row of each
    columns: list[str]


def load_datasets(
    mixer: dict[str, float], splits: list[str] | None, configs: list[str] | None = None
) -> list[DatasetSplit]:
    """Every dataset in the mix: the first `fraction` of the rows of splits to train on, and all rows of the others.
    With `splits` None all splits are taken, and the fraction is of each.

    A dataset is a local file (JSON Lines, JSON, compressed or not, Parquet, Arrow), several by a pattern with *, a
    folder of them, a saved `datasets` folder, or a hub name. What has no splits is "train". Each row gets a `key` that
    says where it is: FILE:LINE for JSON, else the part's name and the row's number, from 1. Raises UserError."""
    parts = []
    for i, (name, fraction) in enumerate(mixer.items()):
        loaded = _load(name, splits, configs[i] if configs else None)
        if not loaded:
            raise UserError(f"dataset {name!r} has none of the splits {splits}. Set dataset_splits in the recipe.")
        for split, (rows, columns) in loaded.items():
            if len(rows) == 0:
                raise UserError(f"dataset {name!r}, split {split!r}: no rows in it.")
            columns = [column for column in columns if column != "key"]
            refuse_no_pairs(columns, name if split == "train" else f"{name}, split {split}")
            if splits is None or "train" in split:
                count = int(fraction * len(rows) + 1e-9)  # 0.29 of 100 is 28.999999999999996
                if not count:
                    raise UserError(f"dataset {name!r}: a share of {fraction} of its {len(rows)} rows is no row.")
                rows = rows.select(range(count))
            if {"image", "images"} & set(columns):
                raise UserError(
                    f"dataset {name!r}: its rows have images, and this trainer takes text. Use trl.DPOTrainer for them."
                )
            parts.append(DatasetSplit(_part_name(name, split, loaded), split, rows, columns))
    return parts


def _part_name(name: str, split: str, splits) -> str:
    return name if len(splits) == 1 else f"{name}[{split}]"


def _load(name: str, splits: list[str] | None, config: str | None) -> dict[str, tuple[Dataset, list[str]]]:
    """{split: (rows, each with a `key`; their columns)}, of the splits that are wanted and there."""
    path, config = Path(name).expanduser(), config or None
    pattern = glob.has_magic(name) and not path.exists()
    saved = any((path / f).exists() for f in ("state.json", "dataset_dict.json"))
    if config and (path.is_file() or saved or pattern):
        raise UserError(f'dataset_configs: {name} has no configurations; give "" for it.')
    if pattern:
        files = sorted(file for file in glob.glob(str(path), recursive=True) if Path(file).is_file())
        if not files:
            raise UserError(f"dataset files {name}: none matches (looked in {Path.cwd()}).")
        return {"train": read_files(files)}
    if path.is_file():
        return {"train": read_files([str(path)])}
    if not path.is_dir() and (kind_of(path) or name.startswith((".", "/", "~"))):
        raise UserError(f"dataset file {name} does not exist (looked in {Path.cwd()}).")
    try:
        if path.is_dir() and not saved:
            return _load_folder(path, name, splits, config)
        if saved and not isinstance(loaded := load_from_disk(str(path)), DatasetDict):
            return {"train": (number_rows(loaded, name), loaded.column_names)}
        available = list(loaded) if saved else get_dataset_split_names(name, config)
        wanted = [split for split in available if splits is None or split in splits]
        loaded = {split: loaded[split] if saved else load_dataset(name, config, split=split) for split in wanted}
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, DatasetsError) as e:
        raise UserError(
            f"dataset {name!r} cannot be loaded: {first_line(e)}. Where the hub cannot be reached, put the data into a "
            "local file and name that file in dataset_mixer."
        ) from e
    numbered = {split: number_rows(rows, _part_name(name, split, loaded)) for split, rows in loaded.items()}
    return {split: (rows, rows.column_names) for split, rows in numbered.items()}


def _load_folder(path: Path, name: str, splits: list[str] | None, config: str | None):
    """A folder of files, whose splits `datasets` derives from their names or from the folder's README.md."""
    builder = load_dataset_builder(str(path), config)
    loaded = {}
    for split, files in (builder.config.data_files or {}).items():
        if splits is None or str(split) in splits:
            paths = [Path(name, Path(file).relative_to(path.resolve())) for file in files]
            loaded[str(split)] = read_files([str(file.expanduser()) for file in paths])
    return loaded


def mix(parts: list[Dataset], seed: int, limit: int | None = None) -> Dataset:
    """All parts in one dataset, shuffled by `seed`, at most `limit` rows of it."""
    rows = concatenate_datasets(parts).shuffle(seed=seed)
    return rows.select(range(min(limit, len(rows)))) if limit else rows


def hold_out(rows: Dataset, size: int | float, seed: int) -> tuple[Dataset, Dataset]:
    """(train, held out): whole prompts are held out, so that no prompt is on both sides, until at least `size`
    rows (a share of the rows, where `size` is below 1) are. Raises UserError where nothing would be left to train on.
    """
    wanted = size if size >= 1 else max(1, round(size * len(rows)))
    prompts = Counter(texts(rows, "prompt_key"))
    held_prompts, count = set(), 0
    for prompt in texts(Dataset.from_dict({"p": sorted(prompts)}).shuffle(seed=seed), "p"):
        if count >= wanted:
            break
        held_prompts.add(prompt)
        count += prompts[prompt]
    if count == len(rows):
        raise UserError(f"test_split_size: {size} leaves no row of {len(rows)} to train on.")
    is_held_out = np.array([prompt in held_prompts for prompt in texts(rows, "prompt_key")], bool)
    return rows.select(np.flatnonzero(~is_held_out)), rows.select(np.flatnonzero(is_held_out))
