"""Several runs of run_dpo.py in the processes of one launch: accelerate launch … half_worker.py RUNS.json

RUNS.json: [[name, [argument, …]], …]. Of a run called wrong-… the batch goes through Trainer's own `_prepare_input`,
which casts it to DeepSpeed's dtype: the negative control. A CPU without float16 units is told that it has them."""

import json
import sys
from pathlib import Path

from accelerate.state import AcceleratorState
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from transformers import Trainer

import run_dpo
from dpo_trainer import DPOTrainer
from mdpo.startup import run

CPU_Accelerator.is_fp16_supported = lambda self: True


def main(argv: list[str]) -> None:
    own = DPOTrainer._prepare_input
    for name, arguments in json.loads(Path(argv[0]).read_text()):
        DPOTrainer._prepare_input = Trainer._prepare_input if name.startswith("wrong") else own
        run_dpo.main(arguments)
        AcceleratorState._reset_state()  # the next run has another batch: "auto" values of DeepSpeed are made anew


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
