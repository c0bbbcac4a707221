"""Nothing that a test run leaves behind is met by another one, or by a user: caches go to a folder of their own."""

import ast
import atexit
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

pytest.register_assert_rewrite(
    "generated", "launches", "mask_checks", "packed_pairs", "segments", "slurm_job", "trainers", "varlen_stand_ins"
)
TESTS = Path(__file__).parent
PRETRAINED = re.compile(r"test_expected\.py|test_own_trajectories\.py|_with_a_pretrained_model\b")

if "MDPO_TEST_HF_HOME" not in os.environ:  # set by a parent: a test that starts processes, or the first of pytest -n
    os.environ["MDPO_TEST_HF_HOME"] = tempfile.mkdtemp(prefix="mdpo-tests-")
    atexit.register(shutil.rmtree, os.environ["MDPO_TEST_HF_HOME"], ignore_errors=True)
# Each worker of pytest -n has caches of its own; DeepSpeed's operator is built once for all of them.
os.environ["HF_HOME"] = os.path.join(os.environ["MDPO_TEST_HF_HOME"], os.environ.get("PYTEST_XDIST_WORKER", "main"))
os.environ.setdefault("MDPO_TEST_EXTENSIONS", os.path.join(os.environ["MDPO_TEST_HF_HOME"], "extensions"))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers share the cores; and several threads add up in any order


def build_operator() -> Path:
    """Builds DeepSpeed's operator where it is not there yet, and waits for another process that builds it."""
    from filelock import FileLock

    folder = Path(os.environ["MDPO_TEST_EXTENSIONS"])
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "workers.lock"):
        if not list(folder.glob("**/deepspeed_shm_comm.so")):
            build = (
                "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder as Builder; Builder().load(verbose=False)"
            )
            own = {"TORCH_EXTENSIONS_DIR": str(folder), "DS_ACCELERATOR": "cpu"}
            subprocess.run([sys.executable, "-c", build], env={**os.environ, **own}, check=True, capture_output=True)
    return folder


def pytest_sessionstart(session):
    """A minute of one core, which the workers of a whole tier do not wait for."""
    workers = getattr(session.config.option, "numprocesses", None) and not hasattr(session.config, "workerinput")
    if workers and [Path(argument).resolve() for argument in session.config.args] == [TESTS]:
        threading.Thread(target=build_operator, daemon=True).start()


@pytest.fixture(scope="session")
def extensions() -> Path:
    """Where DeepSpeed's operator is built before the first launch; no lock of a user's build can be met there."""
    return build_operator()


@pytest.fixture
def tokenizer():
    """ChatML's, of a few hundred tokens. Modules of other tokenizers have a fixture of this name themselves."""
    from tiny import CHATML, tokenizer_for  # after HF_HOME is set

    return tokenizer_for(CHATML, "byte", eos="<|im_end|>")


def pytest_collection_modifyitems(items):
    """Tests that need a GPU are skipped by name where there is none. The longest group of tests begins first."""
    items.sort(key=lambda item: not PRETRAINED.search(item.nodeid))
    import torch  # after HF_HOME is set

    needs = [item for item in items if item.get_closest_marker("gpu")]
    if needs and not torch.cuda.is_available():
        for item in needs:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU (bash benchmarks/gpu_check.sh runs it)"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file's tests stay with one worker, and all that train a pretrained model with the same one: gigabytes each."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return "pretrained" if PRETRAINED.search(nodeid) else super()._split_scope(nodeid)

    return ByFile(config, log)


def functions(folder: str) -> int:
    """Test functions of a folder, told without an import."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (TESTS / folder).glob("test_*.py")]
    return sum(isinstance(n, ast.FunctionDef) and n.name.startswith("test_") for tree in trees for n in ast.walk(tree))


def pytest_terminal_summary(terminalreporter, config):
    """`make quick` says what it has not looked at."""
    if [Path(argument).resolve() for argument in config.args] == [TESTS / "unit"]:
        left = ", ".join(f"{functions(folder)} in {folder}" for folder in ("integration", "faults"))
        terminalreporter.write_line(f"left out: test functions, {left}, and slow ones: make test, make test-slow")
