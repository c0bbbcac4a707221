"""Local files of rows → datasets. JSON is kept as written: keys and types may differ from row to row, and none is
filled in, as a table of columns would do with the arguments of tool calls."""

import importlib.util
import json
import zlib
from collections.abc import Iterator
from lzma import LZMAError
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import datasets
import fsspec
import xxhash
from datasets import Dataset, Features, Value, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetsError
from tqdm.auto import tqdm

from mdpo.console import first_line
from mdpo.errors import UserError
from mdpo.storage import read_cache, write_cache

KINDS = {".jsonl": "json lines", ".ndjson": "json lines", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")
DAMAGED = (OSError, EOFError, LZMAError, BadZipFile, zlib.error, RuntimeError)  # the last one: an encrypted archive
NOT_JSON = (ValueError, RecursionError)  # wrong encodings too, numbers of thousands of digits, nesting beyond reason
ROW = "row as JSON"  # the column of a dataset from JSON files, beside `key`


def kind_of(path: Path) -> str | None:
    """A value of KINDS by the file's ending, one for compression aside; None where the ending is unknown."""
    endings = [s.lower() for s in path.suffixes]
    return KINDS.get(endings[-2] if len(endings) > 1 and endings[-1] in PACKED else endings[-1] if endings else "")


def read_files(paths: list[str]) -> tuple[Dataset, list[str]]:
    """The rows of all files, in order, each with a `key`: PATH:LINE of JSON Lines, else PATH:ROW, from 1; and the names
    of their columns. Rows of JSON files are texts in the column ROW. Raises UserError that names the file, and the line
    where there is one."""
    kinds = {path: kind_of(Path(path)) for path in paths}
    for path, kind in kinds.items():
        _refuse_unreadable(path, kind)
    if all(kind.startswith("json") for kind in kinds.values()):
        return _read_json(paths)
    if len(set(kinds.values())) > 1:
        raise UserError(f"dataset files {paths[0]}, …: they are of several kinds: {', '.join(set(kinds.values()))}.")
    parts = []
    for path, kind in kinds.items():
        try:
            parts.append(number_rows(load_dataset(kind, data_files=path, split="train"), path))
        except UserError:
            raise
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:
            raise UserError(f"dataset file {path}: {first_line(error)}") from error
    rows = concatenate_datasets(parts)
    return rows, rows.column_names


def _refuse_unreadable(path: str, kind: str | None) -> None:
    ending = Path(path).suffix
    if kind is None:
        known = ", ".join([*KINDS, *(f".jsonl{p}" for p in PACKED)])
        raise UserError(f"dataset file {path}: unknown ending {ending!r}; known are {known}.")
    if Path(path).stat().st_size == 0:
        raise UserError(f"dataset file {path} is empty.")
    if ending == ".zst" and importlib.util.find_spec("zstandard") is None:
        raise UserError(f"dataset file {path}: `pip install zstandard` to read it, or decompress it.")
    if ending == ".zip":
        try:
            names = [name for name in ZipFile(path).namelist() if not name.endswith("/")]
        except DAMAGED as error:
            raise UserError(f"dataset file {path}: cannot be read: {first_line(error)}") from error
        if len(names) != 1:
            raise UserError(
                f"dataset file {path}: contains {len(names)} files, not one. Unpack it and name the folder."
            )


def whole_row(row: dict[str, Any], index: int = 0) -> dict[str, Any]:
    """A row of any dataset as it was written, with its `key`. Arrow's structs give each message the keys of all, null
    where it has none of its own: nulls are taken out there."""
    if ROW in row:
        whole = {**json.loads(row[ROW]), "key": row["key"]}
    else:
        whole = {name: without_nulls(value) for name, value in row.items()}
    return {**whole, "key": str(whole.get("key") or f"row:{index + 1}")}


def without_nulls(value: Any) -> Any:
    """The value without dictionary entries that are None, at any depth."""
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


def number_rows(rows: Dataset, name: str) -> Dataset:
    """With the column `key`, NAME:ROW, in place of one that may be there."""
    keys = [f"{name}:{n + 1}" for n in range(len(rows))]
    return rows.remove_columns([c for c in ("key",) if c in rows.column_names]).add_column("key", keys)


def _read_json(paths: list[str]) -> tuple[Dataset, list[str]]:
    stamps = [(Path(path).stat().st_size, Path(path).stat().st_mtime_ns) for path in paths]  # a changed file is new
    columns: list[str] = []
    for path, stamp in zip(paths, stamps, strict=True):
        columns += _known_columns(path, stamp)
    features = Features({ROW: Value("string"), "key": Value("string")})
    rows = Dataset.from_generator(_as_texts, features=features, gen_kwargs={"paths": paths, "stamps": stamps})
    return rows, list(dict.fromkeys(columns))


def _known_columns(path: str, stamp: tuple[int, int]) -> list[str]:
    """The columns of a JSON file, which is read to its end for them once, so that every mistake has its line before
    anything is written; cached beside `datasets`' own cache, for other ranks and later starts."""
    name = xxhash.xxh3_64_hexdigest(json.dumps([str(Path(path).resolve()), *stamp]).encode())
    cached = Path(datasets.config.HF_DATASETS_CACHE, "mdpo-columns", f"{name}.json")
    if (known := read_cache(cached)) is not None:
        return known
    columns: dict[str, None] = {}
    rows = 0
    for _, row in tqdm(json_rows(path), desc=f"reading {path}", unit=" rows", delay=3):
        columns |= dict.fromkeys(row)
        rows += 1
    if not rows:
        raise UserError(f"dataset file {path}: no rows in it.")
    write_cache(cached, list(columns))
    return list(columns)


def _as_texts(paths: list[str], stamps) -> Iterator[dict]:
    for path in paths:
        for number, row in json_rows(path):
            yield {ROW: json.dumps(row), "key": f"{path}:{number}"}


def json_rows(path: str) -> Iterator[tuple[int, dict]]:
    """(line, row) of JSON Lines, (place from 1, row) of a JSON array. Raises UserError."""
    for place, _, row in placed_rows(path):
        yield place, row


def placed_rows(path: str) -> Iterator[tuple[int, int | None, dict]]:
    """As `json_rows`, with the byte between the two at which the row's line begins, for `row_at`; None where nothing
    can be read from its middle: it is packed, or an array. Raises UserError."""
    try:
        with fsspec.open(path, "rb", compression="infer") as file:
            if kind_of(Path(path)) == "json lines":
                plain = Path(path).suffix.lower() not in PACKED
                yield from ((n, begin if plain else None, row) for n, begin, row in _lines(path, file))
            else:
                yield from ((n, None, row) for n, row in _document(path, file.read()))
    except DAMAGED as error:
        raise UserError(f"dataset file {path}: cannot be read: {first_line(error)}") from error


def row_at(path: Path, begin: int) -> dict:
    """The row whose line begins at that byte. Raises UserError."""
    try:
        with path.open("rb") as file:
            file.seek(begin)
            row = json.loads(file.readline().decode("utf-8" if begin else "utf-8-sig"))
    except (OSError, *NOT_JSON) as error:
        raise UserError(f"dataset file {path}: byte {begin} cannot be read: {error}.") from error
    if not isinstance(row, dict):
        raise UserError(f"dataset file {path}: byte {begin} is not a JSON object.")
    return row


def _lines(path: str, lines) -> Iterator[tuple[int, int, dict]]:
    """(number, byte, row)."""
    begin = 0
    for number, line in enumerate(lines, start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            row = json.loads(text) if text.strip() else None
        except NOT_JSON as error:
            raise UserError(f"dataset file {path}: line {number} cannot be read: {error}.") from error
        if isinstance(row, dict):
            yield number, begin, row
        elif text.strip():
            raise UserError(f"dataset file {path}: line {number} is not a JSON object.")
        begin += len(line)


def _document(path: str, raw: bytes) -> Iterator[tuple[int, dict]]:
    """Of a .json file: an array of rows, an object that contains one such array, or JSON Lines after all."""
    try:
        document = json.loads(raw.decode("utf-8-sig"))
    except NOT_JSON as error:
        if getattr(error, "msg", "") != "Extra data":
            raise UserError(f"dataset file {path}: cannot be read: {error}.") from error
        yield from ((number, row) for number, _, row in _lines(path, raw.splitlines()))
        return
    if isinstance(document, dict) and "chosen" not in document:
        arrays = {name: value for name, value in document.items() if isinstance(value, list)}
        if len(arrays) != 1:
            raise UserError(
                f"dataset file {path}: an object with {len(arrays)} arrays ({', '.join(arrays)}), not one of rows."
            )
        [document] = arrays.values()
    if not isinstance(document, dict | list):
        raise UserError(f"dataset file {path}: contains {type(document).__name__}, no rows.")
    for place, row in enumerate([document] if isinstance(document, dict) else document, start=1):
        if not isinstance(row, dict):
            raise UserError(f"dataset file {path}: entry {place} is not a JSON object.")
        yield place, row
