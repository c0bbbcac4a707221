"""Seconds from the command to the first training step, with an empty reference cache and with a filled one.

python benchmarks/warm_start.py [--pairs 80] [--recipe recipes/smollm2-135m/dpo/config_quickstart.yaml]
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Run in a process of its own: run_dpo.py's main, which exits when its first step begins.
CHILD = """
import os, sys, time
import run_dpo
def first_step(*args, **kwargs):
    print(f"FIRST {time.time()}", flush=True)
    os._exit(0)
run_dpo.StepTimer.on_step_begin = first_step
run_dpo.main(sys.argv[1:])
"""


def seconds_to_first_step(recipe: str, *options: str) -> float:
    start = time.time()
    result = subprocess.run([sys.executable, "-c", CHILD, recipe, *options], cwd=ROOT, capture_output=True, text=True)
    timestamps = [line.split()[1] for line in result.stdout.splitlines() if line.startswith("FIRST")]
    if not timestamps:
        raise SystemExit(result.stdout + result.stderr)
    return float(timestamps[0]) - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="recipes/smollm2-135m/dpo/config_quickstart.yaml")
    parser.add_argument("--pairs", type=int, default=80)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        options = [f"--max_training_samples={args.pairs}", "--eval_on_start=false", "--eval_dataset_mixer=null"]
        options += ["--show_answers=0", f"--output_dir={folder}/run", f"--reference_cache_dir={folder}/cache"]
        for name in ("empty", "filled", "filled, another beta and learning rate"):
            overrides = ["--beta=0.3", "--learning_rate=1e-6"] if "another" in name else []
            print(f"{name:40} {seconds_to_first_step(args.recipe, *options, *overrides):6.1f} s", flush=True)


if __name__ == "__main__":
    main()
