"""Run by test_collectives.py on two ranks: run_dpo.main, then again from its first checkpoint, recording every
collective that Python calls. Arguments: a folder for the records, then run_dpo.py's. With SKIP in the environment rank
1 skips one gather."""

import json
import os
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist

NOTED = """all_reduce all_gather all_gather_into_tensor all_gather_coalesced all_reduce_coalesced broadcast barrier
    reduce reduce_scatter reduce_scatter_tensor gather scatter all_to_all all_to_all_single monitored_barrier
    all_gather_object broadcast_object_list gather_object scatter_object_list new_group""".split()
SKIP = bool(os.environ.get("SKIP"))
notes: list = []


def shape(value):
    """Shapes and dtypes of the tensors in an argument."""
    if isinstance(value, torch.Tensor):
        return [list(value.shape), str(value.dtype)]
    return [shape(v) for v in value] if isinstance(value, list | tuple) else None


def noted(name, function):
    def call(*args, **kwargs):
        # Pickled objects differ in length from rank to rank; tensors may not.
        notes.append([name, None if "object" in name else shape([*args, *kwargs.values()])])
        if SKIP:  # the run will hang
            with open(Path(sys.argv[1], f"{os.environ['RANK']}.txt"), "a") as file:
                file.write(json.dumps(notes[-1]) + "\n")
        return function(*args, **kwargs)

    return call


for name in NOTED:  # before DeepSpeed takes them over
    setattr(dist, name, noted(name, getattr(dist, name)))

import dpo_trainer  # noqa: E402
import mdpo.loss.metrics  # noqa: E402
import mdpo.runs.resumable_trainer  # noqa: E402
import run_dpo  # noqa: E402
from mdpo import ranks  # noqa: E402
from mdpo.runs.entrypoint import run  # noqa: E402

copies: list = []


def collectives() -> int:
    """How many collectives the process group has run, DDP's in C++ included."""
    return dist.group.WORLD._get_sequence_number_for_group()


def watched(kind, method):
    """Records where a phase of a run begins and ends."""

    def call(*args, **kwargs):
        notes.append([f"begin {kind}", collectives()])
        result = method(*args, **kwargs)
        notes.append([f"end {kind}", collectives()])
        return result

    return call


def main(argv: list[str]) -> None:
    folder, rank = Path(argv[0]), int(os.environ["RANK"])
    trainer = dpo_trainer.DPOTrainer
    for kind, method in (("step", "training_step"), ("evaluation", "evaluation_loop"), ("saving", "_save_checkpoint")):
        setattr(trainer, method, watched(kind, getattr(trainer, method)))
    copied, gathered_tensor = mdpo.runs.resumable_trainer.copied, ranks.gathered_tensor
    mdpo.runs.resumable_trainer.copied = lambda model: copies.append(1) or copied(model)

    def silent(values):
        return values[None].expand(2, *values.shape)

    mdpo.loss.metrics.gathered_tensor = silent if SKIP and rank == 1 else gathered_tensor
    run_dpo.main(argv[1:])
    out = Path(next(a for a in argv if a.startswith("--output_dir=")).partition("=")[2])
    if rank == 0:
        shutil.copytree(out, folder / "first")
        shutil.rmtree(out / "checkpoint-4")
        (out / "model.safetensors").unlink()
    dist.barrier()
    notes.append(["begin resuming", None])
    run_dpo.main(argv[1:])
    record = {"notes": notes, "turns": next(ranks._turns), "copies": len(copies)}
    (folder / f"{rank}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
