"""run_dpo.py with small buckets, and a record of what ZeRO-2's optimizer does: overlap_worker.py RECORD ARGUMENTS"""

import json
import sys
from pathlib import Path

from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

import run_dpo
from dpo_trainer import DPOTrainer

BUCKET = 3000  # elements: fewer than the model's, more than most of its weights
record = {"buffers": set(), "used": set()}


class Trainer(DPOTrainer):
    def __init__(self, **kwargs):
        kwargs["args"].deepspeed_plugin.deepspeed_config["zero_optimization"]["reduce_bucket_size"] = BUCKET
        super().__init__(**kwargs)


reduce = DeepSpeedZeroOptimizer.reduce_ipg_grads


def recording(self, *args, **kwargs):
    for bucket in self.ipg_buckets.values():
        record["buffers"].add(tuple(buffer.numel() for buffer in bucket.buffer))
        record["used"].add(bucket.index)
    record["overlap_comm"] = self.overlap_comm
    return reduce(self, *args, **kwargs)


DeepSpeedZeroOptimizer.reduce_ipg_grads = recording
run_dpo.DPOTrainer = Trainer
run_dpo.main(sys.argv[2:])
Path(sys.argv[1]).write_text(json.dumps({k: sorted(v) if isinstance(v, set) else v for k, v in record.items()}))
