"""Whole columns and whole datasets by Arrow. What `datasets` does row by row, a Python object for each value, takes
minutes of a million rows; each function here has the same result."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset


def column(rows: Dataset, name: str) -> pa.ChunkedArray:
    """A column of numbers, truth values or texts, in the order of the rows; `list(rows[name])` as Arrow has it."""
    values = rows.data.column(name)
    if rows._indices is None:
        return values
    if pa.types.is_string(values.type):  # `take` puts all texts into one array, whose offsets may need 64 bits
        values = pc.cast(values, pa.large_string())
    return pc.take(values, rows._indices.column(0))


def whole_numbers(rows: Dataset, name: str) -> np.ndarray:
    """(n,) int64 of a column without nulls."""
    return np.asarray(column(rows, name), np.int64)


def texts(rows: Dataset, name: str) -> list[str | None]:
    """A column of texts."""
    return column(rows, name).to_pylist()


def numbered(values: pa.ChunkedArray) -> np.ndarray:
    """(n,) int64: which of the distinct values each one is, numbered from 0 as they first occur; null is one, too.
    Example: b, a, b, null -> 0, 1, 0, 2."""
    return np.asarray(pc.index_in(values, value_set=pc.unique(values)), np.int64)


def contiguous(rows: Dataset) -> Dataset:
    """The rows in their order on the disk, where they are a selection or shuffled: each later reading of a column, and
    each new column, would gather them again. `datasets` keeps the copy for later starts; of rows that are in memory
    it is there, too. Its own `flatten_indices` makes Python lists of all values on the way."""
    if rows._indices is None:
        return rows
    return rows.with_format("arrow").flatten_indices().with_format(**rows.format)


def with_numbers(rows: Dataset, name: str, begin: int = 0) -> Dataset:
    """With the column `name`, which counts the rows from `begin`. An array has its digest at once, where `datasets`
    pickles a list's numbers one by one."""
    return contiguous(rows).add_column(name, np.arange(begin, begin + len(rows)))
