"""PairBatch: its fields and no others, and everything that carries a batch from the collator to the loss."""

import copy
import itertools
import pickle
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import concatenate, find_batch_size, recursively_apply, send_to_device
from accelerate.utils.operations import get_data_structure, slice_tensors
from deepspeed.runtime.engine import DeepSpeedEngine
from errors import refused
from torch.distributed.utils import _to_kwargs
from torch.utils.data._utils.pin_memory import pin_memory
from transformers import Trainer, TrainingArguments

from dpo_trainer import DPOTrainer
from mdpo.forward.collators import PackedCollator, PairCollator
from mdpo.types import FIELDS, OPTIONAL, PairBatch, common_prefix, distinct_tokens, sequence_lengths, split

# Two pairs; the prefixes are [5, 6] and [3].
ROWS = [
    {
        "chosen_ids": [5, 6, 7, 8],
        "chosen_mask": [0, 1, 1, 1],
        "chosen_weights": [0.0, 1.0, 0.5, 0.5],
        "rejected_ids": [5, 6, 9],
        "rejected_mask": [0, 1, 1],
        "rejected_weights": [],
        "reference_chosen_logps": [-1.0, -2.0, -3.0],
        "reference_rejected_logps": [-4.0, -5.0],
        "margin": 0.25,
        "weight": 2.0,
        "row": 4,
    },
    {
        "chosen_ids": [3, 4],
        "chosen_mask": [0, 1],
        "chosen_weights": [],
        "rejected_ids": [3, 5, 6],
        "rejected_mask": [0, 0, 1],
        "rejected_weights": [],
        "reference_chosen_logps": [-6.0],
        "reference_rejected_logps": [-7.0],
        "margin": 0.5,
        "row": 7,
    },
]
COLLATORS = {"padded": PairCollator(0), "packed": PackedCollator()}
ONLY_PADDED, ONLY_PACKED = (
    {"attention_mask", "completion_mask"},
    {"position_ids", "runs", "ends", "unique_index", "sequence", "sequence_position"},
)


@pytest.fixture(params=COLLATORS)
def batch(request) -> PairBatch:
    return COLLATORS[request.param](ROWS)


def same(found, wanted) -> None:
    """The same type, keys in the same order, values and dtypes."""
    assert type(found) is type(wanted) is PairBatch and list(found) == list(wanted)
    for name, value in wanted.items():
        if isinstance(value, torch.Tensor):
            assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
        else:
            assert found[name] == value, name


# -------------------------------------------------------------------------------------------------------------- fields


def test_both_layouts_have_every_field_but_the_others_own():
    padded, packed = (collator(ROWS) for collator in COLLATORS.values())
    fields = set(FIELDS) - {"spread"}  # of rows that ranks share, from the layout's fit
    assert set(padded) == fields - ONLY_PACKED and set(packed) == fields - ONLY_PADDED
    assert (padded.is_packed, packed.is_packed) == (False, True)


def test_shapes_and_dtypes_are_those_that_the_class_states():
    """By hand: B 2, T 4, N 5 + 4, S 7, U 6 (token 6 of the first pair stands once), K 1."""
    shapes = {
        **dict.fromkeys(("pair", "side", "turn", "turn_weight", "reference_logp"), (7,)),
        **{"turn_tokens": (4, 1), "margin": (2,), "pair_weight": (2,), "row": (2,)},
    }
    padded = {**dict.fromkeys(("input_ids", "attention_mask", "completion_mask"), (4, 4)), **shapes}
    padded |= {"logp_position": (7,), "label": (7,)}
    packed = {"input_ids": (1, 9), "position_ids": (1, 9), "logp_position": (6,), "label": (6,), **shapes}
    packed |= {"unique_index": (7,), "sequence": (7,), "sequence_position": (7,)}
    floats = {"turn_weight", "reference_logp", "margin", "pair_weight"}
    for layout, wanted in (("padded", padded), ("packed", packed)):
        tensors = {k: x for k, x in COLLATORS[layout](ROWS).items() if isinstance(x, torch.Tensor)}
        assert {k: tuple(x.shape) for k, x in tensors.items()} == wanted
        assert {k for k, x in tensors.items() if x.dtype == torch.float32} == floats
        assert {x.dtype for k, x in tensors.items() if k not in floats} == {torch.int64}


def test_numbers_by_hand(batch):
    """Lengths 4 + 3 and 2 + 3; chosen 0 has 3 supervised tokens, chosen 1 one, rejected 0 two, rejected 1 one."""
    assert (batch.n_pairs, batch.pair_lengths, batch.n_tokens) == (2, [7, 5], 12)
    assert batch.sequence_of_token.tolist() == [0, 0, 0, 1, 2, 2, 3]
    labels = batch.label[batch.unique_index] if batch.is_packed else batch.label
    assert labels.tolist() == [6, 7, 8, 4, 6, 9, 6]
    assert batch.input_ids.flatten()[batch.logp_position].tolist()[:3] == [5, 6, 7]  # what predicts them


def test_a_foreign_batch_without_lengths_counts_its_mask():
    padded = COLLATORS["padded"](ROWS)
    del padded["lengths"]
    assert padded.lengths is None and padded.pair_lengths == [7, 5]


def test_each_field_is_an_attribute(batch):
    for name, value in batch.items():
        assert getattr(batch, name) is value
    assert PairBatch().turn_weight is None and len(OPTIONAL) == 11


def test_a_field_of_the_other_layout_is_an_error():
    with pytest.raises(AttributeError, match="a padded batch that lacks 'runs'"):
        _ = COLLATORS["padded"](ROWS).runs
    with pytest.raises(AttributeError, match="a packed batch that lacks 'attention_mask'"):
        _ = COLLATORS["packed"](ROWS).attention_mask


@pytest.mark.parametrize(
    "write",
    [
        lambda batch: PairBatch(score=1),
        lambda batch: PairBatch({"score": 1}),
        lambda batch: batch.update(score=1),
        lambda batch: batch.setdefault("score", 1),
        lambda batch: batch.__setitem__("score", 1),
        lambda batch: batch.__ior__({"score": 1}),
        lambda batch: batch | {"score": 1},
    ],
)
def test_an_unknown_field_is_an_error(write, batch):
    before = dict(batch)
    with pytest.raises(KeyError, match="PairBatch has no field 'score'; it has input_ids, logp_position, label"):
        write(batch)
    assert dict(batch) == before


def test_no_attribute_can_be_set_beside_the_keys(batch):
    for name in ("margin", "score"):
        with pytest.raises(AttributeError):
            setattr(batch, name, 1)
    with pytest.raises(AttributeError, match="no field 'score'"):
        _ = batch.score
    assert not hasattr(batch, "pin_memory")  # torch would call it


def test_changes_make_another_batch(batch):
    changed = batch | {"margin": torch.ones(2)}
    assert type(changed) is PairBatch and changed.margin.tolist() == [1, 1] and batch.margin.tolist() == [0.25, 0.5]
    changed |= {"margin": torch.zeros(2)}
    assert type(changed) is PairBatch and changed.margin.tolist() == [0, 0]
    same(batch.copy(), batch)
    assert batch.copy() is not batch


# ---------------------------------------------------------------------------------------------------- other collators


def test_a_batch_with_trls_keys_gets_what_follows_from_its_mask():
    padded = COLLATORS["padded"](ROWS)
    foreign = {name: padded[name] for name in ("input_ids", "attention_mask", "completion_mask")}
    found = PairBatch.of({**foreign, "ref_chosen_logps": torch.zeros(2)})
    assert set(found) == {*foreign, "logp_position", "label", "pair", "side"}
    same(found, PairBatch({name: padded[name] for name in found}))
    assert (found.row, found.turn, found.margin) == (None, None, None)
    assert PairBatch.of(padded) is padded  # ours are not made anew
    same(PairBatch.of({**padded, "mine": 1}), padded)


@pytest.mark.parametrize("lacks", ["input_ids", "completion_mask"])
def test_a_batch_of_another_kind_is_refused(lacks):
    padded = COLLATORS["padded"](ROWS)
    foreign = {name: padded[name] for name in ("input_ids", "attention_mask", "completion_mask") if name != lacks}
    with refused("data_collator", "input_ids, attention_mask and completion_mask"):
        PairBatch.of(foreign)


# ------------------------------------------------------------------------------------------------------------ carriers


def test_copies_and_pickles(batch):
    for found in (copy.copy(batch), copy.deepcopy(batch), pickle.loads(pickle.dumps(batch))):
        same(found, batch)
    assert copy.copy(batch).margin is batch.margin and copy.deepcopy(batch).margin is not batch.margin


def test_pinned_memory(batch, monkeypatch):
    """torch copies a mapping and updates the copy. A CPU has no pinned memory: a clone stands in for it."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self.clone())
    found = pin_memory(batch)
    same(found, batch)
    assert all(found[k] is not x for k, x in batch.items() if isinstance(x, torch.Tensor))


def test_accelerate(batch):
    """`recursively_apply` is what gather, broadcast and pad_across_processes are made of; the dispatching loader takes
    a batch's structure, slices and joins."""
    same(send_to_device(batch, torch.device("cpu"), non_blocking=True), batch)
    on_meta = send_to_device(batch, torch.device("meta"))
    assert type(on_meta) is PairBatch and on_meta.margin.device.type == "meta" and batch.margin.device.type == "cpu"
    assert on_meta.is_packed == batch.is_packed and on_meta.pair.shape == batch.pair.shape
    plus_one = recursively_apply(lambda x: x + 1, batch)
    assert type(plus_one) is PairBatch and torch.equal(plus_one.label, batch.label + 1)
    assert type(get_data_structure(batch)) is PairBatch
    assert find_batch_size(batch) == len(batch.input_ids)
    tensors = PairBatch({k: x for k, x in batch.items() if isinstance(x, torch.Tensor)})
    halves = [slice_tensors(tensors, slice(0, 1)), slice_tensors(tensors, slice(1, None))]
    same(concatenate(halves), tensors)


def test_trainer_moves_it_and_keeps_the_dtype_of_its_numbers(batch, tmp_path):
    """Trainer's own `_prepare_input` casts to DeepSpeed's dtype; ours does not."""
    trainer = object.__new__(DPOTrainer)
    trainer.args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    trainer.is_deepspeed_enabled = True
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(dtype=lambda: torch.bfloat16))
    trainer.accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    same(trainer._prepare_inputs(batch), batch)
    cast = Trainer._prepare_input(trainer, batch.margin)
    assert cast.dtype == torch.bfloat16  # or the test would say nothing


def test_torch_and_deepspeed_hand_it_on_as_a_dict(batch):
    (moved,), _ = _to_kwargs((batch,), {}, torch.device("cpu"), False)
    same(moved[0], batch)
    half = DeepSpeedEngine._cast_inputs_half(
        object.__new__(DeepSpeedEngine), PairBatch(margin=batch.margin, row=batch.row)
    )
    assert (half["margin"].dtype, half["row"].dtype) == (torch.float16, torch.int64)


@pytest.mark.parametrize(
    "sequences, distinct",
    [
        ([[5, 6, 7], [5, 8], [5, 6]], 4),
        ([[1, 2], [1, 2]], 2),
        ([[1], [2]], 2),
        ([[1, 2, 3]], 3),
        ([[1, 2, 3], [4, 2, 3], [1, 2, 4]], 7),
        ([[10, 2], [9, 1], [10]], 4),
    ],
)
def test_distinct_tokens(sequences, distinct):
    assert (
        distinct_tokens(sequences) == distinct == len({tuple(s[:n]) for s in sequences for n in range(1, len(s) + 1)})
    )


def test_split_by_sequences():
    assert split([5, 6, 7], [2, 1]) == [[5, 6], [7]]
    row = {"chosen_ids": [5, 6, 7], "chosen_lengths": [2, 1], "rejected_ids": [5, 6], "rejected_lengths": []}
    assert [sequence_lengths(row, side) for side in ("chosen", "rejected")] == [[2, 1], [2]]


def test_a_common_prefix_is_that_of_item_by_item():
    for a, b in itertools.product((list(w) for n in range(5) for w in itertools.product((0, 1), repeat=n)), repeat=2):
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
        assert common_prefix(a, b) == common_prefix("".join(map(str, a)), "".join(map(str, b))) == same
