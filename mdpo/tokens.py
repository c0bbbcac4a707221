"""A set of rows → a set of tokenised pairs, every dropped row counted under its reason."""

import json
from dataclasses import astuple, dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import xxhash
from datasets import Dataset, Features, IterableDataset, List, Value
from datasets.fingerprint import Hasher

from mdpo.data import row_to_pair
from mdpo.dates import with_day
from mdpo.files import whole_row
from mdpo.render import RenderSettings, refuse_slow, special_tokens_in_context, tokenize_pair
from mdpo.template import ChatTemplate
from mdpo.types import DropPair, TokenizedPair, UserError

# Raised by one when ids or masks of the same row change, so that cached sets are made anew.
VERSION = 3
SIDES = ("chosen", "rejected")
FEATURES = Features(
    {
        **{f"{side}_ids": List(Value("int32")) for side in ("chosen", "rejected")},
        **{f"{side}_mask": List(Value("uint8")) for side in ("chosen", "rejected")},
        **{f"{side}_weights": List(Value("float32")) for side in ("chosen", "rejected")},
        "shared_len": Value("int32"),
        "margin": Value("float64"),
        "key": Value("string"),
        "prompt_key": Value("string"),
        "digest": Value("string"),  # of ids, masks and weights
        "longest": Value("int32"),
        "cut": Value("bool"),
        "special_in_context": Value("int32"),
        "drop_reason": Value("string"),
    }
)


SPECIAL, CUT, LOWER = "special tokens inside user or tool text", "a turn cut in its middle", "a margin below 0"
FIRST_KEYS, MOST_REASONS = 5, 20  # keys of each reason in reports, reasons on the terminal


@dataclass
class DropCounts:
    """What became of the rows of one set: `reasons` maps a drop reason to the keys of its rows, `kept_with` a remark to
    the keys of kept rows. `longest` holds the tokens of the longer side of every row that came to have any."""

    name: str
    read: int = 0
    kept: int = 0
    streamed: bool = False  # counted while the set is read, an epoch after the other
    reasons: dict[str, list[str]] = field(default_factory=dict)
    kept_with: dict[str, list[str]] = field(default_factory=dict)
    longest: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def add(self, row: dict[str, Any]) -> None:
        """Counts a row as FEATURES has it."""
        self.read += 1
        if row["drop_reason"]:
            self.reasons.setdefault(row["drop_reason"], []).append(row["key"])
            return
        self.kept += 1
        margin = row["margin"]
        remarks = {SPECIAL: row["special_in_context"], CUT: row["cut"], LOWER: margin is not None and margin < 0}
        for remark in (name for name, true in remarks.items() if true):
            self.kept_with.setdefault(remark, []).append(row["key"])

    def drop(self, keys: list[str], reason: str) -> None:
        """Kept rows that are dropped after all."""
        self.kept -= len(keys)
        self.reasons.setdefault(reason, []).extend(keys)
        gone = set(keys)
        self.kept_with = {name: [k for k in of if k not in gone] for name, of in self.kept_with.items()}

    @property
    def dropped(self) -> int:
        return self.read - self.kept

    def lines(self) -> list[str]:
        """For the terminal: a line for the set, and one for each reason and remark with its first keys."""
        lines = [f"{self.name}: {self.read} rows read, {self.kept} kept, {self.dropped} dropped"]
        by_rows = sorted(self.reasons.items(), key=lambda item: -len(item[1]))
        lines += [f"  dropped {len(keys)}: {reason} {_some(keys)}" for reason, keys in by_rows[:MOST_REASONS]]
        if rest := by_rows[MOST_REASONS:]:
            lines.append(f"  dropped {sum(len(keys) for _, keys in rest)}: {len(rest)} further reasons")
        lines += [f"  kept {len(keys)} with {remark} {_some(keys)}" for remark, keys in self.kept_with.items() if keys]
        return lines

    def as_dict(self) -> dict[str, Any]:
        """For reports, the first keys only."""
        both = {"dropped": self.reasons, "kept_with": self.kept_with}
        out = {
            what: {name: {"rows": len(k), "first": k[:FIRST_KEYS]} for name, k in d.items()} for what, d in both.items()
        }
        return {"read": self.read, "kept": self.kept, **out}


def _some(keys: list[str]) -> str:
    return f"({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})"


class PlainText:
    """Stands in for ChatTemplate where rows are plain strings, which no template renders."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def locate(self, *_, **__):
        raise DropPair("a conversation among plain texts")

    render = locate


def _template_for(tokenizer, settings: RenderSettings, rows):
    """Plain strings do with a tokenizer whose chat template is missing or of no use."""
    try:
        return ChatTemplate(tokenizer, settings.template_kwargs, locates=settings.mask_turns)
    except UserError:
        rows = (whole_row(row) for row in islice(rows, 100))
        sides = (row.get(name) for row in rows for name in ("chosen", "rejected", "prompt", "conversations"))
        if any(isinstance(side, list | dict) for side in sides):
            raise
        return PlainText(tokenizer)


def tokenize_row(row: dict[str, Any], index: int, template, settings: RenderSettings) -> dict[str, Any]:
    """One row as FEATURES has it. A row that cannot be trained on carries its reason and empty lists."""
    row = whole_row(row, index)
    out = {**vars(TokenizedPair([], [], [], [], 0)), "key": row["key"], "prompt_key": "", "special_in_context": 0}
    out |= {"margin": None, "digest": ""}
    try:
        pair = row_to_pair(row, settings.mask_turns, settings.different_prompts)
        tokenised = vars(tokenize_pair(pair, template, settings))
        out |= {
            **tokenised,
            "margin": pair.margin,
            "prompt_key": _digest(_question_of(pair)),
            "digest": _digest([tokenised[f"{side}_{what}"] for side in SIDES for what in ("ids", "mask", "weights")]),
            "special_in_context": special_tokens_in_context(pair, template),
        }
    except DropPair as e:
        return {**out, "drop_reason": str(e), "longest": e.longest}
    except UserError:
        raise
    except Exception as e:  # one odd row does not end a run
        return {**out, "drop_reason": f"unexpected {type(e).__name__}: {(str(e).splitlines() or [''])[0][:80]}"}
    return {**out, "drop_reason": ""}


def _question_of(pair) -> Any:
    """What stands before the first answer: rows with the same one are held out together."""
    if isinstance(pair.chosen, str):
        start = pair.chosen[: pair.n_prompt]
        # Without a prompt the common start may run into the answers: it is cut where a line begins.
        return start if pair.prompt_given or "\n" not in start else start[: start.rindex("\n")]
    first = next((i for i, m in enumerate(pair.chosen) if m["role"] == "assistant"), len(pair.chosen))
    return pair.chosen[:first]


def _digest(value: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True, default=str).encode())


def tokenize_dataset(
    rows: Dataset, tokenizer, settings: RenderSettings, name: str, num_proc: int | None = None
) -> tuple[Dataset, DropCounts]:
    """The kept rows of `rows` as FEATURES (less `drop_reason`), and the counts.

    Cached by content: rows, tokenizer, template and settings, the day too where the template may write it. Raises
    UserError when no row is left."""
    refuse_slow(tokenizer)
    settings = replace(settings, template_kwargs=with_day(tokenizer, settings.template_kwargs))
    template = _template_for(tokenizer, settings, rows)
    specials = tokenizer.special_tokens_map  # templates write them
    identity = (tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, specials)
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
    counts = DropCounts(name)
    light = done.select_columns(["key", "drop_reason", "margin", "special_in_context", "cut", "longest"])
    for batch in light.iter(batch_size=10_000):
        for values in zip(*batch.values(), strict=True):
            counts.add(dict(zip(batch, values, strict=True)))
    counts.longest = np.asarray(done["longest"], np.int64)
    kept = done.select([i for i, reason in enumerate(done["drop_reason"]) if not reason])
    if not counts.kept:
        raise UserError("no pair is left.\n" + "\n".join(counts.lines()))
    return kept.remove_columns(["drop_reason", "longest"]), counts


def tokenize_stream(rows: IterableDataset, tokenizer, settings: RenderSettings, name: str):
    """As `tokenize_dataset`, row by row while the stream is read: (IterableDataset, counts that grow meanwhile).

    The first row that is dropped for a reason is named at once; counts of dataloader workers stay in the workers."""
    first, template = next(iter(rows)), _template_for(tokenizer, settings, rows)
    counts = DropCounts(name, streamed=True)

    def keep(row: dict[str, Any]) -> bool:
        reason = row["drop_reason"]
        if reason and reason not in counts.reasons:
            print(f"{name}: dropped {row['key']}: {reason} (further ones are counted)", flush=True)
        counts.add(row)
        return not reason

    options = {"with_indices": True, "fn_kwargs": {"template": template, "settings": settings}}
    tokenised = rows.map(tokenize_row, remove_columns=list(first), features=FEATURES, **options)
    return tokenised.filter(keep).remove_columns(["drop_reason", "longest"]), counts


def side_lengths(rows: Dataset) -> np.ndarray:
    """(n, 2): tokens of the chosen and of the rejected side of each row, int64."""
    columns, parts = ["chosen_ids", "rejected_ids"], []
    for table in rows.select_columns(columns).with_format("arrow").iter(batch_size=1000):
        offsets = [np.asarray(table.column(name).combine_chunks().offsets, np.int64) for name in columns]
        parts.append(np.stack([np.diff(x) for x in offsets], axis=1))
    return np.concatenate(parts) if parts else np.zeros((0, 2), np.int64)


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
