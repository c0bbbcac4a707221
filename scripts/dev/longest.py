"""Write the table of the longest pairs into docs/memory.md: python -m scripts.dev.longest [--check]

It stands between `<!-- longest -->` and `<!-- longest end -->`: for each model, number of machines and accelerate file
the longest `max_length` that scripts/plan_memory.py gives for one pair a row and 80 GB. With --check nothing is
written; exit code 1 where the table would change.
"""

import json
import re
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from mdpo.config.recipe import load_recipe
from mdpo.console import say
from mdpo.errors import UserError
from mdpo.memory.estimate import plan_memory
from mdpo.memory.sharding import Sharding
from mdpo.runs.entrypoint import run

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/memory.md"
TABLE = re.compile(r"(<!-- longest -->\n).*?(<!-- longest end -->)", re.DOTALL)
KNOWN = 131_072  # positions; what Qwen3 knows with YaRN
MODELS = {  # sizes as published: a family here, and what is other than in its config.json
    "8B (Llama-3.1)": ("llama-3.1-8b", {}),
    "32B (Qwen3)": ("qwen3-8b", {"hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64,
                                 "num_attention_heads": 64}),
    "70B (Llama-3.3)": ("llama-3.1-8b", {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                                         "num_attention_heads": 64}),
}  # fmt: skip
GPUS, GB = 8, 80
COLUMNS = {  # ranks for each row, offloading of weights and optimizer
    "ZeRO-3": (1, False), "sequence parallel 8": (8, False), "offloaded": (1, True), "offloaded, parallel 8": (8, True),
}  # fmt: skip


def main(argv: list[str]) -> None:
    if {"-h", "--help"} & set(argv):
        return say(str(__doc__).strip())
    if unknown := sorted(set(argv) - {"--check"}):
        raise UserError(f"{unknown[0]}: is not known here; --check is.")
    text = PAGE.read_text(encoding="utf-8")
    new = TABLE.sub(lambda match: match[1] + table() + "\n" + match[2], text)
    if "--check" in argv and new != text:
        raise UserError("docs/memory.md: its table is stale; python -m scripts.dev.longest writes it.", "longest")
    PAGE.write_text(new, encoding="utf-8")


def table() -> str:
    lines = [f"| model | machines of {GPUS} GPUs | {' | '.join(COLUMNS)} |", "|---|---|" + "---|" * len(COLUMNS)]
    for name, (family, sizes) in MODELS.items():
        for machines in (1, 2, 4):
            cells = [cell(family, sizes, machines, *column) for column in COLUMNS.values()]
            lines.append(f"| {name} | {machines} | {' | '.join(cells)} |")
            say(lines[-1])
    return "\n".join(lines)


def cell(family: str, sizes: dict, machines: int, row_ranks: int, offload: bool) -> str:
    """The longest max_length, or how much is needed without pairs where none fits."""
    sharding = Sharding.read(ROOT / "training_configs/zero3_for_dpo.yaml", GPUS * machines)
    offloads = {"offload_optimizer": offload, "offload_param": offload}
    sharding = replace(sharding, machines=machines, row_ranks=row_ranks, **offloads)
    with tempfile.TemporaryDirectory() as folder:
        config = json.loads((ROOT / "recipes" / family / "config.json").read_text(encoding="utf-8"))
        Path(folder, "config.json").write_text(json.dumps(config | sizes | {"max_position_embeddings": KNOWN}))
        words = [f"--model_name_or_path={folder}", "--per_device_train_batch_size=1"]
        plan = plan_memory(load_recipe([str(ROOT / f"recipes/{family}/dpo/config_full.yaml"), *words]), sharding)
    longest = plan.longest(GB)
    if longest is None:
        return f"none: {plan.at(2).total / 1e9:.0f} GB without pairs"
    return f"{longest:,}" + (" and more" if longest == KNOWN else "")


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
