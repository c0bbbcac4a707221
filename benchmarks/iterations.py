"""What of M-DPO makes a policy better: python benchmarks/iterations.py --arms mdpo all_tokens winners --seeds 1

Three iterations of each arm and seed from one SFT policy (SmolLM2-135M, recipes/smollm2-135m/loop.yaml), judged by
greedy answers to 300 questions of the templates that the loop asks, and 100 of those that SFT showed. --tasks shop:
the same on the tool-calling environment (shop.yaml), 300 tasks. Each iteration ends as a small file in
benchmarks/iterations/, and the same command continues with what is missing. The table of all that are there is
printed at the end, or alone without --arms; --figure draws it. Models and trajectories go to --work. `then_mdpo`
continues a seed of `winners`: --arms winners then_mdpo --iterations 4.
"""

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import iterate  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from mdpo.config.loop import read_loop  # noqa: E402
from mdpo.rollouts.iterations import DONE, PAIRS, TRAJECTORIES, Iterations, Stage  # noqa: E402
from mdpo.rollouts.tables import wilson, with_interval  # noqa: E402

RECIPES = ROOT / "recipes/smollm2-135m"
LOOPS = {"maths": RECIPES / "loop.yaml", "shop": RECIPES / "shop.yaml"}
RESULTS = ROOT / "benchmarks/iterations"
SETS = {  # of held-out tasks: (how their keys begin, their file beside the loop's own, how many)
    "maths": {"asked": ("loop_heldout", None, 300), "SFT's": ("loop_known", RECIPES / "data/loop_known.jsonl", 100)},
    "shop": {"orders": ("shop", None, 300)},
}
TITLES = {"asked": "new templates", "SFT's": "templates of SFT", "orders": "orders"}
ARMS = {  # arm: (what it changes, said for the table)
    "mdpo": ({}, "M-DPO: the policy's own tokens"),
    "weak_nll": ({"beta": 0.5, "nll_coefficient": 1.0}, "M-DPO with less of RPO's term"),
    "strong_nll": ({"nll_coefficient": 20.0}, "M-DPO with more of RPO's term"),
    "all_tokens": ({"mask_user_turns": False}, "DPO over all tokens behind the prompt, TRL's rule"),
    "winners": ({"loss_type": "sft", "nll_coefficient": 0.0}, "SFT on the pairs' winners (RAFT)"),
    "first": ({}, "M-DPO, reference fixed to the first policy"),
    "kto_pair": ({"loss_type": "kto_pair"}, "M-KTO on pairs"),
    "then_mdpo": ({}, "M-DPO, behind three iterations of SFT on winners"),
}
BEHIND = {"then_mdpo": ("winners", 3)}  # arms that begin with another one's policy after so many iterations


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=[])
    parser.add_argument("--tasks", choices=list(LOOPS), default="maths")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1, help="that sample; an arm beside another one has one")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs/iterations")
    parser.add_argument("--figure", type=Path, metavar="FILE.png")
    args = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    if args.arms:
        first = first_policy(args.tasks, args.work / args.tasks, args.processes)
    for seed in args.seeds:
        for arm in args.arms:
            run_arm(args.tasks, arm, seed, args.iterations, first, args.work / args.tasks)
    found = {tasks: results(tasks) for tasks in LOOPS}
    for tasks, own in found.items():
        if own:
            Console().print(table(tasks, own))
    if args.figure:
        draw(found, args.figure)


def first_policy(tasks: str, work: Path, processes: int = 1) -> Iterations:
    """SFT and its evaluation, which all arms share."""
    work.mkdir(parents=True, exist_ok=True)
    if tasks == "shop" and not (ROOT / "outputs/shop/model").is_dir():
        subprocess.run([sys.executable, str(RECIPES / "data/make_shop.py")], check=True)
    shipped, asked = read_loop(LOOPS[tasks]), work / "held_out.jsonl"
    with asked.open("w", encoding="utf-8") as file:
        for _, path, count in SETS[tasks].values():
            lines = Path(path or ROOT / shipped.held_out_tasks).read_text(encoding="utf-8").splitlines(keepends=True)
            file.writelines(lines[:count])
    loop = replace(shipped, output_dir=str(work / "start"), held_out_tasks=str(asked), iterations=1)
    own = {"processes": processes}
    loop = replace(loop, sample={**loop.sample, **own}, evaluate={**loop.evaluate, **own})
    iterations = iterate.checked(loop)
    for stage in (iterations.rows(), iterations.sft(), iterations.evaluated(0)):
        if not stage.finished():
            stage.run()
    write(tasks, "start", 0, 0, iterations.evaluated(0), {})
    return iterations


def run_arm(tasks: str, arm: str, seed: int, count: int, first: Iterations, work: Path) -> None:
    """Up to iteration `count`, from the trajectories that the first policy samples with this seed; an arm of BEHIND
    from those of another arm's policy."""
    shared, changes = first.loop, ARMS[arm][0]
    out, (before, behind) = work / f"{arm}-{seed}", BEHIND.get(arm, ("", 0))
    begun = work / f"{before}-{seed}/iteration-{behind}"  # of the arm that this one continues
    if before and not (count > behind and (begun / "evaluate" / DONE).is_file()):
        raise SystemExit(f"{arm}: needs --iterations {behind + 1}, and {before} of seed {seed} after {behind} of them.")
    loop = replace(
        shared,
        output_dir=str(out),
        policy=str(begun / "train") if before else first.policy(0),
        sft=None,
        sft_data=None,
        iterations=count - behind,
        reference="first" if arm == "first" else "moved",
        stop_when_worse=False,
        sample={**shared.sample, "seed": 1000 * seed + behind},
        pair={**shared.pair, "seed": seed} if shared.pair.get("pairs") == "random" else shared.pair,
        train={**shared.train, **changes, "seed": seed},
    )
    iterations = iterate.checked(loop)
    take_over(begun / "evaluate" if before else first.evaluated(0).folder, iterations.evaluated(0))
    for other in [before] if before else [other for other in ARMS if other not in BEHIND]:  # the same policy and seed
        take_over(work / f"{other}-{seed}/iteration-{behind + 1}/sample", iterations.sampled(1))

    def after(n: int, stage: Stage) -> bool:
        if stage.folder.name == "pair" and arm == "all_tokens":
            without_sequences(stage.folder / PAIRS)
        if n and stage.folder.name == "evaluate":
            write(tasks, arm, seed, behind + n, stage, trained(iterations.trained(n).folder))
            if n > 1 and (arm, n - 1) not in BEHIND.values():  # two models of each arm at a time
                for path in Path(iterations.policy(n - 1)).glob("*.safetensors"):
                    path.unlink()
        return True

    iterations.run(after)


def take_over(theirs: Path, own: Stage) -> None:
    """A stage that is the same for several arms is not run again."""
    if (theirs / DONE).is_file() and not own.finished():
        shutil.copytree(theirs, own.folder, dirs_exist_ok=True)
        (own.folder / DONE).write_text(json.dumps(own.settings))


def without_sequences(pairs: Path) -> None:
    """Recorded sequences say which tokens are supervised; TRL's rule asks the messages."""
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    for row in rows:
        row |= {side: row[side]["messages"] for side in ("chosen", "rejected") if isinstance(row[side], dict)}
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))


def trained(folder: Path) -> dict:
    report = json.loads((folder / "run_report.json").read_text())
    return {name: report[name] for name in ("train_seconds", "steps")}


def write(tasks: str, arm: str, seed: int, n: int, stage: Stage, more: dict) -> None:
    found = [json.loads(line) for line in (stage.folder / TRAJECTORIES).open(encoding="utf-8")]
    result = {"tasks": tasks, "arm": arm, "seed": seed, "iteration": n, **more}
    for name, (prefix, *_) in SETS[tasks].items():
        own = [row for row in found if row["key"].startswith(f"{prefix}-")]
        result[name] = {"right": sum(row["reward"] == 1 for row in own), "tasks": len(own),
                        "cut": sum(row["ended"] == "cut" for row in own),
                        "failed calls": sum(how != "ok" for row in own for _, how in row["calls"])}  # fmt: skip
    (RESULTS / f"{tasks}-{arm}-{seed}-{n}.json").write_text(json.dumps(result, indent=1) + "\n")


def results(tasks: str) -> list[dict]:
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{tasks}-*.json"))]
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


def table(tasks: str, found: list[dict]) -> Table:
    shown = Table(title=f"{tasks}: right answers, the mean of the seeds")
    for column in ("arm", "iteration", "seeds", *(TITLES[name] for name in SETS[tasks])):
        shown.add_column(column, justify="left" if column == "arm" else "right")
    for (arm, n), group in by_arm(found).items():
        shares = [with_interval(*share(group, name), 3) for name in SETS[tasks]]
        shown.add_row(arm, str(n), ", ".join(str(r["seed"]) for r in group), *shares)
    return shown


def draw(found: dict[str, list[dict]], path: Path) -> None:
    """Right answers by iteration, an arm a line, with 95 % intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [(tasks, name) for tasks, own in found.items() if own for name in SETS[tasks]]
    width = 5 * len(shown)
    figure, panels = pyplot.subplots(
        1, len(shown), figsize=(width, 5), sharey=True, layout="constrained", squeeze=False
    )
    for panel, (tasks, name) in zip(panels[0], shown, strict=True):
        groups = by_arm(found[tasks])
        for shift, arm in enumerate(a for a in ARMS if any(key[0] == a for key in groups)):
            first = BEHIND.get(arm, ("start", 0))
            seeds = {r["seed"] for (of, _), group in groups.items() if of == arm for r in group} | {0}
            of_arm = [(n, group) for (of, n), group in groups.items() if of == arm or (of, n) == first]
            points = [(n, *share([r for r in group if r["seed"] in seeds], name)) for n, group in of_arm]
            xs, ys = [n + 0.04 * shift for n, _, _ in points], [y for _, y, _ in points]
            bounds = [wilson(y, count) for _, y, count in points]
            below = [y - low for y, (low, _) in zip(ys, bounds, strict=True)]
            above = [high - y for y, (_, high) in zip(ys, bounds, strict=True)]
            color = f"C{list(ARMS).index(arm)}"
            panel.errorbar(xs, ys, yerr=[below, above], marker="o", capsize=3, label=ARMS[arm][1], color=color)
        panel.set(title=f"{tasks}: {TITLES[name]}", xlabel="iteration", xticks=sorted({n for _, n in groups}))
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("right answers")
    legends = [zip(*panel.get_legend_handles_labels(), strict=True) for panel in panels[0]]
    handles = {label: handle for legend in legends for handle, label in legend}
    figure.legend(handles.values(), handles, fontsize="small", loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
