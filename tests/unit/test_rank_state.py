"""Each rank's state: parts by name, files of the older one-dict form, and a state that nothing takes."""

import pickle

import pytest
import torch
from errors import refused

from mdpo.forward.collators import PackedCollator
from mdpo.loss.metrics import COLUMNS
from mdpo.loss.pair_tables import OF_OLDER, PairTables
from mdpo.runs import rank_state
from mdpo.runs.nonfinite_guard import NonfiniteGuard

PENDING = {"evaluate": True, "epoch_end": False, "grad_norm": 1.5, "learning_rate": 1e-6}


class Counters:
    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def parts():
    tables = PairTables()
    return {"loss": Counters(), "tables": tables, "nonfinite": NonfiniteGuard(None, tables)}


@pytest.mark.parametrize("older", [False, True])
def test_a_state_comes_back(older, tmp_path):
    saved, file = parts(), tmp_path / rank_state.file_name(3)
    saved["loss"].state = {"loss": 0.25, "total_loss": 2.0, "logged_at": 4}
    pair = {"chosen_ids": [1, 2, 3, 4], "rejected_ids": [1, 2, 5], "chosen_mask": [0, 0, 1, 1],
            "rejected_mask": [0, 0, 1]}  # fmt: skip
    row = torch.arange(OF_OLDER if older else len(COLUMNS), dtype=torch.float64)[None]
    saved["tables"].append(row, training=True, batch=PackedCollator()([pair]))
    saved["nonfinite"].in_a_row, saved["nonfinite"].of_run, saved["nonfinite"]._logged_at = 1, 2, 4
    if older:
        one = {**saved["loss"].state, "tables": saved["tables"].train, "tokens": 7, "nonfinite": [1, 2]}
        torch.save({**one, "owed": PENDING}, file)
    else:
        rank_state.save(file, saved, PENDING)
    found = parts()
    assert rank_state.load(file, found) == PENDING
    assert found["loss"].state == saved["loss"].state
    assert found["tables"].tokens == 7 and found["tables"].distinct == (0 if older else 5)
    assert torch.equal(found["tables"].train[0][:, : row.size(1)], row)
    assert found["nonfinite"].state_dict() == {"in_a_row": 1, "of_run": 2, "logged_at": 4}


def test_a_state_that_nothing_takes_is_an_error(tmp_path):
    file = tmp_path / "progress_0.pt"
    torch.save({"parts": {"other": {}}, "pending": PENDING}, file)
    with refused("resume_from_checkpoint", "other"):
        rank_state.load(file, parts())


def test_arguments_of_older_runs_are_found():
    """`training_args.bin` names the class by the module that it once was in."""
    from mdpo.config.schema import MDPOConfig

    assert pickle.loads(b"cmdpo.config\nMDPOConfig\n.") is MDPOConfig
