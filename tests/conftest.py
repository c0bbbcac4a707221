"""Nothing that a test run leaves behind is met by another one, or by a user: caches go to a folder of their own."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest

pytest.register_assert_rewrite(
    "generated", "launches", "mask_checks", "packed_pairs", "segments", "slurm_job", "trainers", "varlen_stand_ins"
)

if "MDPO_TEST_HF_HOME" not in os.environ:  # set by a parent test run that starts processes
    os.environ["MDPO_TEST_HF_HOME"] = tempfile.mkdtemp(prefix="mdpo-tests-")
    atexit.register(shutil.rmtree, os.environ["MDPO_TEST_HF_HOME"], ignore_errors=True)
os.environ["HF_HOME"] = os.environ["MDPO_TEST_HF_HOME"]


@pytest.fixture(scope="session")
def extensions(tmp_path_factory) -> Path:
    """Where DeepSpeed builds its operator in this session; nobody else's lock can be met there."""
    return Path(os.environ.get("MDPO_TEST_EXTENSIONS") or tmp_path_factory.mktemp("extensions"))


@pytest.fixture
def tokenizer():
    """ChatML's, of a few hundred tokens. Modules of other tokenizers have a fixture of this name themselves."""
    from tiny import CHATML, tokenizer_for  # after HF_HOME is set

    return tokenizer_for(CHATML, "byte", eos="<|im_end|>")


def pytest_collection_modifyitems(items):
    """Tests that need a GPU are skipped by name where there is none."""
    import torch  # after HF_HOME is set

    needs = [item for item in items if item.get_closest_marker("gpu")]
    if needs and not torch.cuda.is_available():
        for item in needs:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU (bash benchmarks/gpu_check.sh runs it)"))
