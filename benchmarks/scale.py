"""Seconds and memory as work grows: python benchmarks/scale.py --axes tokens pairs ranks set --figure scale.png

tokens   a step of one pair, by tokens per sequence: 512 to 32k
pairs    a step, by its pairs: 1 to 32 of 512 tokens a side
ranks    a step of 1, 2 and 4 processes (gloo), each with the same pairs, and all with the same pairs together
set      from the command to the end of the first step, by pairs in the data set: 1k to 1M, stage by stage

Each point runs in processes of its own and ends as a small file in benchmarks/scale/; the same command continues with
what is missing, and --again measures anew. --sizes takes some sizes of the axes alone. Without --axes the tables of all
points that are there are printed. Models are random and small, with the tokenizer of --model. Data, caches and logs
go to --work.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import scale_points  # noqa: E402
from bench_dpo import MALLOC  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

RESULTS = ROOT / "benchmarks/scale"
SIZES = {"tokens": [512 << n for n in range(7)], "pairs": [1 << n for n in range(6)], "ranks": [1, 2, 4],
         "set": [1000, 10_000, 100_000, 1_000_000]}  # fmt: skip
STEPS = 4  # of a point, the first one not counted
OF_A_STEP = 512  # tokens a side where pairs or ranks grow
IN_ALL = 8  # pairs of a step of all ranks together
PER_RANK = 2  # pairs of each rank
MOST_SCORED = 1000  # pairs that the reference's own forward pass is run for
STARTS = {"first": "first start, 1 rank", "second": "second start, 1 rank", "two_ranks": "second start, 2 ranks"}
VOCABULARY = 49_152


@dataclass(frozen=True)
class Point:
    """One measurement: its axis, its size on it, and which of several of that size."""

    axis: str
    size: int
    kind: str = ""

    @property
    def name(self) -> str:
        return "-".join(filter(None, [self.axis, self.kind, str(self.size)]))

    @property
    def file(self) -> Path:
        return RESULTS / f"{self.name}.json"

    @property
    def ranks(self) -> int:
        return self.size if self.axis == "ranks" else 2 if self.kind == "two_ranks" else 1


def points(axis: str, sizes: list[int] | None = None) -> Iterator[Point]:
    """All of an axis, in the order in which they are measured."""
    kinds = {"ranks": ["per_rank", "in_all"], "set": list(STARTS)}.get(axis, [""])
    wanted = [size for size in SIZES[axis] if sizes is None or size in sizes]
    yield from (Point(axis, size, kind) for size in wanted for kind in kinds)


def missing(wanted: list[Point], again: bool) -> list[Point]:
    """Those to be measured. A later start of a set needs the caches of its first one, so it follows a new first."""
    out: list[Point] = []
    for point in wanted:
        first_is_new = any(other.size == point.size and other.kind == "first" for other in out)
        if again or not point.file.is_file() or (point.axis == "set" and first_is_new):
            out.append(point)
    return out


def slopes(work: list[float], values: list[float]) -> list[float | None]:
    """The exponent of growth between neighbors, log(v2 / v1) / log(w2 / w1), None for the first one and where a value
    is not above 0. Example: work 1, 2, 4 and values 3, 6, 24 -> None, 1, 2."""
    out: list[float | None] = [None]
    for (w1, v1), (w2, v2) in pairwise(zip(work, values, strict=True)):
        out.append(math.log(v2 / v1) / math.log(w2 / w1) if min(v1, v2) > 0 and w1 != w2 else None)
    return out[: len(work)]


def step_flops(tokens: int) -> tuple[float, float]:
    """(attention's, all) FLOPs of the forward pass of one side of `tokens` tokens, half of them supervised: each token
    sees those before it, and the LM head works where a token is supervised."""
    sizes = scale_points.SMALL
    hidden, layers = sizes["hidden_size"], sizes["num_hidden_layers"]
    weights = layers * (4 * hidden**2 + 3 * hidden * sizes["intermediate_size"])
    attention = 4 * hidden * layers * tokens**2 / 2
    return attention, attention + 2 * weights * tokens + 2 * hidden * VOCABULARY * tokens / 2


# ------------------------------------------------------------------------------------------------ measuring


def measure(point: Point, work: Path, source: Path) -> None:
    """Runs a point and writes its file. Raises SystemExit with the end of its log where it fails."""
    folder = work / (f"set-{point.size}" if point.axis == "set" else point.name)
    if point.axis != "set" or point.kind == "first":
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    described = start_of(point, folder, work, source) if point.axis == "set" else step_of(point, folder, work, source)
    path = folder / f"{point.name}.json"
    for old in folder.glob(f"{point.name}-*.json"):
        old.unlink()
    path.write_text(json.dumps(described), encoding="utf-8")
    log = folder / f"{point.name}.log"
    with log.open("w", encoding="utf-8") as file:
        code = subprocess.run(command(point, path), cwd=ROOT, env=environment(point, folder), stdout=file,
                              stderr=subprocess.STDOUT).returncode  # fmt: skip
    found = [folder / f"{point.name}-{rank}.json" for rank in range(point.ranks)]
    if code or not all(rank.is_file() for rank in found):
        raise SystemExit(f"{point.name} ended with exit code {code}; the end of {log}:\n{log.read_text()[-3000:]}")
    result = {"axis": point.axis, "size": point.size, "kind": point.kind, "cores": len(os.sched_getaffinity(0)),
              "stand_in": described.get("stand_in", False),
              "ranks": [json.loads(rank.read_text()) for rank in found]}  # fmt: skip
    point.file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def command(point: Point, path: Path) -> list[str]:
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={point.ranks}"]
    return [sys.executable, *(several if point.ranks > 1 else []), str(ROOT / "benchmarks/scale_points.py"), str(path)]


def environment(point: Point, folder: Path) -> dict[str, str]:
    """One thread a rank where ranks grow; steps keep freed memory, as a page that is touched again costs time."""
    threads = 1 if point.axis == "ranks" else max(1, len(os.sched_getaffinity(0)) // point.ranks)
    variables = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    variables |= {"HF_DATASETS_CACHE": str(folder / "datasets"), "ACCELERATE_USE_CPU": "true"}
    kept = {} if point.axis == "set" else {name: str(size) for name, size in MALLOC.items()}
    return os.environ | variables | kept


def step_of(point: Point, folder: Path, work: Path, source: Path) -> dict[str, Any]:
    tokens = point.size if point.axis == "tokens" else OF_A_STEP
    pairs = {"tokens": 1, "pairs": point.size}.get(point.axis, PER_RANK)
    pairs = IN_ALL // point.size if point.kind == "in_all" else pairs
    model = scale_points.model_folder(work / "small", source, scale_points.SMALL)
    return {"kind": "steps", "tokens": tokens, "pairs": pairs, "steps": STEPS, "model": str(model),
            "folder": str(folder / "run")}  # fmt: skip


def start_of(point: Point, folder: Path, work: Path, source: Path) -> dict[str, Any]:
    data = work / f"pairs-{point.size}.jsonl"
    scale_points.write_rows(data, point.size)
    model = scale_points.model_folder(work / "tiny", source, scale_points.TINY)
    settings = {
        "model_name_or_path": str(model), "dataset_mixer": {str(data): 1.0}, "test_split_size": 100,
        "max_length": 512, "precompute_ref_log_probs": True, "precompute_ref_batch_size": 32,
        "reference_cache_dir": str(folder / "reference"), "gradient_checkpointing": False, "bf16": False,
        "per_device_train_batch_size": 4, "num_train_epochs": 1, "report_to": "none", "save_strategy": "no",
        "output_dir": str(folder / "run"), "overwrite_output_dir": True,
    }  # fmt: skip
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
    return {"kind": "start", "argv": [str(recipe)], "stand_in": point.size > MOST_SCORED}


# ------------------------------------------------------------------------------------------------ tables, figure


def results(axis: str, kind: str = "") -> list[dict[str, Any]]:
    found = [json.loads(p.file.read_text()) for p in points(axis) if p.kind == kind and p.file.is_file()]
    return sorted(found, key=lambda result: result["size"])


def most(result: dict[str, Any], name: str) -> float:
    """Of the rank that has most."""
    return max(rank[name] for rank in result["ranks"])


def step_table(axis: str, kind: str, found: list[dict[str, Any]]) -> Table:
    titles = {"tokens": "a step of one pair, by tokens of a side", "pairs": f"a step, by pairs of {OF_A_STEP} tokens"}
    how = {"per_rank": f"{PER_RANK} pairs for each", "in_all": f"{IN_ALL} pairs for all together"}.get(kind)
    cores = f"{found[0]['cores']} cores"
    table = Table(title=titles.get(axis, f"a step by ranks, {how}, one thread a rank, {cores} for all of them"))
    work = [result["size"] for result in found]
    seconds = [most(result, "seconds") for result in found]
    grown = [most(result, "step_gb") - most(result, "before_gb") for result in found]
    columns: dict[str, list[str]] = {axis: [f"{size:,}" for size in work]}
    columns |= {"seconds": [f"{s:.3f}" for s in seconds], "exponent": powers(work, seconds)}
    if axis == "tokens":
        flops = [step_flops(size) for size in work]
        columns |= {"expected": powers(work, [whole for _, whole in flops])}
        columns |= {"attention, of FLOPs": [f"{attention / whole:.0%}" for attention, whole in flops]}
    columns |= {"peak GB of a rank": [f"{most(result, 'peak_gb'):.2f}" for result in found]}
    columns |= {"GB of the step": [f"{gb:.3f}" for gb in grown], "exponent of GB": powers(work, grown)}
    return filled(table, columns)


def powers(work: list[float], values: list[float]) -> list[str]:
    return ["" if slope is None else f"{slope:.2f}" for slope in slopes(work, values)]


def filled(table: Table, columns: dict[str, list[str]]) -> Table:
    for name in columns:
        table.add_column(name, justify="right")
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*cells)
    return table


def start_table(kind: str, found: list[dict[str, Any]]) -> Table:
    """Seconds of each stage on the slowest rank, with the exponent since the size before."""
    table = Table(title=f"{STARTS[kind]}: seconds by pairs in the set (exponent)")
    work = [result["size"] for result in found]
    table.add_column("stage")
    for result in found:
        table.add_column(f"{result['size']:,}{'*' if result['stand_in'] else ''}", justify="right")

    def add(name: str, values: list[float], digits: int = 1) -> None:
        cells = zip(values, powers(work, values), strict=True)
        table.add_row(name, *(f"{value:.{digits}f}{f' ({power})' if power else ''}" for value, power in cells))

    for stage in scale_points.ORDER:
        add(stage, [max(rank["stages"][stage] for rank in result["ranks"]) for result in found])
    add("all", [total(result) for result in found])
    own: Callable[[dict], float] = lambda rank: max(rank["own_gb"].values())  # noqa: E731
    add("GB of a rank's own", [max(map(own, result["ranks"])) for result in found], 2)
    add("GB resident, with pages of files", [most(result, "peak_gb") for result in found], 2)
    if any(result["stand_in"] for result in found):
        table.caption = "* the reference's forward pass is left out: zeros are its log-probs"
    return table


def total(result: dict[str, Any]) -> float:
    return max(sum(rank["stages"].values()) for rank in result["ranks"])


def show() -> None:
    console = Console()
    for axis, kind in (("tokens", ""), ("pairs", ""), ("ranks", "per_rank"), ("ranks", "in_all")):
        if found := results(axis, kind):
            console.print(step_table(axis, kind, found))
    for kind in STARTS:
        if found := results("set", kind):
            console.print(start_table(kind, found))


def draw(path: Path) -> None:
    """Seconds and GB by size, an axis a panel; thin lines grow as their work does."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = {"tokens": "tokens of a side", "pairs": "pairs of a step", "ranks": "ranks", "set": "pairs in the set"}
    figure, panels = pyplot.subplots(2, len(titles), figsize=(16, 7), layout="constrained")
    for column, (axis, label) in enumerate(titles.items()):
        for kind in dict.fromkeys(point.kind for point in points(axis)):
            if not (found := results(axis, kind)):
                continue
            own: Callable[[dict], float] = lambda result: max(max(rank["own_gb"].values()) for rank in result["ranks"])  # noqa: E731
            seconds = [total(result) if axis == "set" else most(result, "seconds") for result in found]
            memory = [own(result) if axis == "set" else most(result, "peak_gb") for result in found]
            work = [result["size"] for result in found]
            for panel, values in zip(panels[:, column], (seconds, memory), strict=True):
                [line] = panel.plot(work, values, marker="o", label=STARTS.get(kind, kind.replace("_", " ")))
                if axis != "ranks":
                    linear = [values[-1] * size / work[-1] for size in work]
                    panel.plot(work, linear, color=line.get_color(), alpha=0.3, linewidth=0.8)
        for panel, what in zip(panels[:, column], ("seconds", "GB of a rank"), strict=True):
            panel.set(xscale="log", yscale="log", xlabel=label, ylabel=what)
            panel.grid(alpha=0.3, which="both")
            if axis in ("ranks", "set") and panel.lines:
                panel.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--axes", nargs="+", choices=list(SIZES), default=[])
    parser.add_argument("--sizes", nargs="+", type=int)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--model", type=Path, default=ROOT / "models/smollm2-135m-instruct")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs/scale")
    parser.add_argument("--figure", type=Path, metavar="FILE.png")
    args = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    for axis in args.axes:
        for point in missing(list(points(axis, args.sizes)), args.again):
            print(f"measuring {point.name}", flush=True)
            measure(point, args.work.resolve(), args.model)
    show()
    if args.figure:
        draw(args.figure)


if __name__ == "__main__":
    main()
