"""run_dpo.py with small buckets, and notes of what ZeRO-2's optimizer really does: overlap_worker.py NOTES ARGUMENTS"""

import json
import sys
from pathlib import Path

from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

import run_dpo
from dpo_trainer import DPOTrainer

BUCKET = 3000  # elements: fewer than the model's, more than most of its weights
seen = {"buffers": set(), "used": set()}


class Trainer(DPOTrainer):
    def __init__(self, **kwargs):
        kwargs["args"].deepspeed_plugin.deepspeed_config["zero_optimization"]["reduce_bucket_size"] = BUCKET
        super().__init__(**kwargs)


reduce = DeepSpeedZeroOptimizer.reduce_ipg_grads


def noted(self, *args, **kwargs):
    for bucket in self.ipg_buckets.values():
        seen["buffers"].add(tuple(buffer.numel() for buffer in bucket.buffer))
        seen["used"].add(bucket.index)
    seen["overlap_comm"] = self.overlap_comm
    return reduce(self, *args, **kwargs)


DeepSpeedZeroOptimizer.reduce_ipg_grads = noted
run_dpo.DPOTrainer = Trainer
run_dpo.main(sys.argv[2:])
Path(sys.argv[1]).write_text(json.dumps({k: sorted(v) if isinstance(v, set) else v for k, v in seen.items()}))
