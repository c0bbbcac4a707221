"""Memory of a run by part, from configurations alone: python scripts/plan_memory.py RECIPE.yaml [--key=value ...]

Needs neither weights nor a GPU; where the hub cannot be reached, a folder with the model's config.json will do
(--model_name_or_path=FOLDER). --config_file FILE is the accelerate file (default zero2_for_dpo.yaml), --processes N its
num_processes, --gpu_gb G the memory of a GPU in GB of 1e9 bytes (default 80). --sequences N plans for N sequences a
side (default 1), as where a chat template rewrites earlier turns. Exit code 1 where the run does not fit.
"""

import argparse
import sys
from pathlib import Path

import _clone  # noqa: F401

from mdpo.console import say
from mdpo.errors import UserError
from mdpo.runs.entrypoint import run

ROOT = Path(__file__).resolve().parents[1]
WORST = (
    "Counted for the longest pairs: {pairs} a device, {tokens} tokens each, all distinct and supervised. Assumed: "
    "{libraries:.1f} GB of libraries. Not counted: fragmentation, loading."
)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(usage=__doc__, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config_file", default=str(ROOT / "zero2_for_dpo.yaml"))
    parser.add_argument("--processes", type=int)
    parser.add_argument("--gpu_gb", type=float, default=80.0)
    parser.add_argument("--sequences", type=int, default=1)
    try:
        args, overrides = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error
    from mdpo.config.recipe import load_recipe
    from mdpo.memory.estimate import plan_memory
    from mdpo.memory.sharding import Sharding

    sharding = Sharding.read(args.config_file, args.processes)
    recipe = load_recipe(overrides)
    if args.sequences < 1:
        raise UserError(f"--sequences: {args.sequences} of a side; give 1 or more.")
    plan = plan_memory(recipe, sharding, args.sequences)
    show(plan, recipe, sharding, args.sequences)
    say(plan.verdict(args.gpu_gb))
    if not plan.fits(args.gpu_gb):
        raise SystemExit(1)


def show(plan, recipe, sharding, sequences: int) -> None:
    """The table, and what it counts."""
    from rich.console import Console
    from rich.table import Table

    from mdpo.memory.breakdown import GB, LIBRARIES

    say(f"{recipe.path}: {sharding}; {plan.phase} needs most, at max_length {plan.length}")
    table = Table()
    table.add_column("" if sharding.cpu else "on each GPU")
    table.add_column("GB", justify="right")
    for name, size in plan.parts.items():
        table.add_row(name, f"{size / GB:.2f}")
    table.add_section()
    table.add_row("together", f"{plan.total / GB:.2f}")
    table.add_section()
    table.add_row("a checkpoint, on disk", f"{plan.checkpoint / GB:.2f}")
    Console().print(table)
    pairs, libraries = recipe.training.per_device_train_batch_size, LIBRARIES["CPU" if sharding.cpu else "GPU"] / GB
    say(WORST.format(pairs=pairs, tokens=2 * sequences * plan.length, libraries=libraries))
    say(plan.on_disk())
    if plan.cpu:
        say(f"Offloading keeps {plan.cpu / GB:.0f} GB in the CPU memory of each machine.")


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
