"""TRL's `trl sft`, as scripts/iterate.py starts it: python scripts/sft.py --config SFT.yaml ...

The same arguments, the same training. It ends with the process that started it: a loop that was killed leaves none
behind that would write into the folder of the next start.
"""

import runpy

import _clone  # noqa: F401

from mdpo.runs.preemption import end_with_parent

if __name__ == "__main__":
    end_with_parent()
    runpy.run_module("trl.scripts.sft", run_name="__main__", alter_sys=True)
