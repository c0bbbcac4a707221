"""From a recipe to tokenized pairs to train on and to evaluate on. Needs no weights."""

import os

import numpy as np
import torch
from datasets import Dataset

from mdpo.config.caches import keeping_rows, refuse_unwritable
from mdpo.config.precision import Precision, without_master
from mdpo.config.recipe import model_init_kwargs
from mdpo.console import is_main_process, say
from mdpo.data.files import whole_row
from mdpo.data.forms import look
from mdpo.data.groups import SEVERAL, TIE, AnswerPairs
from mdpo.data.report import DataReport, describe
from mdpo.data.row_numbers import refuse_by_loss
from mdpo.data.sequence_counts import rank_imbalance, token_totals
from mdpo.data.sources import DatasetSplit, hold_out, load_datasets, mix
from mdpo.data.tokenize import DropCounts, tokenize_dataset
from mdpo.data.whole_columns import contiguous, texts, with_numbers
from mdpo.errors import UserError
from mdpo.masking.dates import fix_day
from mdpo.masking.loss_mask import RenderSettings
from mdpo.ranks import first_of_node, row_ranks

SANITY_PAIRS = {"train": 32, "eval": 8}  # of each dataset, with sanity_check


def prepare_pairs(recipe, tokenizer, folder: str | None = None) -> tuple[Dataset, Dataset | None, DataReport]:
    """(training pairs, held-out pairs or None, the row accounting), tokenized once by the main process, which shows
    the report, and writes it into `folder` where one is given. The caller has to ask the report whether too many rows
    are bad. Raises UserError."""
    args, data = recipe.training, recipe.data
    report = DataReport({}, args.max_length)
    say(*fix_day(recipe, tokenizer))
    refuse_unwritable()
    with first_of_node(), keeping_rows():
        parts = load_datasets(data.dataset_mixer, data.dataset_splits, data.dataset_configs)
        train = _tokenized([p for p in parts if "train" in p.split], "train", recipe, tokenizer, report)
        evals = [p for p in parts if "train" not in p.split]
        if data.eval_dataset_mixer:
            evals += load_datasets(data.eval_dataset_mixer, splits=None)
        evals = _tokenized(evals, "eval", recipe, tokenizer, report)
    _refuse_idle(answer_pairs(recipe), report)
    if not train:
        raise UserError(f"dataset_splits: no dataset has a split to train on among {data.dataset_splits}.")
    train, held_out = mix(train, args.seed), mix(evals, args.seed) if evals else None
    if data.test_split_size:
        if held_out is not None:
            raise UserError("test_split_size: there already are pairs to evaluate on. Leave one of the two out.")
        train, held_out = hold_out(train, data.test_split_size, args.seed)
    needs = {"eval_on_start": (args.eval_on_start, "false"), "eval_strategy": (args.eval_strategy != "no", '"no"')}
    needs |= {"show_answers": (args.show_answers, "0")}
    for key, (needed, off) in needs.items():
        if needed and held_out is None:
            todo = f"Set eval_dataset_mixer, test_split_size or {key}: {off}"
            raise UserError(f"{key}: there are no pairs to evaluate on. {todo}.")
    with first_of_node(), keeping_rows():
        train = contiguous(_first(train, data.max_training_samples))
        held_out = None if held_out is None else contiguous(_first(held_out, data.max_eval_samples))
    if is_main_process():
        _tell(report, train, held_out, folder)
        tokens, distinct = token_totals(train)
        say(f"tokens to train on: {tokens:,} in all sequences, {distinct:,} of them distinct within a pair")
        pairs, of_row = args.per_device_train_batch_size, row_ranks()
        imbalance = rank_imbalance(train, pairs, -(-8 // of_row), args.seed)
        if imbalance and of_row < 8:
            ranks = "8 ranks" if of_row == 1 else f"{-(-8 // of_row)} groups of {of_row} ranks"
            say(f"{ranks} of {pairs} pairs: the busiest would have {imbalance:.2f} × the mean of tokens (from lengths)")
    return train, held_out, report


def _tokenized(parts: list[DatasetSplit], kind: str, recipe, tokenizer, report: DataReport) -> list[Dataset]:
    """The kept rows of each part, without what an earlier row of any part repeats; `place` is the order of all."""
    args, settings = recipe.training, render_settings(recipe)
    tokenized, seen, place = [], set(), 0
    for part in parts:
        rows, name = part.rows, f"{part.name} ({kind})"
        rows = rows.select(range(min(len(rows), SANITY_PAIRS[kind]))) if args.sanity_check else rows
        read, _ = look(map(whole_row, rows), name, settings.mask_turns)
        if unused := sorted(set(part.columns) - read):
            report.unused[name] = unused
        workers = args.dataset_num_proc or len(os.sched_getaffinity(0))
        rows, counts = tokenize_dataset(rows, tokenizer, settings, name, workers, answer_pairs(recipe))
        refuse_by_loss(args, rows, name)
        rows = without_repeated(rows, counts, seen)
        report.counts[name] = counts
        tokenized.append(with_numbers(rows, "place", place))
        place += len(rows)
    return tokenized


def without_repeated(rows: Dataset, counts: DropCounts, seen: set[str]) -> Dataset:
    """The rows whose ids and masks are not in `seen`, which grows by theirs. The others are counted."""
    first, repeated = [], []
    for i, (digest, key) in enumerate(zip(texts(rows, "digest"), texts(rows, "key"), strict=True)):
        if digest in seen:
            repeated.append(key)
        else:
            seen.add(digest)
            first.append(i)
    if repeated:
        counts.drop(repeated, "duplicate")
    return rows.select(np.array(first, np.int64)) if repeated else rows


def _tell(report: DataReport, train: Dataset, held_out: Dataset | None, folder: str | None) -> None:
    report.training = describe(train)
    if held_out is not None:
        report.held_out = describe(held_out)
        if both := set(texts(train, "prompt_key")) & set(texts(held_out, "prompt_key")):
            report.notes.append(f"{len(both)} prompts are both in the training and in the held-out pairs.")
    report.show()
    if folder:
        report.write(folder)


def answer_pairs(recipe) -> AnswerPairs:
    data = recipe.data
    return AnswerPairs(data.pairs, data.min_reward_gap, data.max_pairs_per_prompt)


def _refuse_idle(answers: AnswerPairs, report: DataReport) -> None:
    """Raises UserError where the recipe says which answers are compared and no row has several."""
    set_keys = [key for key, default in vars(AnswerPairs()).items() if getattr(answers, key) != default]
    several = any(SEVERAL in counts.kept_with or any(r.startswith(TIE) for r in counts.reasons)
                  for counts in report.counts.values())  # fmt: skip
    if set_keys and not several:
        raise UserError(f"{set_keys[0]}: has no effect: no row has several answers (docs/rows.md).")


def render_settings(recipe) -> RenderSettings:
    args = recipe.training
    return RenderSettings(
        args.max_length,
        args.truncation_mode,
        args.mask_user_turns,
        recipe.data.chat_template_kwargs or {},
        recipe.data.allow_different_prompts,
        recipe.data.turns_without_reasoning,
    )


def _first(rows: Dataset, limit: int | None) -> Dataset:
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def checked_precision(recipe, config) -> Precision:
    """The dtypes of the run, from the model's configuration (None: unknown) before its weights are loaded. Raises
    UserError where training would lose its steps to rounding."""
    args, kwargs = recipe.training, model_init_kwargs(recipe.model, recipe.training)
    dtype = kwargs.get("dtype") or "float32"
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or torch.float32
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    precision = Precision.of(args, dtype, recipe.model.use_peft)
    if why := without_master(args, precision.trained):
        raise UserError(why)
    return precision
