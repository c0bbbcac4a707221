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
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import scale_inputs  # noqa: E402
import scale_tables  # noqa: E402
from bench_dpo import MALLOC  # noqa: E402
from scale_tables import IN_ALL, OF_A_STEP, PER_RANK, STARTS  # noqa: E402

RESULTS = ROOT / "benchmarks/scale"
SIZES = {"tokens": [512 << n for n in range(7)], "pairs": [1 << n for n in range(6)], "ranks": [1, 2, 4],
         "set": [1000, 10_000, 100_000, 300_000, 1_000_000]}  # fmt: skip
STEPS = 4  # of a point, the first one not counted
MOST_SCORED = 1000  # pairs that the reference's own forward pass is run for


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


def missing(wanted: list[Point], again: bool, work: Path) -> list[Point]:
    """Those to be measured. A later start of a set needs the caches of its first one, so it follows a new first, and
    where they are gone the first one is measured again."""
    out: list[Point] = []
    for point in wanted:
        if point.kind not in ("", "first") and point.axis == "set" and not point.file.is_file():
            first = Point("set", point.size, "first")
            if first not in out and not (work / f"set-{point.size}" / "reference").is_dir():
                out.append(first)
        first_is_new = any(other.size == point.size and other.kind == "first" for other in out)
        if again or not point.file.is_file() or (point.axis == "set" and first_is_new):
            out.append(point)
    return out


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
    model = scale_inputs.model_folder(work / "small", source, scale_inputs.SMALL)
    count = point.ranks * pairs * STEPS
    return {"kind": "steps", "tokens": tokens, "rows": count, "pairs": pairs, "steps": STEPS, "model": str(model),
            "folder": str(folder / "run")}  # fmt: skip


def start_of(point: Point, folder: Path, work: Path, source: Path) -> dict[str, Any]:
    data = work / f"pairs-{point.size}.jsonl"
    scale_inputs.write_rows(data, point.size)
    model = scale_inputs.model_folder(work / "tiny", source, scale_inputs.TINY)
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


# ------------------------------------------------------------------------------------------------ what is there


def results() -> dict[tuple[str, str], list[dict[str, Any]]]:
    """By axis and kind, those of smaller size first."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for axis in SIZES:
        for point in points(axis):
            if point.file.is_file():
                found.setdefault((axis, point.kind), []).append(json.loads(point.file.read_text(encoding="utf-8")))
    return found


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
    if unknown := sorted(set(args.sizes or []) - {size for axis in args.axes for size in SIZES[axis]}):
        parser.error(f"--sizes: {unknown[0]} is none of {' '.join(args.axes) or 'no axis'}: {SIZES}")
    for axis in args.axes:
        for point in missing(list(points(axis, args.sizes)), args.again, args.work):
            print(f"measuring {point.name}", flush=True)
            measure(point, args.work.resolve(), args.model)
    found = results()
    scale_tables.show(found)
    if args.figure:
        scale_tables.draw(found, args.figure)


if __name__ == "__main__":
    main()
