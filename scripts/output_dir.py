"""Prints a run's output folder: python scripts/output_dir.py [RECIPE.yaml] [--key=value ...]

Takes run_dpo.py's arguments and reads them as it does. One line on stdout, all else on stderr. Loads no model, no data,
and creates no folder. scripts/launch.slurm looks there for a run's checkpoint.
"""

import os
import sys
from contextlib import redirect_stdout

import _clone  # noqa: F401

from mdpo.runs.entrypoint import run


def main(argv: list[str]) -> None:
    with redirect_stdout(sys.stderr):  # libraries print while they are imported
        from mdpo.config.recipe import load_recipe

        folder = load_recipe(argv).training.output_dir
    sys.stdout.buffer.write(os.fsencode(folder) + b"\n")  # a path, whatever the terminal can show
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
