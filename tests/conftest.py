"""Nothing that a test run leaves behind is met by another one, or by a user: caches go to a folder of their own."""

import atexit
import os
import shutil
import tempfile

import pytest

if "MDPO_TEST_HF_HOME" not in os.environ:  # set by a parent test run that starts processes
    os.environ["MDPO_TEST_HF_HOME"] = tempfile.mkdtemp(prefix="mdpo-tests-")
    atexit.register(shutil.rmtree, os.environ["MDPO_TEST_HF_HOME"], ignore_errors=True)
os.environ["HF_HOME"] = os.environ["MDPO_TEST_HF_HOME"]


def pytest_collection_modifyitems(items):
    """Tests that need a GPU are skipped by name where there is none."""
    import torch  # after HF_HOME is set

    needs = [item for item in items if item.get_closest_marker("gpu")]
    if needs and not torch.cuda.is_available():
        for item in needs:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU (bash benchmarks/gpu_check.sh runs it)"))
