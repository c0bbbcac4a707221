"""From a recipe to tokenised pairs to train on and to evaluate on, and the output folder's state. Needs no weights."""

import os
import shutil
from pathlib import Path

from datasets import Dataset
from transformers.trainer_utils import get_last_checkpoint

from mdpo.render import RenderSettings
from mdpo.sets import hold_out, load_sets, mix
from mdpo.startup import is_main_process, say
from mdpo.tokens import DropCounts, length_summary, rank_imbalance, tokenize_dataset
from mdpo.types import UserError

SANITY_PAIRS = {"train": 32, "eval": 8}  # of each set, with sanity_check
LEFT_BY_A_RUN = ("checkpoint-*", "*.safetensors", "*.safetensors.index.json", "run_report.json", "trainer_state.json")


def prepare_pairs(recipe, tokenizer) -> tuple[Dataset, Dataset | None, dict[str, DropCounts]]:
    """(training pairs, held-out pairs or None, counts of each set), tokenised once by the main process."""
    args, data = recipe.training, recipe.data
    settings = render_settings(recipe)
    counts: dict[str, DropCounts] = {}

    def tokenised(parts: list[tuple[str, Dataset]], kind: str) -> list[Dataset]:
        done = []
        for split, rows in parts:
            name = f"{rows[0]['key'].rpartition(':')[0]} ({split}, {kind})"
            rows = rows.select(range(min(len(rows), SANITY_PAIRS[kind]))) if args.sanity_check else rows
            rows, counts[name] = tokenize_dataset(rows, tokenizer, settings, name, args.dataset_num_proc)
            done.append(rows)
        return done

    with args.main_process_first(desc="preparing pairs"):
        parts = load_sets(data.dataset_mixer, data.dataset_splits, data.dataset_configs)
        train = tokenised([p for p in parts if "train" in p[0]], "train")
        evals = tokenised([p for p in parts if "train" not in p[0]], "eval")
        if data.eval_dataset_mixer:
            evals += tokenised(load_sets(data.eval_dataset_mixer, splits=None), "eval")
    if not train:
        raise UserError(f"dataset_splits: no set has a split to train on among {data.dataset_splits}.")
    train, held_out = mix(train, args.seed), mix(evals, args.seed) if evals else None
    if data.test_split_size:
        if held_out is not None:
            raise UserError("test_split_size: there already are pairs to evaluate on. Leave one of the two out.")
        train, held_out = hold_out(train, data.test_split_size, args.seed)
    train = _first(train, data.max_training_samples)
    held_out = _first(held_out, data.max_eval_samples)
    say(*(line for c in counts.values() for line in c.lines()), *_summary("training", train))
    pairs = args.per_device_train_batch_size
    if imbalance := rank_imbalance(train, pairs, seed=args.seed):
        say(f"8 ranks of {pairs} pairs: the busiest would have {imbalance:.2f} × the mean of tokens (from lengths)")
    if held_out is not None:
        say(*_summary("held-out", held_out))
        both = set(train["prompt_key"]) & set(held_out["prompt_key"])
        if both:
            say(f"warning: {len(both)} prompts stand both in the training and in the held-out pairs.")
    return train, held_out, counts


def render_settings(recipe) -> RenderSettings:
    args = recipe.training
    return RenderSettings(
        args.max_length, args.truncation_mode, args.mask_user_turns, recipe.data.chat_template_kwargs or {}
    )


def _first(rows: Dataset | None, limit: int | None) -> Dataset | None:
    return rows if rows is None or limit is None else rows.select(range(min(limit, len(rows))))


def _summary(name: str, rows: Dataset) -> list[str]:
    mean = length_summary(rows)
    return [
        f"{name}: {len(rows)} pairs; a pair has on average {mean['tokens']:.0f} tokens on both sides, "
        f"{mean['shared']:.0f} of them shared by each side, {mean['supervised']:.0f} supervised; "
        f"longest side {mean['longest']}"
    ]


def prepare_output_dir(args) -> str | None:
    """The checkpoint to resume from, or None. A folder that already holds a run is never mixed with a new one: it is
    resumed, or cleared with overwrite_output_dir, or refused. Raises UserError."""
    folder = Path(args.output_dir)
    if args.resume_from_checkpoint:
        if isinstance(args.resume_from_checkpoint, str):
            if not Path(args.resume_from_checkpoint).is_dir():
                raise UserError(f"resume_from_checkpoint: {args.resume_from_checkpoint} is not a folder.")
            return args.resume_from_checkpoint
        last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        if last is None:
            raise UserError(f"resume_from_checkpoint: {folder} holds no checkpoint.")
        return last
    if not is_main_process():  # it may already see what the main process writes
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"output_dir: {folder} cannot be made: {e.strerror}.") from e
    if not os.access(folder, os.W_OK):
        raise UserError(f"output_dir: {folder} is not writable.")
    left = [p for pattern in LEFT_BY_A_RUN for p in sorted(folder.glob(pattern))]
    if left and not args.overwrite_output_dir:
        raise UserError(
            f"output_dir: {folder} already holds a run ({left[0].name}). Go on with it "
            "(--resume_from_checkpoint=true), write over it (--overwrite_output_dir), or choose another output_dir."
        )
    for path in left:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if left:
        say(f"overwrite_output_dir: removed {len(left)} files and folders of an earlier run from {folder}.")
    return None


def model_init_kwargs(model, args) -> dict:
    """Keyword arguments of from_pretrained, from trl.ModelConfig and what the recipe says in model_init_kwargs."""
    kwargs = {"dtype": model.dtype, "attn_implementation": model.attn_implementation, "revision": model.model_revision}
    return {**{k: v for k, v in kwargs.items() if v is not None}, **(args.model_init_kwargs or {})}
