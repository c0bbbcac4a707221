"""Sides as they were sampled: `{"messages": …, "sequences": [{"input_ids", "assistant_masks", "logprobs"}, …]}`.
Nothing here knows a tokenizer: `mdpo.masking.recorded` compares the ids with its vocabulary."""

import json
import re
from collections.abc import Callable
from math import isfinite
from typing import Any

from mdpo.data.columns import Row, role_of, unwrapped
from mdpo.data.json_texts import kind_of, parsed
from mdpo.data.turn_weights import turn_weight
from mdpo.errors import DropPair
from mdpo.masking.recorded import NOT_COMPARED
from mdpo.types import SIDES, Pair, RecordedSide

READ = ("input_ids", "assistant_masks", "attention_mask")
ROUNDING = 1e-3  # of log-probs of nearly certain tokens
ANSWER = [{"role": "assistant", "content": "…"}]  # stands behind a prompt whose sides have no messages
Reader = Callable[[Any, Any], Pair]  # the two sides, as a row without sequences would have them


def recorded_pair(row: Row, read: Reader, of_row: dict[str, Any]) -> Pair:
    """A pair of which one side or both are recorded. `row` is what `as_preference` makes of it; `of_row` has the pair's
    fields that both kinds of sides have. Where both are recorded, messages are for comparison only: that they cannot be
    read is a remark. Raises DropPair."""
    recorded, unread = {}, dict[str, None]()
    for name, sequences in row["recorded"].items():
        _refuse_turn_weights(row[name], name)
        recorded[name] = RecordedSide(read_sequences(sequences, name, unread))
    pair, compared = _with_messages(row, read, set(recorded))
    if len(recorded) == len(SIDES):  # nothing of the messages is trained on
        pair.remarks, pair.unread = [r for r in pair.remarks if r.startswith(NOT_COMPARED)], []
    for name, side in recorded.items():
        side.compared = name in compared
    vars(pair).update(of_row)
    pair.unread = [*pair.unread, *unread]
    pair.recorded = (recorded.get("chosen"), recorded.get("rejected"))
    return pair


def _with_messages(row: Row, read: Reader, recorded: set[str]) -> tuple[Pair, set[str]]:
    """(The pair of the messages that there are, the sides whose own they are). A side that is not recorded is read
    beside the other's messages if they make a pair, else by itself."""
    own = {name: row[name] for name in SIDES if row[name]}
    rendered = [name for name in SIDES if name not in recorded]
    if rendered and not own.keys() >= set(rendered):
        raise DropPair(f"not a pair: {rendered[0]} is empty or null, beside recorded sequences")
    whys: list[str] = []
    for names in (list(SIDES), *([name] for name in rendered or SIDES)):
        if not own.keys() >= set(names):
            continue
        try:
            pair = read(own[names[0]], own[names[-1]])
        except DropPair as reason:
            if names == rendered:
                raise DropPair(re.sub("^chosen", names[0], str(reason)), reason.key) from None
            whys.append(f"{NOT_COMPARED}: {reason.key}")
        else:
            if isinstance(pair.chosen, str):
                raise DropPair(f"plain texts beside recorded sequences: write messages into {names[-1]}")
            pair.remarks += whys[:1]
            return pair, set(names)
    return _of_prompt(read, whys[:1]), set()


def _of_prompt(read: Reader, remarks: list[str]) -> Pair:
    """A pair whose messages are those of the prompt, which say what is held out together, or none."""
    try:
        pair = read(ANSWER, ANSWER)
    except DropPair:
        return Pair([], [], 0, remarks=remarks)
    prompt = pair.chosen[: pair.n_prompt]
    return Pair(prompt, prompt, pair.n_prompt, remarks=remarks)


def read_sequences(value: Any, name: str, unread: dict[str, None]) -> list[tuple[list[int], list[int]]]:
    """(ids, mask) of each sequence; fields that nothing reads are named in `unread`. Raises DropPair."""
    sequences = parsed(value, f"{name}: sequences")
    if not isinstance(sequences, list) or not sequences:
        raise DropPair(f"{name}: sequences is {'empty' if sequences == [] else kind_of(sequences)}, not a list of them")
    read = []
    for number, sequence in enumerate(sequences, 1):
        try:
            read.append(_read(sequence))
        except DropPair as reason:
            raise DropPair(f"{name}, sequence {number}: {reason}", reason.key) from None
        unread |= {f"sequences.{field}": None for field, value in sequence.items() if value is not None}
    for field in READ:
        unread.pop(f"sequences.{field}", None)
    return read


def _read(sequence: Any) -> tuple[list[int], list[int]]:
    if not isinstance(sequence, dict):
        raise DropPair(f"{kind_of(sequence)} in place of a sequence")
    ids, mask = (_list(sequence, name) for name in READ[:2])
    if not ids:
        raise DropPair("input_ids is empty")
    _refuse(ids, "input_ids", lambda i: type(i) is int, "not a whole number")
    _refuse_length(mask, "assistant_masks", ids)
    _refuse(mask, "assistant_masks", lambda m: m in (0, 1), "neither 0 nor 1")
    if mask[0]:
        raise DropPair("assistant_masks: the first token is supervised, and nothing predicts it")
    if not any(mask):
        raise DropPair("assistant_masks: no token is supervised")
    if sequence.get("attention_mask") is not None:
        padding = _list(sequence, "attention_mask")
        _refuse_length(padding, "attention_mask", ids)
        _refuse(padding, "attention_mask", lambda m: m == 1, "not 1: take the padding out")
    if sequence.get("logprobs") is not None:
        _refuse_logprobs(_list(sequence, "logprobs"), ids, mask)
    return ids, [int(m) for m in mask]


def _refuse_logprobs(logprobs: list, ids: list[int], mask: list[int]) -> None:
    """Nats, one for each token, none above 0 but for rounding. Servers have none where nothing was sampled: null."""
    _refuse_length(logprobs, "logprobs", ids)
    given = [0.0 if x is None and not m else x for x, m in zip(logprobs, mask, strict=True)]
    _refuse(given, "logprobs", finite, "not a finite number")
    sampled = [x if m else 0.0 for x, m in zip(given, mask, strict=True)]
    _refuse(sampled, "logprobs", lambda x: x <= ROUNDING, "above 0: a probability above 1")


def finite(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 1e308 and isfinite(x)


def _list(sequence: dict[str, Any], name: str) -> list:
    value = sequence.get(name)
    if not isinstance(value, list):
        raise DropPair(f"{name} is {kind_of(value)}, not a list")
    return value


def _refuse_length(values: list, name: str, ids: list[int]) -> None:
    if len(values) != len(ids):
        raise DropPair(f"{name}: {len(values)} entries beside {len(ids)} of input_ids")


def _refuse(values: list, name: str, good: Callable[[Any], bool], why: str) -> None:
    """Raises DropPair that names the first value which is not good, from 1."""
    for t, value in enumerate(values, 1):
        if not good(value):
            raise DropPair(f"{name}: token {t} has {json.dumps(value, default=str)[:20]}, {why}")


def _refuse_turn_weights(side: Any, name: str) -> None:
    """What messages say about how much of them is learned cannot be carried over to tokens. Raises DropPair."""
    messages, _ = unwrapped(side)
    for number, message in enumerate(messages if isinstance(messages, list) else [], 1):
        if role_of(message) == "assistant" and turn_weight(dict(message), "assistant", {}) not in (None, 1):
            raise DropPair(
                f"{name}, message {number}: weight or loss beside recorded sequences: say it in assistant_masks"
            )
