"""Run by test_ranks.py: two processes for each case, forked from one that has done its imports, with no launcher
that would end one for the other. Arguments: a folder, then JSON: a list of [name, case, arguments]. Writes
NAME.json: for each rank [exit code, seconds from the cause on, output]."""

import ctypes
import json
import os
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import dpo_trainer
import mdpo.data.prepare
import mdpo.ranks as ranks
import mdpo.reference.frozen
import mdpo.runs.checkpoints
import run_dpo
from mdpo.errors import UserError
from mdpo.runs import output_dir as run_folder
from mdpo.runs.entrypoint import run

CLONE_NEWNS = 0x20000


def now(cause: str) -> None:
    """Records when the cause occurred."""
    Path(f"cause-{os.environ['RANK']}").write_text(str(time.time()))
    print(f"cause: {cause}", flush=True)


def group(seconds: float = 60) -> int:
    dist.init_process_group("gloo", timeout=timedelta(seconds=seconds))
    return dist.get_rank()


# ------------------------------------------------------------------------------------------------------ ranks.py itself


def talk(argv):
    """Every function of ranks.py, over a group whose collectives wait a second at most."""
    rank = group(1)

    def slow():
        time.sleep(3)
        return {"from": rank}

    results = [ranks.agreed(slow)]
    results.append(ranks.gathered({"rank": rank, "tensor": torch.full((2,), float(rank))})[1]["tensor"].tolist())
    results.append(ranks.gathered_tensor(torch.tensor([[rank, 7]])).tolist())
    order = Path("order")
    with ranks.first_of_node():
        if rank == 0:
            time.sleep(2)
        with open(order, "a") as file:
            file.write(str(rank))
    ranks.wait_for_all()
    results.append(order.read_text())
    for error in (UserError("fix it"), ValueError("a bug")):
        for how in ("agreed", "first"):
            results.append(failing(error, how))
    try:
        ranks.gathered([{"deep": torch.zeros(1, device="meta")}])
    except TypeError as error:
        results.append(str(error))
    print(json.dumps(results))


def failing(error: Exception, how: str) -> str:
    def fails():
        if ranks.rank() == 0:
            raise error
        return "ran"

    try:
        if how == "agreed":
            ranks.agreed(fails)
        else:
            with ranks.first_of_node():
                fails()
    except Exception as caught:
        return f"{type(caught).__name__}: {caught}"
    return "nothing"


def plain_wait(argv):
    """The negative control of `talk`: a collective's own wait has an end."""
    if group(1) == 0:
        time.sleep(4)
    dist.barrier()


def alone(argv):
    """The error of one rank while the other waits in a collective, or computes, or at the store."""
    rank = group(600)
    failing_rank, where = int(argv[0]), argv[1]
    if rank == failing_rank:
        time.sleep(1)
        now("alone")
        raise UserError("only here.\nFix it.") if argv[2] == "user" else ValueError("only here")
    if where == "collective":
        dist.all_reduce(torch.zeros(1))
    if where == "computing":
        time.sleep(600)
    ranks.wait_for_all()


def together(argv):
    rank = group()
    time.sleep(0.5 * rank)
    now("together")
    raise UserError("everywhere")


def hangs_at_exit(argv):
    import atexit

    if group() == 1:
        atexit.register(time.sleep, 600)
        now("hangs")
        raise ValueError("only here")
    ranks.wait_for_all()


def unshared(argv):
    """Rank 1 has another disk under the same name."""
    folder = Path("out")
    folder.mkdir(exist_ok=True)
    if os.environ["RANK"] == "1" and argv:
        if ctypes.CDLL(None).unshare(CLONE_NEWNS):
            print("not allowed", flush=True)
        subprocess.run(["mount", "--make-rprivate", "/"], capture_output=True)
        if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(folder.resolve())], capture_output=True).returncode:
            print("not allowed", flush=True)
    group()
    run_folder.SHARED_S = 1
    now("unshared")
    run_folder.refuse_unshared(folder)
    print("shared", list(folder.iterdir()))


# ------------------------------------------------------------------------------------- a run, with trouble on one rank


def training(argv):
    """run_dpo.main, with the trouble argv[0] on the rank argv[1]."""
    trouble, failing_rank, *rest = argv
    if os.environ["RANK"] == failing_rank:
        TROUBLES[trouble]()
    run_dpo.main(rest)


def fails(cause: str, error: Exception):
    def failing(*args, **kwargs):
        now(cause)
        raise error

    return failing


def out_of_memory():
    dpo_trainer.DPOTrainer.compute_loss = fails("memory", torch.OutOfMemoryError("CUDA out of memory. Tried to …"))


def disk():
    mdpo.runs.checkpoints.sync = fails("disk", OSError(28, "No space left on device"))


def collator():
    dpo_trainer.PackedCollator.__call__ = fails("collator", KeyError("a column"))


def reference():
    score = mdpo.reference.frozen.score_reference

    def nowhere(*args, **kwargs):
        now("reference")
        scores = score(*args, **kwargs)
        scores.logps.fill_(torch.nan)
        return scores

    mdpo.reference.frozen.score_reference = nowhere


def tokenizing():
    mdpo.data.prepare.load_datasets = fails("tokenizing", ValueError("a bug"))


def digests():
    run_dpo.content_facts = fails("digests", OSError(5, "Input/output error"))


TROUBLES = {f.__name__: f for f in (out_of_memory, disk, collator, reference, tokenizing, digests)}
CASES = {f.__name__: f for f in (talk, plain_wait, alone, together, hangs_at_exit, unshared, training)}


def child(case: str, argv: list[str], rank: int, port: int, folder: Path) -> int:
    process = os.fork()
    if process:
        return process
    os.setsid()
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    with open(folder / f"{rank}.txt", "ab", 0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(handle, "w", buffering=1) for handle in (1, 2))
    os.chdir(folder)
    code = 1
    try:
        code = run(CASES[case], argv)
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)


def wait(processes: dict[int, int]) -> dict[int, tuple[int, float]]:
    """rank -> (exit code, time); a process that still runs after four minutes is killed."""
    outcomes, limit = {}, time.time() + 240
    while len(outcomes) < len(processes):
        for process, rank in processes.items():
            if rank not in outcomes:
                ended, status = os.waitpid(process, os.WNOHANG)
                if ended:
                    outcomes[rank] = (os.waitstatus_to_exitcode(status), time.time())
                elif time.time() > limit:
                    os.kill(process, 9)
        time.sleep(0.05)
    return outcomes


def main(folder: Path, cases: list) -> None:
    for name, case, argv in cases:
        (folder / name).mkdir()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        outcomes = wait({child(case, argv, rank, port, folder / name): rank for rank in range(2)})
        causes = [float(path.read_text()) for path in (folder / name).glob("cause-*")]
        cause = min(causes, default=time.time())
        outcome = [[outcomes[r][0], outcomes[r][1] - cause, (folder / name / f"{r}.txt").read_text()] for r in range(2)]
        (folder / f"{name}.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
