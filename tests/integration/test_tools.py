"""What is needed, and when: scripts/dev/check_tools.sh, which `make` runs before it installs anything; imports."""

import os
import subprocess
import sys

import pytest
from repository import ROOT


@pytest.mark.parametrize(("version", "code"), [("3.10", 1), ("3.11", 0), ("3.12", 1), ("", 1)])
def test_python_is_3_11(version, code, tmp_path):
    python = tmp_path / "python"  # answers with that version, and else is this one
    python.write_text(
        f'#!/bin/sh\ncase "$2" in *version_info*) echo {version} ;; *) exec {sys.executable} "$@" ;; esac\n'
    )
    python.chmod(0o755)
    command = ["sh", str(ROOT / "scripts/dev/check_tools.sh")]
    env = {**os.environ, "PYTHON": str(python), "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (done.returncode, "missing: Python 3.11, found" in done.stderr) == (code, bool(code)), done.stderr
    assert (f"found '{version or 'none'}'" in done.stderr) == bool(code)


def test_errors_and_console_need_no_torch():
    script = (
        "import sys; from mdpo import errors, console, storage; print({'torch', 'transformers'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"
