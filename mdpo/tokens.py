"""A set of rows → a set of tokenised pairs, every dropped row counted under its reason."""

from collections import Counter
from dataclasses import astuple, dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, List, Value
from datasets.fingerprint import Hasher

from mdpo.data import row_to_pair
from mdpo.render import RenderSettings, special_tokens_in_context, tokenize_pair
from mdpo.template import ChatTemplate
from mdpo.types import DropPair, TokenizedPair, UserError

# Raised by one when ids or masks of the same row change, so that cached sets are made anew.
VERSION = 2
FEATURES = Features(
    {
        **{f"{side}_ids": List(Value("int32")) for side in ("chosen", "rejected")},
        **{f"{side}_mask": List(Value("uint8")) for side in ("chosen", "rejected")},
        **{f"{side}_weights": List(Value("float32")) for side in ("chosen", "rejected")},
        "shared_len": Value("int32"),
        "margin": Value("float64"),
        "key": Value("string"),
        "prompt_key": Value("string"),
        "special_in_context": Value("int32"),
        "drop_reason": Value("string"),
    }
)


@dataclass
class DropCounts:
    """What became of the rows of one set: `reasons` maps a drop reason to the keys of its rows."""

    name: str
    read: int = 0
    kept: int = 0
    special_in_context: int = 0  # kept pairs whose user or tool text holds special tokens
    streamed: bool = False  # counted while the set is read, an epoch after the other
    reasons: dict[str, list[str]] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """The table for the terminal: a line for the set, and one for each reason with its first keys."""
        lines = [f"{self.name}: {self.read} rows read, {self.kept} kept, {self.read - self.kept} dropped"]
        for reason, keys in sorted(self.reasons.items(), key=lambda item: -len(item[1])):
            lines.append(f"  dropped {len(keys)}: {reason} ({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})")
        if self.special_in_context:
            lines.append(f"  kept {self.special_in_context} with special tokens inside user or tool text")
        return lines


class PlainText:
    """Stands in for ChatTemplate where rows are plain strings, which no template renders."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer


def tokenize_row(row: dict[str, Any], index: int, template, settings: RenderSettings) -> dict[str, Any]:
    """One row as FEATURES has it. A row that cannot be trained on carries its reason and empty lists."""
    key = str(row.get("key") or f"row:{index + 1}")
    out = {**vars(TokenizedPair([], [], [], [], 0)), "key": key, "prompt_key": "", "special_in_context": 0}
    out["margin"] = None
    try:
        pair = row_to_pair(row, settings.mask_turns)
        out |= vars(tokenize_pair(pair, template, settings))
        out["margin"] = pair.margin
        out["prompt_key"] = Hasher.hash(pair.chosen[: pair.n_prompt])
        out["special_in_context"] = special_tokens_in_context(pair, template)
    except DropPair as e:
        return {**out, "drop_reason": str(e)}
    return {**out, "drop_reason": ""}


def tokenize_dataset(
    rows: Dataset, tokenizer, settings: RenderSettings, name: str, num_proc: int | None = None
) -> tuple[Dataset, DropCounts]:
    """The kept rows of `rows` as FEATURES (less `drop_reason`), and the counts.

    Cached by content: rows, tokenizer, template and settings. Raises UserError when no row is left."""
    conversational = any(isinstance(rows[0].get(side), list) for side in ("chosen", "rejected"))
    template = ChatTemplate(tokenizer, settings.template_kwargs) if conversational else PlainText(tokenizer)
    identity = (tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.eos_token)
    done = rows.map(
        tokenize_row,
        with_indices=True,
        fn_kwargs={"template": template, "settings": settings},
        remove_columns=rows.column_names,
        features=FEATURES,
        num_proc=num_proc if len(rows) > 1000 else None,
        new_fingerprint=Hasher.hash((rows._fingerprint, identity, astuple(settings), VERSION)),
        desc=f"Tokenising {name}",
    )
    counts = DropCounts(name, read=len(done))
    for key, reason in zip(done["key"], done["drop_reason"], strict=True):
        if reason:
            counts.reasons.setdefault(reason, []).append(key)
    kept = done.select([i for i, reason in enumerate(done["drop_reason"]) if not reason])
    counts.kept = len(kept)
    counts.special_in_context = sum(n > 0 for n in kept["special_in_context"])
    if not counts.kept:
        raise UserError("no pair is left to train on.\n" + "\n".join(counts.lines()))
    return kept.remove_columns("drop_reason"), counts


def tokenize_stream(rows: IterableDataset, tokenizer, settings: RenderSettings, name: str):
    """As `tokenize_dataset`, row by row while the stream is read: (IterableDataset, counts that grow meanwhile).

    The first row that is dropped for a reason is named at once; counts of dataloader workers stay in the workers."""
    first = next(iter(rows))
    conversational = any(isinstance(first.get(side), list) for side in ("chosen", "rejected"))
    template = ChatTemplate(tokenizer, settings.template_kwargs) if conversational else PlainText(tokenizer)
    counts = DropCounts(name, streamed=True)

    def keep(row: dict[str, Any]) -> bool:
        counts.read += 1
        reason = row["drop_reason"]
        if not reason:
            counts.kept += 1
            counts.special_in_context += row["special_in_context"] > 0
        elif reason not in counts.reasons:
            print(f"{name}: dropped {row['key']}: {reason} (further ones are counted)", flush=True)
        if reason:
            counts.reasons.setdefault(reason, []).append(row["key"])
        return not reason

    options = {"with_indices": True, "fn_kwargs": {"template": template, "settings": settings}}
    tokenised = rows.map(tokenize_row, remove_columns=list(first), features=FEATURES, **options)
    return tokenised.filter(keep).remove_columns("drop_reason"), counts


def side_lengths(rows: Dataset) -> np.ndarray:
    """(n, 2): tokens of the chosen and of the rejected side of each row, int64."""
    columns, parts = ["chosen_ids", "rejected_ids"], []
    for table in rows.select_columns(columns).with_format("arrow").iter(batch_size=1000):
        offsets = [np.asarray(table.column(name).combine_chunks().offsets, np.int64) for name in columns]
        parts.append(np.stack([np.diff(x) for x in offsets], axis=1))
    return np.concatenate(parts) if parts else np.zeros((0, 2), np.int64)


def length_summary(rows: Dataset) -> dict[str, float]:
    """Tokens of a tokenised set, means per pair: both sides, supervised, shared; and the longest side."""
    total = Counter()
    longest = 0
    for row in rows:
        sides = len(row["chosen_ids"]), len(row["rejected_ids"])
        total["tokens"] += sum(sides)
        total["supervised"] += sum(row["chosen_mask"]) + sum(row["rejected_mask"])
        total["shared"] += row["shared_len"]
        longest = max(longest, *sides)
    return {**{k: v / len(rows) for k, v in total.items()}, "longest": longest}


def rank_imbalance(rows: Dataset, pairs: int, ranks: int = 8, seed: int = 0) -> float | None:
    """How much longer the busiest of `ranks` works than all on average, simulated from lengths: the most tokens of a
    rank over the mean, shared ones once, in shuffled batches of `pairs` a rank; None where there is no such step."""
    tokens = side_lengths(rows).sum(1) - np.asarray(rows["shared_len"])
    steps = len(tokens) // (ranks * pairs)
    if not steps:
        return None
    shuffled = np.random.default_rng(seed).permutation(tokens)[: steps * ranks * pairs]
    of_ranks = shuffled.reshape(steps, ranks, pairs).sum(2)
    return float((of_ranks.max(1) / of_ranks.mean(1)).mean())
