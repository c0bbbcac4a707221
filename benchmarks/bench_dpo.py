"""This repository's DPOTrainer against the installed trl.DPOTrainer: pairs/s, tokens/s, memory, share of matmul rate.

python benchmarks/bench_dpo.py                                  # all workloads on models/smollm2-135m-instruct, float32
python benchmarks/bench_dpo.py --only "agent pairs" --steps 3
python benchmarks/bench_dpo.py --grow                           # the cost as work grows, ours alone

Each side has its own model in its own process; both train on the same rows in the same order. A step of one side
follows a step of the other, so that each ratio compares two neighbors in time. A step is a full training step: data,
forward, backward, clipping, optimizer, logging. TRL runs with its best settings for these workloads: reference
log-probs precomputed, scaled-dot-product attention, no gradient checkpointing, fused AdamW.
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import resource
import statistics
import tempfile
import time
from pathlib import Path

import workloads
from rich.console import Console
from rich.table import Table

PAUSE_S = 0.3  # the other process's threads spin for a while after their work
WARM = 2  # warm-up steps of each side, not counted: the first pairs are the longest, so memory reaches its peak in them
# By default glibc returns freed memory to the system and takes it again in each step, page by page; here it keeps it.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": 1 << 30, "MALLOC_TRIM_THRESHOLD_": 1 << 37, "MALLOC_TOP_PAD_": 1 << 26}


def common_settings(options: dict, cuda: bool) -> dict:
    """Training arguments of both sides."""
    return {
        "per_device_train_batch_size": options["pairs"],
        "max_steps": options["steps"] + WARM,
        "train_sampling_strategy": "sequential",
        "learning_rate": 1e-6,
        "max_length": 8192,
        "bf16": options.get("bf16", options["dtype"] == "bfloat16"),
        "use_cpu": not cuda,
        "gradient_checkpointing": False,
        "precompute_ref_log_probs": True,
        "model_init_kwargs": {"dtype": options["dtype"], "attn_implementation": "sdpa"},
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "seed": 1,
    }


def worker(pipe, side: str, options: dict) -> None:
    """One side's trainer. Trains a step for each "go" of the parent and sends its seconds; at the end, its metrics."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DPOConfig

    from dpo_trainer import DPOTrainer
    from mdpo.config.schema import MDPOConfig

    torch.set_num_threads(options["threads"])
    cuda = torch.cuda.is_available()
    settings = common_settings(options, cuda)
    step_start = None

    class Turns(TrainerCallback):
        """A step lasts from its "go" until the next one could begin, so that fetching data counts."""

        def on_step_begin(self, *args, **kwargs):
            nonlocal step_start
            answer()
            pipe.recv()
            step_start = time.perf_counter()

        def on_train_end(self, *args, **kwargs):
            answer()

    def answer():
        if cuda:
            torch.cuda.synchronize()
        pipe.send(None if step_start is None else time.perf_counter() - step_start)

    with tempfile.TemporaryDirectory() as folder:
        rows = Dataset.from_list(options["rows"])
        setup_start = time.perf_counter()
        if side == "trl":
            from trl import DPOTrainer as TheirTrainer

            trainer = TheirTrainer(options["model"], args=DPOConfig(folder, **settings), train_dataset=rows)
        else:
            cache = {"reference_cache_dir": options["cache"]}
            trainer = DPOTrainer(options["model"], args=MDPOConfig(folder, **settings, **cache), train_dataset=rows)
        trainer.add_callback(Turns())
        results = {"set-up": time.perf_counter() - setup_start}
        if side == "ours":
            results |= useful_work(trainer, options["pairs"])
        trainer.train()
        logs = [log for log in trainer.state.log_history if "loss" in log]
        results |= {"losses": [log["loss"] for log in logs], "num_tokens": [log["num_tokens"] for log in logs]}
    results["memory"] = torch.cuda.max_memory_allocated() if cuda else 1024 * peak_kb()
    pipe.send(results)


def peak_kb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def useful_work(trainer, pairs: int) -> dict[str, list[float]]:
    """For each step its distinct tokens, tokens of both sides, and useful FLOPs: each distinct token once, the LM head
    where a token is supervised, attention where a token sees another, two more for backward, nothing recomputed."""
    from mdpo.forward.forest import Forest

    config, tokens, both_sides, flops = trainer.model.config, [], [], []
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    embeddings = {id(p): p for p in (trainer.model.get_input_embeddings().weight, trainer.model.lm_head.weight)}
    weights = sum(p.numel() for p in trainer.model.parameters() if p.ndim == 2 and id(p) not in embeddings)
    for batch in trainer.get_train_dataloader():
        forest = Forest(batch.runs)
        attended = sum(q * before + q * (q + 1) / 2 for q, before in zip(forest.sizes, forest.before, strict=True))
        n, scored = batch.input_ids.numel(), len(batch.logp_position)
        forward = 2 * n * weights + 2 * scored * config.hidden_size * config.vocab_size
        forward += 4 * attended * config.num_attention_heads * head_dim * config.num_hidden_layers
        tokens.append(n)
        both_sides.append(batch.n_tokens)
        flops.append(3 * forward)
    return {"tokens": tokens, "both": both_sides, "flops": flops}


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


def compare(name: str, rows: list[dict], pairs: int, options, sides=("trl", "ours")) -> dict:
    """Runs the sides' steps in turn; the first WARM of each are not counted."""
    rows = sorted(rows, key=lambda row: -len(json.dumps(row)))
    rows = rows[: WARM * pairs] + random.Random(0).sample(rows[WARM * pairs :], len(rows) - WARM * pairs)
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
    if len({tuple(f["num_tokens"]) for f in results.values()}) > 1:
        raise SystemExit(f"{name}: the sides did not train on the same rows: {results}")
    return {"name": name, "pairs": pairs, "seconds": {s: x[WARM:] for s, x in seconds.items()}, **results}


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def show(results: list[dict], rates: list[float]) -> None:
    rate = max(rates)
    table = Table(title=f"{platform.processor() or platform.machine()}, matmul {rate / 1e9:.0f} GFLOP/s")
    for column in ("workload", "pairs a step", "distinct of all tokens", "pairs/s trl", "pairs/s ours", "tokens/s ours",
                   "ratio", "GB trl", "GB ours", "memory", "useful FLOPs"):  # fmt: skip
        table.add_column(column, justify="left" if column == "workload" else "right")
    for r in results:
        ours, trl = r["seconds"]["ours"], r["seconds"].get("trl")
        n, work = len(ours), r["ours"]
        both_sides, distinct, flops = (work[key][WARM : n + WARM] for key in ("both", "tokens", "flops"))
        memory = {side: r[side]["memory"] / 1e9 for side in r["seconds"]}
        table.add_row(
            r["name"],
            str(r["pairs"]),
            f"{sum(distinct) / n / r['pairs']:.0f} of {sum(both_sides) / n / r['pairs']:.0f}",
            f"{r['pairs'] / statistics.median(trl):.3f}" if trl else "",
            f"{r['pairs'] / statistics.median(ours):.3f}",
            f"{sum(both_sides) / sum(ours):.0f}",
            spread([t / o for t, o in zip(trl, ours, strict=True)]) if trl else "",
            f"{memory['trl']:.1f}" if trl else "",
            f"{memory['ours']:.1f}",
            f"{memory['ours'] / memory['trl']:.2f}" if trl else "",
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
    parser.add_argument("--grow", action="store_true", help="256 … 4096 tokens a pair, then 1 … 16 pairs a step")
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    args = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", **{name: str(size) for name, size in MALLOC.items()}}
    options = {"model": args.model, "dtype": args.dtype, "steps": args.steps, "threads": args.threads}
    rates, results = [matmul_rate(args.threads, args.dtype)], []
    if args.grow:
        sizes = [(tokens, 2) for tokens in (256, 512, 1024, 2048, 4096)] + [(512, pairs) for pairs in (1, 4, 8, 16)]
        for tokens, pairs in sizes:
            rows = workloads.sized_rows(pairs * (args.steps + WARM), tokens)
            results.append(compare(f"{tokens} tokens a pair", rows, pairs, options, sides=("ours",)))
    for name in () if args.grow else [args.only] if args.only else workloads.WORKLOADS:
        make, pairs = workloads.WORKLOADS[name]
        results.append(compare(name, make(pairs * (args.steps + WARM)), pairs, options))
        show(results[-1:], rates)
    rates.append(matmul_rate(args.threads, args.dtype))
    show(results, rates)
    if args.json:
        args.json.write_text(json.dumps({"matmul": rates, "results": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
