"""A dataset of rows → a dataset of tokenized pairs, every dropped row counted under its reason."""

import json
from dataclasses import astuple, replace
from typing import Any

import numpy as np
import pyarrow.compute as pc
import xxhash
from datasets import Dataset, Features, IterableDataset, List, Value
from datasets.fingerprint import Hasher

from mdpo.console import first_line
from mdpo.data.counts import DropCounts
from mdpo.data.files import whole_row
from mdpo.data.forms import look
from mdpo.data.groups import SEVERAL, AnswerPairs, rows_of_two
from mdpo.data.rows import first_answer, row_to_pair
from mdpo.data.template_fit import fit
from mdpo.data.whole_columns import column, whole_numbers
from mdpo.errors import DropPair, UserError
from mdpo.masking.chat_template import ChatTemplate
from mdpo.masking.dates import with_day
from mdpo.masking.loss_mask import RenderSettings, special_tokens_in_context, tokenize_pair
from mdpo.masking.plain_texts import PlainText
from mdpo.masking.spans import refuse_slow
from mdpo.types import SIDES, TokenizedPair

# Raised by one when ids, masks or remarks of the same row change, so that cached datasets are tokenized again.
VERSION = 17
BATCH = 100  # rows that a worker takes at once
FEATURES = Features(
    {
        **{f"{side}_ids": List(Value("int32")) for side in SIDES},
        **{f"{side}_mask": List(Value("uint8")) for side in SIDES},
        **{f"{side}_weights": List(Value("float32")) for side in SIDES},
        **{f"{side}_lengths": List(Value("int32")) for side in SIDES},  # of its sequences; empty where it is one
        **{f"{side}_breaks": List(Value("string")) for side in SIDES},  # why each sequence after the first one begins
        "distinct": Value("int32"),
        "margin": Value("float64"),
        "weight": Value("float64"),  # of the pair's loss; null: 1
        "key": Value("string"),
        "prompt_key": Value("string"),
        "digest": Value("string"),  # of ids, masks, weights, and lengths of several sequences
        "longest": Value("int32"),
        "cut": Value("bool"),
        "special_in_context": Value("int32"),
        "remarks": List(Value("string")),
        "retokenized": List(Value("int32")),  # tokens that differ of each recorded side whose messages say otherwise
        "unread": List(Value("string")),
        "drop_reason": Value("string"),
    }
)


COUNTED = ["key", "drop_reason", "margin", "special_in_context", "remarks", "unread", "cut", "retokenized"]
NOT_TRAINED_ON = ["drop_reason", "longest", "remarks", "unread", "retokenized"]


def _template_for(tokenizer, settings: RenderSettings, rows, name: str):
    """For plain strings a tokenizer will do whose chat template is missing or unusable."""
    _, conversations = look(map(whole_row, rows), name, settings.mask_turns)
    try:
        return ChatTemplate(tokenizer, settings.template_kwargs, locates=settings.mask_turns)
    except UserError:
        if conversations:
            raise
        return PlainText(tokenizer)


def tokenize_rows(
    batch: dict[str, list[Any]], indices: list[int], template, settings: RenderSettings, answers: AnswerPairs
) -> dict[str, list[Any]]:
    """Rows as FEATURES has them, those with several answers as a row for each pair. A row that cannot be trained on
    carries its reason and empty lists."""
    rows = (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
    tokenized = [
        pair for row, i in zip(rows, indices, strict=True) for pair in _pairs(row, i, template, settings, answers)
    ]
    return {name: [pair[name] for pair in tokenized] for name in FEATURES}


def _pairs(row, index: int, template, settings: RenderSettings, answers: AnswerPairs) -> list[dict[str, Any]]:
    row = whole_row(row, index)
    try:
        of_two, several = rows_of_two(row, answers)
    except DropPair as reason:
        return [{**_empty(row), "drop_reason": str(reason)}]
    pairs = [_tokenized(pair, template, settings) for pair in of_two]
    counted = several and (len(pairs) > 1 or answers != AnswerPairs())
    return [{**pair, "remarks": [*pair["remarks"], SEVERAL]} for pair in pairs] if counted else pairs


def tokenize_row(row: dict[str, Any], index: int, template, settings: RenderSettings) -> dict[str, Any]:
    """One pair as FEATURES has it."""
    [pair] = _pairs(row, index, template, settings, AnswerPairs())
    return pair


def _empty(row: dict[str, Any]) -> dict[str, Any]:
    out = {**vars(TokenizedPair([], [], [], [])), "key": row["key"], "prompt_key": "", "special_in_context": 0}
    return out | {"margin": None, "weight": None, "digest": "", "unread": [], "drop_reason": ""}


def _tokenized(row: dict[str, Any], template, settings: RenderSettings) -> dict[str, Any]:
    out, row = _empty(row), row if settings.pair_weights else {**row, "weight": None}
    try:
        pair = fit(row_to_pair(row, settings.mask_turns, settings.different_prompts), template)
        out["unread"] = pair.unread
        tokenized = vars(tokenize_pair(pair, template, settings))
        out |= {
            **tokenized,
            "remarks": list(dict.fromkeys([*pair.remarks, *tokenized["remarks"]])),
            "margin": pair.margin,
            "weight": pair.weight,
            "prompt_key": _digest(_question_of(pair)),
            "digest": _digest(_trained_on(tokenized)),
            "special_in_context": special_tokens_in_context(pair, template),
        }
    except DropPair as e:
        return {**out, "drop_reason": str(e), "longest": e.longest}
    except UserError:
        raise
    except Exception as e:  # one odd row does not end a run
        return {**out, "drop_reason": f"unexpected {type(e).__name__}: {first_line(e, innermost=False)[:80]}"}
    return out


def _question_of(pair) -> Any:
    """What is before the first answer: rows with the same one are held out together."""
    if not pair.chosen:  # recorded, without a word of what was asked
        ids, mask = pair.recorded[0].sequences[0]
        return ids[: mask.index(1)]
    if isinstance(pair.chosen, str):
        start = pair.chosen[: pair.n_prompt]
        # Without a prompt the common start may run into the answers: it is cut where a line begins.
        return start if pair.prompt_given or "\n" not in start else start[: start.rindex("\n")]
    return pair.chosen[: first_answer(pair.chosen)]


def _trained_on(tokenized: dict[str, Any]) -> list[list]:
    lists = [tokenized[f"{side}_{part}"] for side in SIDES for part in ("ids", "mask", "weights")]
    lengths = [tokenized[f"{side}_lengths"] for side in SIDES]
    return lists + lengths if any(lengths) else lists


def _digest(value: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True, default=str).encode())


def tokenize_dataset(
    rows: Dataset,
    tokenizer,
    settings: RenderSettings,
    name: str,
    num_proc: int | None = None,
    answers: AnswerPairs = AnswerPairs(),  # noqa: B008 it is frozen
) -> tuple[Dataset, DropCounts]:
    """The kept rows of `rows` as FEATURES (less `drop_reason`), and the counts.

    Cached by content: rows, tokenizer, template and settings, the day too where the template may write it. Raises
    UserError when no row is left."""
    refuse_slow(tokenizer)
    settings = replace(settings, template_kwargs=with_day(tokenizer, settings.template_kwargs))
    template = _template_for(tokenizer, settings, rows, name)
    specials = tokenizer.special_tokens_map  # templates write them
    identity = (tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, specials)
    tokenized = rows.map(
        tokenize_rows,
        with_indices=True,
        batched=True,
        batch_size=BATCH,
        fn_kwargs={"template": template, "settings": settings, "answers": answers},
        remove_columns=rows.column_names,
        features=FEATURES,
        num_proc=num_proc if len(rows) > 1000 else None,
        new_fingerprint=Hasher.hash((rows._fingerprint, identity, astuple(settings), astuple(answers), VERSION)),
        desc=f"Tokenizing {name}",
    )
    counts = DropCounts(name, longest=whole_numbers(tokenized, "longest"))
    for table in tokenized.select_columns(COUNTED).with_format("arrow").iter(batch_size=10_000):
        counts.add_table(table)
    kept = tokenized.select(np.flatnonzero(pc.equal(column(tokenized, "drop_reason"), "")))
    if not counts.kept:
        raise UserError("no pair is left.\n" + "\n".join(counts.lines()), "dataset")
    return kept.remove_columns(NOT_TRAINED_ON), counts


def tokenize_stream(rows: IterableDataset, tokenizer, settings: RenderSettings, name: str):
    """As `tokenize_dataset`, row by row while the stream is read: (IterableDataset, counts that grow meanwhile).

    The first row that is dropped for a reason is named at once; counts of dataloader workers stay in the workers."""
    first, template = next(iter(rows)), _template_for(tokenizer, settings, rows, name)
    counts = DropCounts(name, streamed=True)

    def keep(row: dict[str, Any]) -> bool:
        reason = row["drop_reason"]
        if reason and reason not in counts.reasons:
            print(f"{name}: dropped {row['key']}: {reason} (further ones are counted)", flush=True)
        for remark in [] if reason else row["remarks"]:
            if remark not in counts.kept_with:
                print(f"{name}: kept {row['key']} with {remark} (further ones are counted)", flush=True)
        counts.add(row)
        return not reason

    options = {"with_indices": True, "batched": True, "batch_size": 1, "remove_columns": list(first)}
    given = {"template": template, "settings": settings, "answers": AnswerPairs()}
    tokenized = rows.map(tokenize_rows, fn_kwargs=given, features=FEATURES, **options)
    return tokenized.filter(keep).remove_columns(NOT_TRAINED_ON), counts


def side_lengths(rows: Dataset) -> np.ndarray:
    """(n, 2): tokens of the longest sequence of the chosen and of the rejected side of each row, int64."""
    parts = [np.zeros((0, 2), np.int64)]
    columns = [name for side in SIDES for name in (f"{side}_ids", f"{side}_lengths") if name in rows.column_names]
    for table in rows.select_columns(columns).with_format("arrow").iter(batch_size=1000):
        parts.append(np.stack([_longest_sequence(table, side) for side in SIDES], axis=1))
    return np.concatenate(parts)


def _longest_sequence(table, side: str) -> np.ndarray:
    """(n,) of an Arrow table's rows; those of a side that is one sequence have empty lengths, or null."""
    longest = np.asarray(pc.list_value_length(table.column(f"{side}_ids")), np.int64)
    if f"{side}_lengths" not in table.column_names:
        return longest
    lengths = table.column(f"{side}_lengths").combine_chunks()
    counts = np.asarray(pc.fill_null(pc.list_value_length(lengths), 0), np.int64)
    several, values = counts > 0, np.asarray(lengths.flatten(), np.int64)
    if several.any():
        longest = longest.copy()
        longest[several] = np.maximum.reduceat(values, (counts.cumsum() - counts)[several])
    return longest
