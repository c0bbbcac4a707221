"""The numbers of a row: by how much chosen should win, and how much its pair counts."""

import json
import math
from typing import Any

import numpy as np
import pyarrow.compute as pc

from mdpo.config.schema import MDPOConfig
from mdpo.data.json_texts import kind_of
from mdpo.data.whole_columns import column
from mdpo.errors import DropPair, UserError
from mdpo.loss.registry import refuse_weights


def margin_of(row: dict[str, Any]) -> float | None:
    """`margin`, else by how much the chosen side's score is higher, where both have one."""
    values = [row.get(name) for name in ("margin", "score_chosen", "score_rejected")]
    for name, value in zip(("margin", "score_chosen", "score_rejected"), values, strict=True):
        if value is not None and not _finite(value):
            raise DropPair(f"{name} is {kind_of(value)}, not a finite number")
    margin, better, worse = values
    if margin is None and better is not None and worse is not None:
        margin = float(better) - float(worse)
        if not math.isfinite(margin):
            raise DropPair("margin is not a finite number")
    return None if margin is None else float(margin)


def weight_of(row: dict[str, Any]) -> float | None:
    """`weight`, which multiplies the pair's loss. Raises DropPair, for 0 too: nothing would be learned of the pair, and
    what is computed is."""
    weight = row.get("weight")
    if weight is None:
        return None
    if not _finite(weight) or not 0 <= weight < 1e38:  # a float32 in the batch
        raise DropPair(f"weight is {json.dumps(weight, default=str)[:20]}, not a finite number >= 0")
    if weight == 0:
        raise DropPair("weight is 0: nothing is learned of the pair")
    return float(weight)


def _finite(value: Any) -> bool:
    """Whether a value is a number that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e308


def refuse_by_loss(args: MDPOConfig, rows, name: str) -> None:
    """Raises UserError where `margin_scale` is set and a row of the tokenized dataset has no margin, or where rows have
    weights that the loss cannot take."""
    if args.margin_scale and len(missing := np.flatnonzero(column(rows, "margin").is_null())):
        first = rows[int(missing[0])]["key"]
        raise UserError(f"margin_scale: {len(missing)} rows of {name} have no `margin`, the first one is {first}.")
    if "weight" in rows.column_names and pc.any(pc.not_equal(column(rows, "weight"), 1)).as_py():
        refuse_weights(args.loss_type)
