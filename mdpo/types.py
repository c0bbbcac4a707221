"""The containers that are passed between the stages."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, get_args, get_type_hints

import numpy as np
from torch import Tensor

from mdpo.errors import UserError
from mdpo.sequences import common_prefix as common_prefix
from mdpo.sequences import distinct_tokens as distinct_tokens
from mdpo.sequences import sequence_lengths as sequence_lengths
from mdpo.sequences import split as split
from mdpo.sequences import turn_begins as turn_begins

SIDES = ("chosen", "rejected")
Message = dict[str, Any]  # role, content, and for tool use: tool_calls, name, tool_call_id


@dataclass
class RecordedSide:
    """A side as it was sampled: `sequences` are (ids, mask), a number a token each. `compared` says that the pair has
    this side's messages too, whose rendering should be the same."""

    sequences: list[tuple[list[int], list[int]]]
    compared: bool = False


@dataclass
class Pair:
    """One preference pair in messages (or plain strings), before any tokenizer.

    `chosen` and `rejected` are whole conversations: the prompt's messages first. `n_prompt` messages of them are
    context on both sides; their assistant turns are not supervised. `weights` has a number for each message of
    chosen and of rejected, empty lists where all are 1. `margin` is the row's, in units of reward. `remarks` name what
    the report counts of rows that are kept, `unread` the fields of messages that nothing reads. A side that is
    `recorded` is trained on as it is; its messages only say what it was, and may be those of the prompt alone, or none.
    """

    chosen: list[Message] | str
    rejected: list[Message] | str
    n_prompt: int  # messages; for plain strings, characters
    tools: list[Any] | None = None
    rejected_tools: list[Any] | None = None  # where the rejected side had other ones, [] where it had none
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    weights: tuple[list[float], list[float]] = ([], [])
    margin: float | None = None
    weight: float | None = None  # multiplies the pair's loss; None: 1
    prompt_given: bool = True  # in plain strings; else the prompt is what both sides begin with
    remarks: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    recorded: tuple[RecordedSide | None, RecordedSide | None] = (None, None)

    def side(self, name: str) -> "Pair":
        """The pair with that side's tools as `tools`."""
        other = name == "rejected" and self.rejected_tools is not None
        return replace(self, tools=self.rejected_tools or None) if other else self


@dataclass
class TokenizedPair:
    """Token ids and masks of one pair. `mask[t] == 1` where token t is supervised; `weights[t]` multiplies its log
    ratio, and the whole list is empty where all are 1.

    A side is one sequence or more, each a text as the model saw it: of several, `ids`, `mask` and `weights` have one
    behind the other, and `lengths` the tokens of each; it is empty where there is one. `breaks` says why each sequence
    after the first one begins. `distinct` counts the tokens of both sides, those that sequences begin with alike once:
    they are the nodes of the trie of all sequences. `longest` is the longest sequence before any cut; `cut` says that a
    turn was cut in its middle. `retokenized` has a number for each recorded side whose messages are rendered otherwise:
    how many tokens differ.
    Example: chosen_ids [1, 5, 6, 2] and rejected_ids [1, 5, 7, 2] begin with two tokens alike -> distinct 6.
    """

    chosen_ids: list[int]
    chosen_mask: list[int]
    rejected_ids: list[int]
    rejected_mask: list[int]
    chosen_weights: list[float] = field(default_factory=list)
    rejected_weights: list[float] = field(default_factory=list)
    chosen_lengths: list[int] = field(default_factory=list)
    rejected_lengths: list[int] = field(default_factory=list)
    chosen_breaks: list[str] = field(default_factory=list)
    rejected_breaks: list[str] = field(default_factory=list)
    distinct: int = 0
    longest: int = 0
    cut: bool = False
    remarks: list[str] = field(default_factory=list)  # as `Pair.remarks`
    retokenized: list[int] = field(default_factory=list)


class PairBatch(dict[str, Any]):
    """B pairs for the model and the loss, padded or packed. A dict, so that DataLoader, accelerate, transformers and
    DeepSpeed carry it; its keys are the fields below, any other one is a KeyError. Each is an attribute too: where a
    batch lacks it, None if the field is optional, else an AttributeError.

    A side is one sequence or more, M in all: those of chosen of pair 0 … B-1, then of rejected. T is the length of a
    padded row and N that of the packed one, in tokens; K is the most turns of a side. S counts the supervised tokens of
    all sequences, in their order; U ≤ S are those of the packed row, where one that sequences begin with alike occurs
    once; padded, U = S. Tensors are int64 unless said otherwise; lists stay on the host, where attention is planned.
    """

    __slots__ = ()  # `batch.margin = x` would hide the key

    input_ids: Tensor  # padded (M, T), a row for each sequence; packed (1, N)
    logp_position: Tensor  # (U,) each supervised token's predecessor, as an index into the flattened input_ids
    label: Tensor  # (U,) its id
    pair: Tensor  # (S,) its pair, 0 … B-1
    side: Tensor  # (S,) its side, 0 chosen, 1 rejected
    turn: Tensor | None  # (S,) its turn in its side, from 0
    turn_weight: Tensor | None  # (S,) float32, its turn's weight, only where one is not 1
    reference_logp: Tensor | None  # (S,) float32, nats, the reference's log-prob, only where precomputed
    turn_tokens: Tensor | None  # (2B, K) the tokens of each turn; a turn of weight 0 is none
    margin: Tensor | None  # (B,) float32, only where all rows have one
    pair_weight: Tensor | None  # (B,) float32, multiplies each pair's loss, only where one is not 1
    row: Tensor | None  # (B,) the pair's number in its dataset, -1 where it has none
    lengths: list[int] | None  # the tokens of each sequence, M numbers
    sequences: list[int] | None  # of each side, 2B numbers; a foreign collator's have one each
    # padded alone
    attention_mask: Tensor  # (M, T) 1 where a token is, 0 where padding
    completion_mask: Tensor | None  # (M, T) 1 where a token is supervised, in holes if need be
    # packed alone: the row is a token forest (`mdpo.forward.forest`)
    position_ids: Tensor  # (1, N) each token's depth
    runs: list[list[int]]  # of each run its tokens, and its parent's index in the row, -1 at a root
    ends: list[int]  # the index of each sequence's last token, M numbers
    unique_index: Tensor  # (S,) each supervised token's index among the U
    sequence: Tensor  # (S,) its sequence, 0 … M-1
    sequence_position: Tensor  # (S,) its predecessor's index in that sequence
    spread: Any | None  # where several ranks share the row: which has what (`mdpo.forward.sequence_parallel`)

    def __init__(self, fields: Mapping[str, Any] | Iterable[tuple[str, Any]] = (), **more: Any):
        super().__init__()
        self.update(fields, **more)

    @classmethod
    def of(cls, inputs: Mapping[str, Any]) -> "PairBatch":
        """From any collator's batch: of a padded one such as TRL's, our fields and those that follow from its
        completion_mask. Raises UserError where it has none."""
        batch = inputs if isinstance(inputs, cls) else cls({k: inputs[k] for k in inputs if k in FIELDS})
        if "logp_position" in batch:
            return batch
        if not {"input_ids", "completion_mask"} <= batch.keys():
            raise UserError(
                "data_collator: its batches need input_ids, attention_mask and completion_mask, as TRL's have."
            )
        return batch.with_labels()

    def with_labels(self) -> "PairBatch":
        """A padded batch with logp_position, label, pair and side from its completion_mask. A supervised token at the
        very start has no predecessor and is left out, as in every causal language model."""
        ids = self.input_ids
        rows, columns = self["completion_mask"][:, 1:].nonzero(as_tuple=True)  # column t predicts token t + 1
        sides = ids.new_tensor(self.sides)[rows]
        tokens = {"logp_position": rows * ids.size(1) + columns, "label": ids[rows, columns + 1]}
        return self | tokens | {"pair": sides % self.n_pairs, "side": sides // self.n_pairs}

    @property
    def is_packed(self) -> bool:
        return "runs" in self

    @property
    def n_pairs(self) -> int:
        return (self.input_ids.size(0) if self.sequences is None else len(self.sequences)) // 2

    @property
    def sides(self) -> list[int]:
        """The side of each sequence, M numbers: 0 … B-1 chosen, B … 2B-1 rejected."""
        counts = [1] * self.input_ids.size(0) if self.sequences is None else self.sequences
        return [side for side, n in enumerate(counts) for _ in range(n)]

    @property
    def n_tokens(self) -> int:
        """Tokens of all sequences of all pairs, the shared ones counted for each, padding not."""
        return sum(self.pair_lengths)

    @property
    def n_distinct(self) -> int:
        """Tokens that a forward computes, padding not counted."""
        return self.input_ids.size(1) if self.is_packed else self.n_tokens

    @property
    def pair_lengths(self) -> list[int]:
        """Tokens of all sequences of each pair, the shared ones counted for each."""
        lengths = self.attention_mask.sum(1).tolist() if self.lengths is None else self.lengths  # a foreign collator's
        return np.bincount(np.array(self.sides) % self.n_pairs, lengths, self.n_pairs).astype(int).tolist()

    @property
    def sequence_of_token(self) -> Tensor:
        """(S,) the side of each supervised token, as `sides` counts them."""
        return self.side * self.n_pairs + self.pair

    def to(self, device, non_blocking: bool = False) -> "PairBatch":
        """The batch with its tensors on a device."""
        moved = {k: x.to(device, non_blocking=non_blocking) for k, x in self.items() if isinstance(x, Tensor)}
        return self | moved

    # The rest of a dict's interface: everything that writes checks the names.

    def __getattr__(self, name: str) -> Any:
        if name in OPTIONAL:
            return self.get(name)
        if name in self:
            return self[name]
        kind = f"a {'packed' if self.is_packed else 'padded'} batch that lacks" if name in FIELDS else "no field"
        raise AttributeError(f"PairBatch: {kind} {name!r}", name=name, obj=self)

    def __setitem__(self, name: str, value: Any) -> None:
        if name not in FIELDS:
            raise KeyError(f"PairBatch has no field {name!r}; it has {', '.join(FIELDS)}")
        super().__setitem__(name, value)

    def update(self, fields: Mapping[str, Any] | Iterable[tuple[str, Any]] = (), **more: Any) -> None:  # type: ignore[override]
        for name, value in dict(fields, **more).items():
            self[name] = value

    def setdefault(self, name: str, value: Any = None) -> Any:
        if name not in self:
            self[name] = value
        return self[name]

    def copy(self) -> "PairBatch":
        return PairBatch(self)

    def __or__(self, fields: Mapping[str, Any]) -> "PairBatch":  # type: ignore[override]
        return PairBatch({**self, **fields})

    def __ior__(self, fields: Mapping[str, Any]) -> "PairBatch":  # type: ignore[override]
        self.update(fields)
        return self


FIELDS: dict[str, Any] = {k: hint for k, hint in get_type_hints(PairBatch).items() if not k.startswith("_")}
OPTIONAL = {name for name, hint in FIELDS.items() if type(None) in get_args(hint)}


@dataclass
class PairLogps:
    """Log-probs of B pairs, each token's times its weight, summed over supervised tokens: float64, nats, shape (B,).
    Token counts are of supervised tokens whose turn's weight is not 0: int64, shape (B,)."""

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
