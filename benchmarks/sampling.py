"""Trajectories a minute of both backends: python benchmarks/sampling.py [--questions 24] [--rounds 4]

transformers' continuous batching in this process and in two (`--processes 2`), and vLLM (make vllm-env) as a server on
the same cores, with the same model, questions and settings. They sample in turn, each round other questions; the order
changes from round to round. Starts are not counted.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import sample  # noqa: E402

from mdpo.config.recipe import load_recipe  # noqa: E402
from mdpo.masking.tokenizer import load_tokenizer  # noqa: E402
from mdpo.rollouts.driver import jobs, roll_out  # noqa: E402
from mdpo.rollouts.records import Records  # noqa: E402
from mdpo.rollouts.sampling import backend_of, prepare, settings_of  # noqa: E402
from mdpo.rollouts.serving import Servers  # noqa: E402

RECIPE = ROOT / "recipes/smollm2-135m/dpo/config_quickstart.yaml"
TASKS = ROOT / "recipes/smollm2-135m/data/loop_tasks.jsonl"
PYTHON = ROOT / ".venv-vllm/bin/python"
CONTEXT = 1024
SIDES = {"transformers": ["--processes=1"], "processes": ["--processes=2"], "server": []}
SERVE = (
    f"env VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 {PYTHON} "
    "-m vllm.entrypoints.openai.api_server --model {model} --host 127.0.0.1 --port {port} "
    f"--dtype float32 --max-model-len {CONTEXT} --enforce-eager"
)


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--policy", default=str(ROOT / "models/smollm2-135m-instruct"))
    parser.add_argument("--questions", type=int, default=24, help="of a round")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    rates: dict[str, list[float]] = {name: [] for name in SIDES}
    with tempfile.TemporaryDirectory() as folder, Servers(SERVE, args.policy, Path(folder, "served.jsonl")) as servers:
        for n in range(args.rounds):
            for name in list(rates)[:: -1 if n % 2 else 1]:
                options = [f"--save={folder}/{name}-{n}.jsonl", f"--samples={args.samples}"]
                options += SIDES[name] or [f"--base_url={servers.up()[0]}"]
                rates[name].append(one_round(name, args, Path(folder), options, n))
                print(f"{n} {name:13} {rates[name][-1]:7.1f} trajectories a minute", flush=True)
    for name, found in rates.items():
        print(f"{name:13} {statistics.median(found):7.1f} ({min(found):.1f} to {max(found):.1f}) trajectories a minute")
    for name in list(rates)[1:]:
        ratios = [other / here for here, other in zip(rates["transformers"], rates[name], strict=True)]
        print(f"{name} / transformers: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def one_round(name: str, args: argparse.Namespace, folder: Path, more: list[str], n: int) -> float:
    """Trajectories a minute, counted from when the backend is there."""
    command = [args.policy, f"--recipe={RECIPE}", f"--tasks={TASKS}", "--temperature=1.0"]
    command += [
        f"--backend={'server' if name == 'server' else 'transformers'}",
        "--max_new_tokens=64",
        "--max_turns=4",
        "--instruction=Use Python and put the answer in \\boxed{}.",
    ]
    command.append("--in_flight=64")  # both sides
    _, options, _ = sample.parse([*command, *more])
    own = [f"--model_name_or_path={args.policy}", "--report_to=none", f"--output_dir={folder}"]
    recipe = load_recipe([str(RECIPE), *own])
    tokenizer = load_tokenizer(recipe.model, recipe.data, recipe.training.trust_remote_code)
    prepared = prepare(str(TASKS), options, recipe, tokenizer)
    tasks = prepared.tasks[n * args.questions : (n + 1) * args.questions]
    records = Records(options.save, "policy", settings_of(prepared, recipe))
    with backend_of(args.policy, recipe, prepared, seed=n) as (backend, stops, context):
        player = prepared.player(backend, stops, min(context or CONTEXT, CONTEXT))
        start = time.perf_counter()
        roll_out(player, jobs(tasks, args.samples, options.places), records, options.places)
        minutes = (time.perf_counter() - start) / 60
    return len(records.done) / minutes


if __name__ == "__main__":
    main()
