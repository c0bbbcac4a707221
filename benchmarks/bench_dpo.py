"""This repository's DPOTrainer against the installed trl.DPOTrainer: pairs/s, tokens/s, memory, share of matmul rate.

python benchmarks/bench_dpo.py                                  # all workloads on models/smollm2-135m-instruct, float32
python benchmarks/bench_dpo.py --only "agent pairs" --steps 3
python benchmarks/bench_dpo.py --only branches --micro-batch 4  # TRL's, else the largest that memory holds
python benchmarks/bench_dpo.py --grow                           # the cost as work grows, ours alone

Each side has its own model in its own process; both train on the same rows in the same order. A step of one side
follows a step of the other, so that each ratio compares two neighbors in time. A step is a full training step: data,
forward, backward, clipping, optimizer, logging. TRL runs with its best settings for these workloads: reference
log-probs precomputed, scaled-dot-product attention, no gradient checkpointing, fused AdamW. "thinking" is compared
with our own padded batches, as TRL cannot train on a side of several sequences. Both sides have to have the same loss:
at the first step, and at every one where they supervise the same tokens.
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import statistics
import tempfile
import time
from pathlib import Path

import workloads
from rich.console import Console
from rich.table import Table
from sides import WARM, in_half, worker

PAUSE_S = 0.3  # the other process's threads spin for a while after their work
# By default glibc returns freed memory to the system and takes it again in each step, page by page; here it keeps it.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": 1 << 30, "MALLOC_TRIM_THRESHOLD_": 1 << 37, "MALLOC_TOP_PAD_": 1 << 26}
# Largest difference of two losses, in float32 and in half precision. A side has some -500 nats: float32 sums in another
# order are off by 1e-5 of that, times beta; half precision rounds in each layer.
TOLERANCE = {False: 1e-3, True: 1e-1}
FREE_SHARE = 0.95  # of the memory that is free, what both sides may take together


def matmul_rate(threads: int, dtype: str) -> float:
    """FLOP/s of a square matrix product, the best of several: the machine's own rate."""
    import torch

    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    n = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    best = 0.0
    for _ in range(12):
        start = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


def ordered(rows: list[dict], pairs: int, together: int = 1) -> list[dict]:
    """The longest rows of all first, as many as the WARM steps take, then the others at random; `together` consecutive
    rows stay together."""
    groups = [rows[i : i + together] for i in range(0, len(rows), together)]
    groups.sort(key=lambda group: -sum(len(json.dumps(row)) for row in group))
    first = WARM * pairs // together
    groups = groups[:first] + random.Random(0).sample(groups[first:], len(groups) - first)
    return [row for group in groups for row in group]


def compare(name: str, rows: list[dict], pairs: int, options, sides=("trl", "ours")) -> dict:
    """Runs the sides' steps in turn; the first WARM of each are not counted."""
    rows = ordered(rows, pairs, options.get("together", 1))
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as cache:
        worker_options = {"rows": rows, "pairs": pairs, "cache": cache, **options}
        processes, pipes, seconds, results = [], {}, {side: [] for side in sides}, {}
        for side in sides:
            pipes[side], end = spawn.Pipe()
            process = spawn.Process(target=worker, args=(end, side, worker_options), daemon=True)
            process.start()
            processes.append(process)
            end.close()
            pipes[side].recv()  # ready for its first step
        for step in range(options["steps"] + WARM):
            for side in sides if step % 2 else reversed(sides):
                time.sleep(PAUSE_S)
                pipes[side].send("go")
                seconds[side].append(pipes[side].recv())
        for side in sides:
            results[side] = pipes[side].recv()
        for process in processes:
            process.join()
    if problem := disagreement(results, options.get("alike", False), TOLERANCE[in_half(options)]):
        raise SystemExit(f"{name}: {problem}: {results}")
    shown = {"name": name, "pairs": pairs, "micro": options.get("micro", {})}
    return {**shown, "seconds": {s: x[WARM:] for s, x in seconds.items()}, **results}


def disagreement(results: dict[str, dict], alike: bool, tolerance: float) -> str:
    """What shows that the sides did not train on the same rows, or that one of them computed another loss; "" where
    nothing does. Without `alike` they supervise by rules of their own, and only the first step's losses are compared:
    ln 2 where policy and precomputed reference agree."""
    if len({tuple(side["num_tokens"]) for side in results.values()}) > 1:
        return "the sides did not train on the same rows"
    for step, losses in enumerate(zip(*(side["losses"] for side in results.values()), strict=True)):
        close = all(abs(loss - losses[0]) <= tolerance for loss in losses[1:])  # NaN is not
        if (alike or step == 0) and not close:
            return f"the losses of step {step + 1} differ by more than {tolerance}"
    return ""


def divisors(n: int) -> list[int]:
    return [m for m in range(1, n + 1) if n % m == 0]


def largest_micro_batch(peaks: dict[int, float], pairs: int, room: float) -> int:
    """The largest divisor of `pairs` whose peak memory is at most `room`, if memory grows by as much with each pair as
    from 1 to 2; 0 if not even one pair fits. `peaks` has the bytes of micro-batches of 1 and 2 pairs."""
    fits = [m for m in divisors(pairs) if peaks[1] + (m - 1) * (peaks[2] - peaks[1]) <= room]
    return max(fits, default=0)


def free_memory() -> int:
    """Bytes that both sides' processes can take."""
    import psutil
    import torch

    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available


def fitted(name: str, workload: workloads.Workload, rows: list[dict], options: dict) -> int:
    """The largest micro-batch of the other side beside ours, from the peaks of short runs: our own of a whole step's
    pairs, and the other one's of 1 and 2, with gradients accumulated over two micro-batches, as they will be."""
    rows, free = ordered(rows, workload.pairs, workload.together), free_memory()

    def peak(side: str, pairs: int, micro: int) -> float:
        probe = {**options, "steps": 0, "together": 1, "micro": {side: micro}}
        return compare(name, rows[: WARM * pairs], pairs, probe, sides=(side,))[side]["memory"]

    room = FREE_SHARE * free - peak("ours", workload.pairs, workload.pairs)
    micro = largest_micro_batch({m: peak(workload.against, 2 * m, m) for m in (1, 2)}, workload.pairs, room)
    if not micro:
        raise SystemExit(
            f"{name}: ours beside one pair of {workload.against} takes more than {FREE_SHARE} of the "
            f"{free / 1e9:.1f} GB that are free. End other processes, or name a smaller --model."
        )
    return micro


def measured(name: str, options: dict, micro: int | None = None) -> dict:
    """One workload's comparison; `micro` is the other side's micro-batch, where it has not to be found."""
    workload = workloads.WORKLOADS[name]
    options = {**options, "template": workload.template, "together": workload.together, "alike": workload.alike}
    rows = workload.rows(workload.pairs * (options["steps"] + WARM))
    if workload.fit:
        options["micro"] = {workload.against: micro or fitted(name, workload, rows, options)}
    return compare(name, rows, workload.pairs, options, sides=(workload.against, "ours"))


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def show(results: list[dict], rates: list[float]) -> None:
    rate = max(rates)
    table = Table(title=f"{platform.processor() or platform.machine()}, matmul {rate / 1e9:.0f} GFLOP/s")
    for column in ("workload", "against", "pairs a step", "distinct of all tokens", "pairs/s", "pairs/s ours",
                   "tokens/s ours", "ratio", "GB", "GB ours", "memory", "useful FLOPs"):  # fmt: skip
        table.add_column(column, justify="left" if column in ("workload", "against") else "right")
    for r in results:
        against = next((side for side in r["seconds"] if side != "ours"), "")
        ours, theirs = r["seconds"]["ours"], r["seconds"].get(against)
        n, work = len(ours), r["ours"]
        both_sides, distinct, flops = (work[key][WARM : n + WARM] for key in ("both", "tokens", "flops"))
        memory = {side: r[side]["memory"] / 1e9 for side in r["seconds"]}
        micro = r["micro"].get(against, r["pairs"])
        table.add_row(
            r["name"],
            against,
            f"{r['pairs']}" + (f" ({r['pairs'] // micro} × {micro})" if micro < r["pairs"] else ""),
            f"{sum(distinct) / n / r['pairs']:.0f} of {sum(both_sides) / n / r['pairs']:.0f}",
            f"{r['pairs'] / statistics.median(theirs):.3f}" if theirs else "",
            f"{r['pairs'] / statistics.median(ours):.3f}",
            f"{sum(both_sides) / sum(ours):.0f}",
            spread([t / o for t, o in zip(theirs, ours, strict=True)]) if theirs else "",
            f"{memory[against]:.1f}" if theirs else "",
            f"{memory['ours']:.1f}",
            f"{memory['ours'] / memory[against]:.2f}" if theirs else "",
            spread([f / o / rate for f, o in zip(flops, ours, strict=True)]),
        )
    Console(width=170).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(workloads.ROOT / "models/smollm2-135m-instruct"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=5, help="counted steps for each side and workload")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", choices=list(workloads.WORKLOADS), help="one workload")
    parser.add_argument("--micro-batch", type=int, help="with branches or thinking: pairs of the other side's")
    parser.add_argument("--grow", action="store_true", help="256 … 4096 tokens a pair, then 1 … 16 pairs a step")
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    args = parser.parse_args()
    workload = workloads.WORKLOADS.get(args.only)
    if args.micro_batch is not None and not (
        workload and workload.fit and args.micro_batch in divisors(workload.pairs)
    ):
        parser.error("--micro-batch: needs --only branches and a divisor of 16, or --only thinking and one of 2")
    os.environ |= {"HF_HUB_OFFLINE": "1", **{name: str(size) for name, size in MALLOC.items()}}
    options = {"model": args.model, "dtype": args.dtype, "steps": args.steps, "threads": args.threads}
    rates, results = [matmul_rate(args.threads, args.dtype)], []
    if args.grow:
        sizes = [(tokens, 2) for tokens in (256, 512, 1024, 2048, 4096)] + [(512, pairs) for pairs in (1, 4, 8, 16)]
        for tokens, pairs in sizes:
            rows = workloads.sized_rows(pairs * (args.steps + WARM), tokens)
            results.append(compare(f"{tokens} tokens a pair", rows, pairs, options, sides=("ours",)))
    for name in () if args.grow else [args.only] if args.only else workloads.WORKLOADS:
        results.append(measured(name, options, args.micro_batch))
        show(results[-1:], rates)
    rates.append(matmul_rate(args.threads, args.dtype))
    show(results, rates)
    if args.json:
        args.json.write_text(json.dumps({"matmul": rates, "results": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
