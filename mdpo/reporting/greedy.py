"""Turns that the policy writes greedily in place of others, under any launcher.

No number of the training depends on them: modes, settings and the generators of random numbers are put back.
"""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from mdpo.errors import UserError
from mdpo.forward.modes import base_model, evaluating
from mdpo.masking.chat_template import ChatTemplate
from mdpo.masking.turns import sampling_stops
from mdpo.ranks import gathered

SLACK, LEAST, MOST = 2, 32, 512  # tokens of a turn: so many times the chosen one's, at least and at most
# What would move a terminal's cursor is made visible.
CONTROL = {i: chr(0x2400 + i) for i in range(32) if i not in (9, 10)} | dict.fromkeys(range(0x7F, 0xA0), "\ufffd")
AT_ONCE = 16_384  # tokens of a batch, new ones included, unless one turn has more


@dataclass(frozen=True)
class Turn:
    """A chosen turn of a held-out pair: `prompt`, the ids before it, and `ids`, its own, the stop included; `asked`
    is the last message before it. Pairs count from 0, turns from 1."""

    pair: int
    key: str
    number: int
    asked: str
    prompt: list[int]
    ids: list[int]

    @property
    def name(self) -> str:
        return f"{self.pair} {self.key} turn {self.number}"

    @property
    def limit(self) -> int:
        return min(MOST, max(LEAST, SLACK * len(self.ids)))


@dataclass(frozen=True)
class Answer:
    """What the policy wrote in a turn's place. `cut`: the limit ended it; `as_chosen`: it is the chosen turn's ids."""

    text: str
    cut: bool
    as_chosen: bool


def answers(trainer, turns: list[Turn], tokenizer) -> dict[str, Answer]:
    """Name of each turn -> the policy's greedy answer. Each rank generates a share; all call it together."""
    args, accelerator = trainer.args, trainer.accelerator
    mine, found = turns[args.process_index :: args.world_size], {}
    devices = [args.device] if args.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices),
        torch.no_grad(),
        whole_policy(trainer) as model,
        evaluating(model),
        _greedy(model, tokenizer) as stops,
        accelerator.autocast(),
    ):
        for batch in _batches(mine, _context(model)):
            for turn, ids in zip(batch, _generated(model, batch, tokenizer.pad_token_id), strict=True):
                end = next((t for t, token in enumerate(ids, 1) if token in stops), None)
                ids = ids[: turn.limit if end is None else min(end, turn.limit)]
                cut = end is None or end > turn.limit
                found[turn.name] = Answer(text_of(ids, tokenizer), cut, ids == turn.ids)
    return {name: answer for part in gathered(found) for name, answer in part.items()}


@contextmanager
def whole_policy(trainer) -> Iterator[Any]:
    """The policy without wrappers, its weights whole on each rank: ZeRO-3 gathers them. All ranks call it together."""
    model, plugin = trainer.accelerator.unwrap_model(trainer.model_wrapped), trainer.args.deepspeed_plugin
    if plugin is None or plugin.zero_stage != 3:
        yield model
        return
    import deepspeed  # slow, and only here
    from trl.models.utils import add_hooks, remove_hooks

    with deepspeed.zero.GatheredParameters(trainer.model_wrapped.parameters()):
        remove_hooks(trainer.model_wrapped)  # they would release each layer's weights after it
        # And one of the whole model that is left compares the ranks at each forward, of which each has its own number.
        hooks, model._forward_pre_hooks = model._forward_pre_hooks, OrderedDict()
        try:
            yield model
        finally:
            model._forward_pre_hooks = hooks
            add_hooks(trainer.model_wrapped)


@contextmanager
def _greedy(model, tokenizer) -> Iterator[set[int]]:
    """Within it the model generates greedily, whatever its own settings say; the ids that end a turn are yielded."""
    models = [model, base_model(model)]
    before = [part.generation_config for part in models]
    try:
        stops = sampling_stops(ChatTemplate(tokenizer))
    except UserError:  # plain strings
        stops = {tokenizer.eos_token} - {None}
    own = getattr(before[0], "eos_token_id", None)
    ids = {*tokenizer.convert_tokens_to_ids(sorted(stops)), *(own if isinstance(own, list) else [own])} - {None}
    config = GenerationConfig(
        do_sample=False, use_cache=True, eos_token_id=sorted(ids), pad_token_id=tokenizer.pad_token_id
    )
    try:
        for part in models:
            part.generation_config = config
        yield ids
    finally:
        for part, own_config in zip(models, before, strict=True):
            part.generation_config = own_config


def _context(model) -> int | None:
    config = model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)


def _batches(turns: list[Turn], context: int | None) -> Iterator[list[Turn]]:
    """Turns of similar length together, of at most AT_ONCE tokens, and none with more than the context holds."""
    batch: list[Turn] = []
    for turn in sorted(turns, key=lambda turn: len(turn.prompt)):
        together = [*batch, turn]
        tokens = len(turn.prompt) + max(t.limit for t in together)
        if batch and (len(together) * tokens > AT_ONCE or (context is not None and tokens > context)):
            yield batch
            together = [turn]
        batch = together
    if batch:
        yield batch


def _generated(model, batch: list[Turn], pad: int) -> list[list[int]]:
    """New ids of each turn, padded on the left, so that they are in the same columns."""
    longest, limit, context = max(len(t.prompt) for t in batch), max(t.limit for t in batch), _context(model)
    limit = limit if context is None else max(1, min(limit, context - longest))
    rows = [[pad] * (longest - len(t.prompt)) + t.prompt for t in batch]
    mask = [[0] * (longest - len(t.prompt)) + [1] * len(t.prompt) for t in batch]
    ids, attention = (torch.tensor(x, device=model.device) for x in (rows, mask))
    # The weights are whole on each rank: ranks with fewer batches than others must not be waited for at each token.
    rows = model.generate(input_ids=ids, attention_mask=attention, max_new_tokens=limit, synced_gpus=False)
    return rows[:, longest:].tolist()


def text_of(ids: list[int], tokenizer) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True).strip().translate(CONTROL)
