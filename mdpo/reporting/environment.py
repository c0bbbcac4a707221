"""The environment of a run: package versions, hardware, the commit of this repository."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "transformers", "trl", "accelerate", "deepspeed", "datasets", "peft", "numpy")
GIT_S = 20  # a status of a large tree on a slow disk


def versions() -> dict[str, str]:
    return {p: version(p) for p in PACKAGES} | {"python": platform.python_version()}


def hardware(processes: int) -> dict[str, Any]:
    """This machine's; `processes` counts those of the whole run. Memory in GB (1e9 bytes)."""
    cuda = torch.cuda.is_available()
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
        "processes": processes,
    }


def _processor() -> str:  # py-cpuinfo needs more than a second for it
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def repository(root: Path = ROOT) -> dict[str, Any]:
    """{"commit", "changed": whether tracked files differ from it}; {} outside a repository or without git."""
    if not (root / ".git").exists():  # an installed copy may be inside somebody else's repository
        return {}
    answers = []
    for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            done = subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True, timeout=GIT_S)
        except (OSError, subprocess.TimeoutExpired):
            return {}
        if done.returncode:
            return {}
        answers.append(done.stdout.strip())
    return {"commit": answers[0], "changed": bool(answers[1])}
