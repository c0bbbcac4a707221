"""Several runs of run_dpo.py in the processes of one launch: accelerate launch … several_runs.py RUNS.json

RUNS.json: [[name, [argument, …]], …]."""

import json
import sys
from pathlib import Path

from accelerate.state import AcceleratorState

import run_dpo
from mdpo.runs.entrypoint import run


def main(argv: list[str], before=lambda name: None) -> None:
    for name, arguments in json.loads(Path(argv[0]).read_text()):
        before(name)
        run_dpo.main(arguments)
        AcceleratorState._reset_state()  # the next run has another batch: "auto" values of DeepSpeed are made anew


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
