"""What ranks tell each other, and how a run ends when one of them fails: two real processes, without a launcher that
would end one for the other."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from repository import ROOT
from tiny import CHATML, agent_rows, tiny_llama, tokenizer_for

from mdpo import ranks
from mdpo.errors import Preempted
from mdpo.loss.metrics import mean_over_steps, of_all_ranks
from mdpo.ranks import gathered, gathered_tensor, pickled, shares

SECONDS = 60  # far from any limit of a process group or a launcher, far above what it takes on a busy machine


def cases(folder: Path, *wanted: tuple[str, str, list[str]]) -> dict[str, list]:
    """name -> for each rank [exit code, seconds since the cause, output]."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/helpers/ranks_worker.py"), str(folder), json.dumps(wanted)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        cwd=ROOT, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: json.loads((folder / f"{name}.json").read_text()) for name, *_ in wanted}


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    wanted = [("talk", "talk", []), ("plain", "plain_wait", []), ("together", "together", [])]
    wanted += [("hangs", "hangs_at_exit", []), ("shared", "unshared", []), ("unshared", "unshared", ["1"])]
    wanted += [
        (f"{who}-{where}-{kind}", "alone", [who, where, kind])
        for who, where, kind in (
            ("1", "collective", "user"),
            ("1", "store", "bug"),
            ("1", "computing", "bug"),
            ("0", "computing", "user"),
        )
    ]
    return cases(tmp_path_factory.mktemp("talks"), *wanted)


def test_ranks_talk_and_wait_longer_than_their_group(talks):
    """3 s of one rank over a group of 1 s, which the control shows to be one."""
    assert [rank[0] for rank in talks["talk"]] == [0, 0], talks["talk"]
    first, second = (json.loads(rank[2].splitlines()[-1]) for rank in talks["talk"])
    said = [{"from": 0}, [1.0, 1.0], [[[0, 7]], [[1, 7]]], "01"]
    assert first[:4] == second[:4] == said
    assert first[4:8] == ["UserError: fix it"] * 2 + ["ValueError: a bug"] * 2
    assert second[4:8] == ["UserError: fix it"] * 2 + ["RankFailed: rank 0 failed: a bug"] * 2
    assert "a tensor on meta" in first[8] and first[8] == second[8]
    assert all(rank[0] for rank in talks["plain"])


@pytest.mark.parametrize("case", ["1-collective-user", "1-store-bug", "1-computing-bug", "0-computing-user"])
def test_the_error_of_one_rank_ends_all_with_its_message(case, talks):
    who, where, kind = case.split("-")
    mine, other = talks[case][int(who)], talks[case][1 - int(who)]
    assert mine[0] == other[0] == 1
    assert max(mine[1], other[1]) < SECONDS
    name = " [rank 1]" if who == "1" else ""
    told = f"\nerror{name}: only here.\nFix it.\n" if kind == "user" else f"\nerror{name}: ValueError('only here')\n"
    assert told in mine[2] and ("Traceback" in mine[2]) == (kind == "bug"), mine[2]
    assert "only here" not in other[2] and "Traceback" not in other[2], other[2]
    assert f"[rank {1 - int(who)}] ended: rank {who} on " in other[2]


def test_the_same_error_of_all_is_said_once(talks):
    first, second = talks["together"]
    assert first[0] == second[0] == 1 and max(first[1], second[1]) < SECONDS
    assert first[2].count("error: everywhere") == 1
    assert "everywhere" not in second[2] and "ended: rank" not in second[2]


def test_what_hangs_at_exit_keeps_nobody(talks):
    first, second = talks["hangs"]
    assert first[0] == second[0] == 1 and max(first[1], second[1]) < SECONDS
    assert "ValueError: only here" in second[2]


def test_a_folder_that_other_nodes_do_not_see_is_noticed_by_all(talks):
    assert [rank[0] for rank in talks["shared"]] == [0, 0], talks["shared"]
    assert "shared []" in talks["shared"][0][2]
    first, second = talks["unshared"]
    if "not allowed" in second[2]:
        pytest.skip("mounting a tmpfs is not allowed here")
    assert first[0] == second[0] == 1 and max(first[1], second[1]) < SECONDS
    assert "is not the folder that rank 1 (" in first[2], first[2]
    assert "Traceback" not in first[2] + second[2]


# ---------------------------------------------------------------------------------------------- trouble in a whole run


RECIPE = """
model_name_or_path: {folder}/model
dtype: float32
dataset_mixer: {{{folder}/pairs.jsonl: 1.0}}
max_length: 400
per_device_train_batch_size: 2
max_steps: 4
save_strategy: steps
save_steps: 2
dataset_num_proc: 1
disable_tqdm: true
report_to: none
bf16: false
use_cpu: true
"""
TROUBLES = {  # rank, flags, what that rank says
    "out_of_memory": ("1", [], "error [rank 1]: Out of memory: CUDA out of memory. Tried to …"),
    "collator": ("1", [], "error [rank 1]: KeyError('a column')"),
    "disk": ("1", [], "checkpoint-2 could not be written: [Errno 28] No space left on device"),
    "reference": (
        "1",
        ["--precompute_ref_log_probs", "--reference_cache_dir=cache"],
        "error [rank 1]: reference log-probs of train: not finite in",
    ),
    "tokenizing": ("0", [], "error: ValueError('a bug')"),
    "digests": ("0", [], "error: OSError(5, 'Input/output error')"),
}


@pytest.fixture(scope="module")
def troubles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("troubles")
    tokenizer = tokenizer_for(CHATML, "byte", eos="<|im_end|>")
    tiny_llama(tokenizer, seed=0).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in agent_rows(16)))
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder))
    (folder / "cases").mkdir()
    wanted = [
        (name, "training", [name, who, str(folder / "recipe.yaml"), f"--output_dir={folder}/{name}", *flags])
        for name, (who, flags, _) in TROUBLES.items()
    ]
    return cases(folder / "cases", *wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", TROUBLES)
def test_trouble_of_one_rank_ends_all_ranks_with_its_message(name, troubles):
    who, _, words = TROUBLES[name]
    mine, other = troubles[name][int(who)], troubles[name][1 - int(who)]
    assert "cause: " in mine[2], mine[2][-3000:]  # it really came to it
    assert mine[0] == other[0] == 1, mine[2][-2000:] + other[2][-2000:]
    assert max(mine[1], other[1]) < SECONDS
    assert words in mine[2], mine[2][-3000:]
    assert "Traceback" not in other[2] and f"ended: rank {who} on" in other[2], other[2][-3000:]


# ------------------------------------------------------------------------------------------------------ in one process


def test_a_request_to_leave_is_passed_on_as_one():
    """A rank that waits for rank 0's work leaves as rank 0 does, and does not fail."""

    class Store:
        def __init__(self):
            self.values = {}

        def set(self, key, value):
            self.values[key] = value

        def check(self, keys):
            return all(key in self.values for key in keys)

        def get(self, key):
            return self.values[key]

    def work():
        raise Preempted("SIGUSR1")

    store = Store()
    with pytest.raises(Preempted, match="SIGUSR1"):
        ranks._told(store, "agreed-0", work)
    with pytest.raises(Preempted, match="SIGUSR1"):
        ranks._heard(store, "agreed-0", 0)


def test_no_tensor_of_a_device_is_pickled():
    assert torch.equal(gathered([{"a": (torch.ones(2),)}])[0][0]["a"][0], torch.ones(2))

    class Inside:
        def __init__(self):
            self.weight = torch.nn.Parameter(torch.zeros(1, device="meta"))

    for value in (torch.zeros(1, device="meta"), [{"a": (1, torch.zeros(1, device="meta"))}], Inside().__dict__):
        with pytest.raises(TypeError, match="a tensor on meta"):
            pickled(value)


OF_OBJECTS = {"gather_object", "broadcast_object_list", "all_gather_object", "scatter_object_list", "send_object_list"}
WAITS = {"main_process_first", "local_main_process_first", "wait_for_everyone", "barrier", "monitored_barrier"}


def names_in(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        found |= {node.attr} if isinstance(node, ast.Attribute) else set()
        found |= {node.id} if isinstance(node, ast.Name) else set()
        found |= {alias.name for alias in node.names} if isinstance(node, ast.ImportFrom) else set()
    return found


def test_objects_and_long_waits_go_through_one_module():
    """Elsewhere an object might hold a GPU's tensor, and a wait would end after NCCL's half an hour."""
    files = [ROOT / "run_dpo.py", ROOT / "dpo_trainer.py", *(ROOT / "mdpo").glob("*.py"), *ROOT.glob("scripts/*.py")]
    assert OF_OBJECTS & names_in(ROOT / "mdpo/ranks.py") == {"all_gather_object"}
    for path in files:
        if path.name != "ranks.py":
            assert not (OF_OBJECTS | WAITS) & names_in(path), path


def test_shares_of_reading():
    sizes = {f"global_step2/zero_pp_rank_{r}_mp_rank_00_optim_states.pt": 100 for r in range(4)}
    sizes |= {f"model-{i}.safetensors": 50 for i in range(3)} | {"rng_state_3.pth": 1, "progress_11.pt": 1, "a.json": 2}
    found = shares(sizes, 4, 2)  # two nodes of two ranks
    assert sorted(name for names in found for name in names) == sorted(sizes)
    for r in range(4):
        assert f"global_step2/zero_pp_rank_{r}_mp_rank_00_optim_states.pt" in found[r]
    assert "rng_state_3.pth" in found[3] and len(found[2]) == 1
    weights = [sum(name.startswith("model") for name in names) for names in found]
    assert sorted(weights[:2]) == [1, 2] and weights[2:] == [0, 0]
    assert shares(sizes, 1, 1) == [sorted(sizes, key=found_first(sizes))]


def found_first(sizes):
    return lambda name: (("rank_0_" not in name), -sizes[name], name)


def test_tables_of_one_process_come_back_as_they_were():
    tables = [torch.rand(2, 14, dtype=torch.float64), torch.rand(1, 18, dtype=torch.float64)]
    found, counts = of_all_ranks(tables, [5, 3], "cpu")
    assert counts == [5, 3]
    assert [table.shape for table in found[0]] == [(2, 18), (1, 18)]
    assert torch.equal(found[0][0][:, :14], tables[0]) and torch.equal(found[0][1], tables[1])
    assert not found[0][0][:, 14:].any()
    assert mean_over_steps(of_all_ranks([], [], "cpu")[0]) == {}
    assert gathered_tensor(torch.ones(3)).shape == (1, 3)
