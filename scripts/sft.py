"""TRL's `trl sft`, as scripts/iterate.py starts it: python scripts/sft.py --config SFT.yaml ...

The same arguments, the same training. It ends with the process that started it: a loop that was killed leaves none
behind that would write into the folder of the next start.
"""

import ctypes
import runpy

import _clone  # noqa: F401
import torch

from mdpo.runs.preemption import end_with_parent

MALLOPT = {-3: 1 << 30, -1: (1 << 31) - 1, -2: 1 << 26}  # bytes: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD


def keep_freed_memory() -> None:
    """On a CPU: glibc gives large blocks back at each free, and TRL's steps then wait for the pages of their logits."""
    libc = ctypes.CDLL(None)
    if not torch.cuda.is_available() and hasattr(libc, "mallopt"):
        for option, value in MALLOPT.items():
            libc.mallopt(option, value)


if __name__ == "__main__":
    end_with_parent()
    keep_freed_memory()
    runpy.run_module("trl.scripts.sft", run_name="__main__", alter_sys=True)
