"""Run by test_processes.py, in one process or by torchrun in two: two steps of 4 pairs with every loss; writes
weights and logs. Arguments: an output folder, a JSON object {name: options}, a JSON list of rows."""

import json
import sys
from pathlib import Path

from datasets import Dataset
from safetensors.torch import save_file
from tiny import CHATML, tiny_llama, tokenizer_for
from trainers import trainer_of

from dpo_trainer import DPOTrainer
from mdpo.config.schema import MDPOConfig
from mdpo.runs.entrypoint import run


def main(argv: list[str]) -> None:
    folder, runs, rows = Path(argv[0]), json.loads(argv[1]), json.loads(argv[2])
    rows = [rows[i] for i in (2, 6, 4, 0, 1, 3, 5, 7)]
    tokenizer = tokenizer_for(CHATML, "byte", eos="<|im_end|>")
    for name, options in runs.items():
        stream, shards = options.pop("stream", False), options.pop("shards", 1)
        trainer = trainer_of(
            DPOTrainer,
            Dataset.from_list(rows).to_iterable_dataset(shards) if stream else rows,
            folder,
            tokenizer,
            config=MDPOConfig,
            models=lambda: [tiny_llama(tokenizer, seed=n, initializer_range=0.1) for n in (0, 1)],
            optim="sgd",
            learning_rate=1e-2,
            per_device_eval_batch_size=3,
            train_sampling_strategy="sequential",  # in the order above: longest first sorts nearly as aot does
            **options,
        )
        trainer.train()
        if stream:  # by 3 pairs a rank, so that the last batch is filled up
            trainer.evaluate()
        if trainer.is_world_process_zero():
            weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
            save_file(weights, folder / f"{name}.safetensors")
            (folder / f"{name}.json").write_text(json.dumps(trainer.state.log_history))


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
