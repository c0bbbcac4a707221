"""What choosing pairs needs of a trajectory: numbers, digests, and where the rest is on the disk. A stage may have tens
of GB of messages and token ids."""

import json
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from mdpo.types import Message

SIZE = 16  # bytes of a digest


@dataclass(frozen=True, slots=True)
class Scored:
    """One trajectory of anybody's. `length` is that of what the policy wrote: in sampled tokens, else in characters.
    `digest` is of all messages; `turns` has one of the messages up to and with each assistant's, the last message
    aside, and the first `history` of these are the prompt's. `place` is a file and a byte of it, for `row_at`."""

    reward: float
    length: int
    digest: bytes
    turns: tuple[bytes, ...] = ()
    history: int = 0
    place: tuple[Path, int] | None = field(default=None, compare=False)


def scored(messages: list[Message], reward: float, sequences: list[dict[str, list]], n_prompt: int = 0) -> Scored:
    """`n_prompt` messages came before the policy's first turn. Raises KeyError or TypeError where sequences have no
    masks."""
    turns, history, running = list[bytes](), 0, blake2b(digest_size=SIZE)
    for number, message in enumerate(messages):
        running.update(json.dumps(_alike(message), sort_keys=True).encode() + b"\n")
        if number < len(messages) - 1 and message.get("role") == "assistant":
            turns.append(running.digest())
            history += number < n_prompt
    if sequences:
        length = sum(sum(sequence["assistant_masks"]) for sequence in sequences)
    else:
        length = sum(len(json.dumps(m, ensure_ascii=False)) for m in messages if m.get("role") == "assistant")
    return Scored(reward, length, running.digest(), tuple(turns), history)


def _alike(value: Any) -> Any:
    """The value with the same text wherever Python's == says the same: True, 1 and 1.0 are 1."""
    if isinstance(value, dict):
        return {name: _alike(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_alike(one) for one in value]
    return int(value) if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()) else value


def same_turns(a: Scored, b: Scored) -> int:
    """The policy's turns that two trajectories begin with alike, and after which both went on."""
    alike = 0
    for one, other in zip(a.turns, b.turns, strict=False):
        if one != other:
            break
        alike += 1
    return max(0, alike - a.history)
