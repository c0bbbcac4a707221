"""Every loss in one process with 4 pairs a step, in two with 2 each and in two that share 4: the same weights after two
steps of SGD."""

import json
import os
import subprocess
import sys

import pytest
from repository import ROOT
from safetensors.torch import load_file
from tiny import CHATML, tiny_llama, tokenizer_for
from trainers import SMOOTHED, rows_with_margins

from mdpo.config.validation import ONLY_WITH
from mdpo.loss.registry import LOSSES
from mdpo.ranks import ROW_RANKS

# Sorted or averaged over one rank's batch, as in TRL: another split is another loss. TRL 1.16's bco_pair has no
# running mean any more, and kto_pair's estimates are gathered: both agree.
OF_THE_BATCH = {"aot", "aot_unpaired", "sft"}
RUNS = {
    name: {"loss_type": [name], "beta": 0.01, "label_smoothing": SMOOTHED.get(name, 0.0)}
    | ({"margin_scale": 1.0} if name in ONLY_WITH["margin_scale"] else {})
    for name in LOSSES
}
RUNS |= {"weighted": {"use_weighting": True}, "verbose": {"ld_alpha": 0.3}, "nll": {"nll_coefficient": 0.5}}
RUNS |= {"precomputed": {"precompute_ref_log_probs": True}, "stream": {"stream": True, "max_steps": 2}}
SHARDS = {"shards": {"stream": True, "shards": 4, "max_steps": 2}}  # in another order where each rank has shards


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folders of one process, of two, and of two that share each row."""
    command = ["tests/helpers/losses_worker.py"]
    two = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    folders = []
    for start, pairs, env in (([], 4, {}), (two, 2, {}), (two, 4, {ROW_RANKS: "2"})):
        folder = tmp_path_factory.mktemp("trained")
        runs = {name: {**options, "per_device_train_batch_size": pairs} for name, options in (RUNS | SHARDS).items()}
        done = subprocess.run(
            [sys.executable, *start, *command, str(folder), json.dumps(runs), json.dumps(rows_with_margins(8))],
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/helpers'}", "OMP_NUM_THREADS": "1"} | env,
            cwd=ROOT, capture_output=True, text=True, timeout=400,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        folders.append(folder)
    return folders


@pytest.mark.parametrize("name", RUNS)
def test_one_and_two_processes_agree(name, trained):
    agree(name, *trained[:2])


@pytest.mark.parametrize("name", RUNS | SHARDS)
def test_one_process_and_two_that_share_rows_agree(name, trained):
    """Those too that depend on the batch: it is the same."""
    agree(name, trained[0], trained[2], of_the_batch=set())


def agree(name, *folders, of_the_batch=OF_THE_BATCH):
    one, two = (load_file(folder / f"{name}.safetensors") for folder in folders)
    start = dict(tiny_llama(tokenizer_for(CHATML, "byte", eos="<|im_end|>"), initializer_range=0.1).named_parameters())
    apart = sum((two[n] - one[n]).norm() ** 2 for n in one) ** 0.5
    moved = sum((one[n] - start[n].detach()).norm() ** 2 for n in one) ** 0.5
    assert moved > 1e-5
    if name in of_the_batch:
        assert apart > 1e-4 * moved  # and so the comparison can tell
        return
    assert apart <= 1e-4 * moved
    logs = [json.loads((folder / f"{name}.json").read_text())[:2] for folder in folders]
    for a, b in zip(*logs, strict=True):
        of_time = {k for k in a if "runtime" in k}
        assert 0 < a.pop("num_distinct_tokens", 1) <= b.pop("num_distinct_tokens", 1)  # more pairs in a row share more
        assert {k: v for k, v in a.items() if k not in of_time} == pytest.approx(b, rel=1e-3, abs=1e-3)


def test_a_stream_is_evaluated_in_two_processes_as_in_one(trained):
    """Each of the 8 pairs once, whatever the last batch is filled up with."""
    one, *others = (
        next(log for log in json.loads((folder / "stream.json").read_text()) if "eval_loss" in log)
        for folder in trained
    )
    assert [log["eval_pairs"] for log in (one, *others)] == [8, 8, 8]
    same = lambda log: {k: v for k, v in log.items() if "second" not in k and "runtime" not in k}  # noqa: E731
    for two in others:
        assert same(two) == pytest.approx(same(one), rel=1e-4, abs=1e-4)
