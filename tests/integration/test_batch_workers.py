"""A PairBatch comes out of a data loader's worker process as the collator made it."""

import pytest
import torch
from datasets import Dataset
from packed_pairs import pair
from torch.utils.data import DataLoader

from mdpo.forward.collators import PackedCollator, PairCollator
from mdpo.types import PairBatch


@pytest.mark.parametrize("collator", [PackedCollator(), PairCollator(0)], ids=["packed", "padded"])
def test_dataloader_workers(collator):
    rows = [pair(9, 7, 5), pair(1, 5, 3)]
    (found,) = DataLoader(Dataset.from_list(rows), 2, collate_fn=collator, num_workers=1)
    wanted = collator(rows)
    assert type(found) is PairBatch and list(found) == list(wanted)
    for name, value in wanted.items():
        assert torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value, name
