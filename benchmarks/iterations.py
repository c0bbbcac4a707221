"""What of M-DPO makes a policy better: python benchmarks/iterations.py --arms mdpo all_tokens winners --seeds 1

Three iterations of each arm and seed from one SFT policy (SmolLM2-135M, recipes/smollm2-135m/loop.yaml), judged by
greedy answers to 300 questions of the templates that the loop asks, and 300 of those that SFT showed. Each iteration
ends as a small file in benchmarks/iterations/, and the same command continues with what is missing. --table prints all
that are there, --figure draws them. Models and trajectories go to --work.
"""

import argparse
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import iterate  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from mdpo.config.loop import read_loop  # noqa: E402
from mdpo.rollouts.iterations import DONE, TRAJECTORIES, Iterations, Stage  # noqa: E402
from mdpo.rollouts.tables import wilson, with_interval  # noqa: E402

DATA = ROOT / "recipes/smollm2-135m/data"
RESULTS = ROOT / "benchmarks/iterations"
SETS = {"asked": "loop_heldout", "SFT's": "loop_known"}  # of questions; a task's key begins with its file's name
ARMS = {  # arm: (what it changes, said for the table)
    "mdpo": ({}, "M-DPO: the policy's own tokens"),
    "all_tokens": ({"mask_user_turns": False}, "DPO over all tokens behind the prompt, TRL's rule"),
    "winners": ({"loss_type": "sft"}, "SFT on the pairs' winners (RAFT)"),
    "first": ({}, "M-DPO, reference fixed to the first policy"),
    "kto_pair": ({"loss_type": "kto_pair"}, "M-KTO on pairs"),
}


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=[])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--work", type=Path, default=ROOT / "outputs/iterations")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--figure", type=Path, metavar="FILE.png")
    args = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    if args.arms:
        first = first_policy(args.work)
    for seed in args.seeds:
        for arm in args.arms:
            run_arm(arm, seed, args.iterations, first, args.work)
    if args.table or args.arms:
        Console().print(table(results()))
    if args.figure:
        draw(results(), args.figure)


def first_policy(work: Path) -> Iterations:
    """SFT and its evaluation, which all arms share."""
    work.mkdir(parents=True, exist_ok=True)
    asked = work / "held_out.jsonl"
    asked.write_text("".join((DATA / f"{name}.jsonl").read_text() for name in SETS.values()))
    shipped = read_loop(ROOT / "recipes/smollm2-135m/loop.yaml")
    loop = replace(shipped, output_dir=str(work / "start"), held_out_tasks=str(asked), iterations=1)
    iterations = iterate.checked(loop)
    for stage in (iterations.rows(), iterations.sft(), iterations.evaluated(0)):
        if not stage.finished():
            stage.run()
    write("start", 0, 0, iterations.evaluated(0), {})
    return iterations


def run_arm(arm: str, seed: int, count: int, first: Iterations, work: Path) -> None:
    """`count` iterations, from the trajectories that the first policy samples with this seed."""
    shared, changes = first.loop, ARMS[arm][0]
    out = work / f"{arm}-{seed}"
    loop = replace(
        shared,
        output_dir=str(out),
        policy=first.policy(0),
        sft=None,
        sft_data=None,
        iterations=count,
        reference="first" if arm == "first" else "moved",
        stop_when_worse=False,
        sample={**shared.sample, "seed": 1000 * seed},
        pair={**shared.pair, "seed": seed} if shared.pair.get("pairs") == "random" else shared.pair,
        train={**shared.train, **changes, "seed": seed},
    )
    iterations = iterate.checked(loop)
    take_over(first.evaluated(0), iterations.evaluated(0))

    def after(n: int, stage: Stage) -> bool:
        if n and stage.folder.name == "evaluate":
            write(arm, seed, n, stage, trained(iterations.trained(n).folder))
            if n > 1:  # two models of each arm at a time
                for path in Path(iterations.policy(n - 1)).glob("*.safetensors"):
                    path.unlink()
        return True

    iterations.run(after)


def take_over(theirs: Stage, own: Stage) -> None:
    """A stage that is the same for all arms is not run again."""
    if not own.finished():
        shutil.copytree(theirs.folder, own.folder, dirs_exist_ok=True)
        (own.folder / DONE).write_text(json.dumps(own.settings))


def trained(folder: Path) -> dict:
    """Of a run's report: its last training metrics, and its seconds."""
    report = json.loads((folder / "run_report.json").read_text())
    return {name: report[name] for name in ("train_seconds", "steps")}


def write(arm: str, seed: int, n: int, stage: Stage, more: dict) -> None:
    found = [json.loads(line) for line in (stage.folder / TRAJECTORIES).open(encoding="utf-8")]
    result = {"arm": arm, "seed": seed, "iteration": n, **more}
    for name, prefix in SETS.items():
        own = [row for row in found if row["key"].startswith(f"{prefix}-")]
        result[name] = {"right": sum(row["reward"] == 1 for row in own), "tasks": len(own),
                        "cut": sum(row["ended"] == "cut" for row in own),
                        "failed calls": sum(how != "ok" for row in own for _, how in row["calls"])}  # fmt: skip
    (RESULTS / f"{arm}-{seed}-{n}.json").write_text(json.dumps(result, indent=1) + "\n")


def results() -> list[dict]:
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    return sorted(found, key=lambda r: (["start", *ARMS].index(r["arm"]), r["iteration"], r["seed"]))


def by_arm(found: list[dict]) -> dict[tuple[str, int], list[dict]]:
    groups: dict[tuple[str, int], list[dict]] = {}
    for result in found:
        groups.setdefault((result["arm"], result["iteration"]), []).append(result)
    return groups


def share(group: list[dict], name: str) -> tuple[float, int]:
    """(right answers of all seeds, questions). The seeds share their questions, so these are the trials of the
    interval."""
    return sum(r[name]["right"] / r[name]["tasks"] for r in group) / len(group), group[0][name]["tasks"]


def table(found: list[dict]) -> Table:
    shown = Table(title="right answers, the mean of the seeds")
    for column in ("arm", "iteration", "seeds", *(f"{name} templates" for name in SETS)):
        shown.add_column(column, justify="left" if column == "arm" else "right")
    for (arm, n), group in by_arm(found).items():
        shares = [with_interval(*share(group, name)) for name in SETS]
        shown.add_row(arm, str(n), ", ".join(str(r["seed"]) for r in group), *shares)
    return shown


def draw(found: list[dict], path: Path) -> None:
    """Right answers by iteration, an arm a line, with 95 % intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = by_arm(found)
    figure, panels = pyplot.subplots(1, len(SETS), figsize=(10, 4), sharey=True, layout="constrained")
    for panel, name in zip(panels, SETS, strict=True):
        for shift, arm in enumerate(a for a in ARMS if any(key[0] == a for key in groups)):
            points = [(n, *share(group, name)) for (of, n), group in groups.items() if of in ("start", arm)]
            xs, ys = [n + 0.04 * shift for n, _, _ in points], [y for _, y, _ in points]
            bounds = [wilson(y, tasks) for _, y, tasks in points]
            errors = [
                [y - b[0] for y, b in zip(ys, bounds, strict=True)],
                [b[1] - y for y, b in zip(ys, bounds, strict=True)],
            ]
            panel.errorbar(xs, ys, yerr=errors, marker="o", capsize=3, label=ARMS[arm][1])
        panel.set(title=f"{name} templates", xlabel="iteration", xticks=sorted({n for _, n in groups}))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("right answers")
    panels[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
