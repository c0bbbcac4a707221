"""Iterations of preference learning: python scripts/iterate.py LOOP.yaml

Each iteration samples trajectories of the policy, pairs them, trains on the pairs (run_dpo.py) and measures the new
policy on held-out tasks. Every stage is a command, printed as it starts, and a folder below output_dir. After a kill
the same command continues in the middle of the stage it was in. loop_report.html, drawn anew after each stage,
loop.json and the table have the figures so far.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import _clone  # noqa: F401
import pair_rollouts
import sample
from rich.console import Console
from rich.table import Table

from mdpo.config.loop import Loop, read_loop
from mdpo.config.recipe import load_recipe
from mdpo.console import say
from mdpo.errors import UserError
from mdpo.reporting.loop_page import LoopPage
from mdpo.rollouts.iterations import Iterations, Stage, figures_of, got_worse
from mdpo.rollouts.loop_checks import check_launch, check_sampling, launch_keys, recipe_keys, refuse_missing
from mdpo.rollouts.loop_figures import loop_figures
from mdpo.rollouts.options import flags, keys
from mdpo.rollouts.tables import with_interval
from mdpo.runs.entrypoint import run
from mdpo.runs.trackers import refuse_silent_trackers
from mdpo.storage import replace_text

OF_SAMPLING = ("save", "shard", "tasks", "recipe", "served_model")
SET_BY_THE_LOOP = {
    "sample": OF_SAMPLING,
    "evaluate": OF_SAMPLING,
    "pair": ("out", "replace"),
    "train": ("model_name_or_path", "ref_model_name_or_path", "output_dir", "overwrite_output_dir", "dataset_mixer"),
}
OF_THE_RECIPE = ("chat_template", "chat_template_kwargs", "tokenizer_name_or_path")  # sampling has to know them too


def main(argv: list[str]) -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, exit_on_error=False, formatter_class=form)
    parser.add_argument("loop", type=Path, metavar="LOOP.yaml")
    try:
        args = parser.parse_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error
    loop = read_loop(args.loop)
    iterations, found = checked(loop), list[dict]()
    stages = [(n, stage, stage.finished()) for n, stage in iterations.stages()]
    say(progress(loop.output_dir, stages))
    for _, stage, finished in stages:
        if finished and (files := stage.edited()):
            say(f"{stage.folder}: was made before {', '.join(files)} was edited, and is kept. To make it and what "
                "follows anew, remove their folders.")  # fmt: skip
    earlier = {stage.folder for _, stage, finished in stages if finished}
    page = LoopPage(Path(loop.output_dir), dataclasses.asdict(loop))

    def draw(stopped: str = "") -> None:
        page.draw(lambda: loop_figures((n, stage.folder) for n, stage, _ in stages), stopped)

    def after(n: int, stage: Stage) -> bool:
        """Shows the figures so far; False where the policy got worse."""
        if stage.folder.name == "evaluate":
            found.append({"iteration": n, **figures_of(stage.folder)})
            replace_text(Path(loop.output_dir, "loop.json"), json.dumps(found, indent=1))
            Console(highlight=False).print(table(found))
            if loop.stop_when_worse and n and got_worse(found[-2], found[-1]):
                stopped = f"iteration {n} got worse by more than the interval: stopped."
                say(f"{stopped} stop_when_worse: false goes on.")
                draw(stopped)
                return False
        if stage.folder not in earlier:
            draw()
        return True

    if earlier:
        draw()
    iterations.run(after)
    if page.path.is_file():
        say(f"page  {page.path}")


def progress(folder: str, stages: list[tuple[int, Stage, bool]]) -> str:
    """One line: which stages are finished, and which one is next."""
    done = dict[int, list[str]]()
    for n, stage, finished in stages:
        if finished:
            done.setdefault(n, []).append(stage.folder.name)
    named = "; ".join(f"iteration {n}: {', '.join(names)}" for n, names in done.items())
    following = next((f"; next: iteration {n}, {stage.folder.name}" for n, stage, there in stages if not there), "")
    count = sum(map(len, done.values()))
    return f"{folder}: {count} of {len(stages)} stages are finished{f' ({named})' if named else ''}{following}"


def checked(loop: Loop) -> Iterations:
    """Raises UserError for whatever a stage would refuse of its options, before one runs."""
    refuse_missing(loop, "accelerate_config", "sft", "sft_data")
    for name, taken in SET_BY_THE_LOOP.items():
        if own := sorted(set(taken) & set(getattr(loop, name))):
            raise UserError(f"{name}: {own[0]} is set by the loop.", name)
    if own := sorted(set(OF_THE_RECIPE) & set(loop.train)):
        raise UserError(f"train: {own[0]} belongs into the recipe, where sampling reads it too.", "train")
    recipe = load_recipe([loop.recipe, *keys(loop.train), f"--output_dir={loop.output_dir}"])
    if recipe.training.ref_model_name_or_path:
        raise UserError("reference: the recipe names a ref_model_name_or_path of its own.", "reference")
    if loop.accelerate_config is None and recipe.training.n_gpu > 1:
        raise UserError(f"accelerate_config: is missing; {recipe.training.n_gpu} GPUs are there.", "accelerate_config")
    if loop.sft and recipe.model.model_revision not in (None, "main"):
        raise UserError("model_revision: SFT takes main; download that revision and name its folder.", "model_revision")
    if not loop.sample.get("temperature"):
        raise UserError("sample: temperature is missing: greedy samples of a task are all the same.")
    sampling = {}
    for name, options in (("sample", loop.sample), ("evaluate", loop.evaluate)):
        _, read, rest = sample.parse(["policy", f"--recipe={loop.recipe}", f"--tasks={loop.tasks}", *flags(options)])
        if rest:
            raise UserError(f"{name}: {rest[0]} is not an option of scripts/sample.py.", name)
        sampling[name] = read
    pair_rollouts.parse(["t.jsonl", f"--out={Path(loop.output_dir).resolve().anchor}pairs.jsonl", *flags(loop.pair)])
    refuse_missing(loop, "tasks", "held_out_tasks")
    check_launch(loop)
    device = recipe.training.device.type
    check_sampling("sample", loop.tasks, sampling["sample"], device)
    check_sampling("evaluate", loop.held_out_tasks, sampling["evaluate"], device)
    refuse_silent_trackers(recipe.training)
    first = loop.policy or recipe.model.model_name_or_path
    written = recipe_keys(recipe.written) | launch_keys(loop)
    iterations = Iterations(loop, first, recipe.model.use_peft, recipe.training.max_length, written)
    list(iterations.stages())  # reads SFT's recipe
    return iterations


def table(found: list[dict]) -> Table:
    """Of 80 columns. pass^k is the share of tasks whose k samples are all right."""
    shown, k = Table(title="held-out tasks"), max(figures["samples"] for figures in found)
    shares = ["right answers"] + [f"pass^{k}"] * (k > 1)
    for column in ("iteration", *shares, "reward", "turns", "failed calls"):
        shown.add_column(column, justify="right")
    for figures in found:
        failed = sum(n for end, n in figures["calls"].items() if end != "ok")
        reward = "" if figures["reward"] is None else f"{figures['reward']:.4f}"
        right = with_interval(figures["accuracy"], figures["tasks"], 3)
        all_right = [f"{figures['all_correct']:.3f}"] * (k > 1)
        shown.add_row(str(figures["iteration"]), right, *all_right, reward, f"{figures['turns']:.2f}", str(failed))
    return shown


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
