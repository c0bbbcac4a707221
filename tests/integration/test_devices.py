"""device_steps.py in a process of its own: autograd counts devices once, at its first backward, and a stand-in
for a GPU that comes later has no queue."""

import os
import re
import subprocess
import sys

import pytest
from repository import ROOT


@pytest.mark.parametrize(("tier", "least"), [("not slow", 19), pytest.param("slow", 24, marks=pytest.mark.slow)])
def test_the_whole_step_on_a_gpu_that_is_not_there(tier, least):
    steps = "tests/helpers/device_steps.py"
    command = [sys.executable, "-m", "pytest", steps, "-q", "-m", tier, "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= least and "skipped" not in done.stdout
