"""How many positions a model can tell apart. Rotary ones have no limit; learned and tabulated ones end, in an
IndexError on a CPU and, on a GPU, in an assertion that names nothing."""

import copy
import re
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations import deepspeed

from mdpo.console import say
from mdpo.data.tokenize import side_lengths
from mdpo.errors import UserError
from mdpo.forward.modes import base_model
from mdpo.memory.fake_tensors import replaced

TABLE = re.compile(r"pos|^wpe$")  # in the name of a table of positions
MORE = 8  # rows that a table has at most beyond its positions: an offset
LENGTHS = ("max_position_embeddings", "n_positions", "max_target_positions", "max_seq_len")
# Whose limit is no such table: ALiBi's biases are made for so many, axial tables multiply.
IN_CONFIG = {"mpt": "max_seq_len", "reformer": "max_position_embeddings"}


def positions_of(config, trust_remote_code: bool = False) -> int | None:
    """`learned_positions` of the model that a configuration describes, built without weights."""
    text = config.get_text_config()
    if getattr(text, "rope_parameters", None):
        return None
    try:
        # Inside a ZeRO-3 run transformers would hand the new model to DeepSpeed, which shards it over all ranks.
        with torch.device("meta"), replaced(deepspeed, "_hf_deepspeed_config_weak_ref", None):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)
    except Exception:  # whatever an architecture raises: the loaded model is checked again
        return None
    return learned_positions(model)


def learned_positions(model) -> int | None:
    """The most tokens that a row of a causal model may have, those of prompt-learning PEFT not counted; None where
    there is no limit."""
    adapters = getattr(model, "peft_config", {}).values()
    own = max((adapter.num_virtual_tokens for adapter in adapters if adapter.is_prompt_learning), default=0)
    limit = _of_base(base_model(model))
    return None if limit is None else limit - own


def _of_base(model) -> int | None:
    config = model.config.get_text_config()
    if config.model_type in IN_CONFIG:
        return getattr(config, IN_CONFIG[config.model_type])
    known = next((n for n in (getattr(config, name, None) for name in LENGTHS) if isinstance(n, int)), None)
    if known is None or getattr(config, "rope_parameters", None):
        return None
    limits = [
        rows - _before(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and (_named(name) or _named(type(module).__name__.lower()))
        if known <= (rows := module.num_embeddings) <= known + MORE
    ]
    limits += [known for name, table in model.named_buffers() if _named(name) and known in table.shape[:2]]
    return min(limits, default=None)


def _named(name: str) -> bool:
    return bool(TABLE.search(name.rpartition(".")[2]))


def _before(table: nn.Embedding) -> int:
    """Rows of a table in front of the first position: OPT's offset, or RoBERTa's padding."""
    return getattr(table, "offset", 0) or (0 if table.padding_idx is None else table.padding_idx + 1)


def refuse_long_rows(rows, name: str, limit: int | None, args) -> None:
    """Raises UserError where a dataset of tokenized pairs has, or a stream may have, sides beyond a model's `limit`,
    with what `args.pad_to_multiple_of` adds to them."""
    if limit is None:
        return
    multiple = args.pad_to_multiple_of or 1
    most = limit // multiple * multiple  # with padding a row may only be so long
    advice = (
        f"the model has {limit} positions and no more. Set max_length: {most} or less, which drops and counts others."
    )
    if not isinstance(rows, Dataset):
        if args.max_length is None or args.max_length > most:
            raise UserError(f"max_length: {args.max_length} for the stream {name}, but {advice}")
        return
    longest = side_lengths(rows).max(1, initial=0)
    if over := int((longest > most).sum()):
        row = int(longest.argmax())
        key = rows[row]["key"] if "key" in rows.column_names else f"number {row}"
        raise UserError(
            f"max_length: {over} of {len(rows)} pairs of {name} have a side of more than {most} tokens, the longest "
            f"one, {longest[row]} in {key}; {advice}"
        )


def check_lengths(config, datasets: dict[str, Any], args) -> None:
    """Before weights are loaded: raises UserError as above, and says where rows are longer than a rotary model was
    trained with. `config` None is unknown."""
    if config is None:
        return
    limit, datasets = (
        positions_of(config, args.trust_remote_code),
        {n: rows for n, rows in datasets.items() if rows is not None},
    )
    for name, rows in datasets.items():
        refuse_long_rows(rows, name, limit, args)
    trained = _trained_length(config.get_text_config())
    longest = max((int(side_lengths(rows).max(initial=0)) for rows in datasets.values()), default=0)
    if limit is None and trained is not None and longest > trained:
        say(
            f"max_length: the longest side has {longest} tokens, the model's configuration names {trained} positions. "
            f"Rows beyond are computed, but it may never have been trained on such: max_length: {trained} drops them."
        )


def _trained_length(config) -> int | None:
    """Positions by a text configuration, RoPE's scaling counted."""
    length = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    for part in (rope, *rope.values()):
        if isinstance(part, dict) and isinstance(part.get("factor"), int | float) and isinstance(length, int):
            length = max(length, int(part["factor"] * (part.get("original_max_position_embeddings") or length)))
    return length if isinstance(length, int) else None
