"""Write the memory tables of recipes/*/README.md: python -m scripts.dev.recipe_memory [FAMILY ...] [--check]

A table is between `<!-- memory: RECIPE ACCELERATE_FILE -->` and `<!-- memory end -->`, as scripts/plan_memory.py prints
it for dpo/RECIPE with the family's config.json; a line on its checkpoints follows. With --check nothing is written;
exit code 1 where a table would change.
"""

import re
import sys
from pathlib import Path

from mdpo.console import say
from mdpo.errors import UserError
from mdpo.runs.entrypoint import run

ROOT = Path(__file__).resolve().parents[2]
TABLE = re.compile(r"(<!-- memory: (\S+) (\S+) -->\n).*?(<!-- memory end -->)", re.DOTALL)


def main(argv: list[str]) -> None:
    if {"-h", "--help"} & set(argv):
        return say(str(__doc__).strip())
    known = sorted(path.parent.name for path in (ROOT / "recipes").glob("*/config.json"))
    families = [word for word in argv if word != "--check"] or known
    if unknown := sorted(set(families) - set(known)):
        raise UserError(f"{unknown[0]}: is not a family of recipes/ with a config.json; those are {', '.join(known)}.")
    stale = [family for family in families if not up_to_date(family, write="--check" not in argv)]
    if stale and "--check" in argv:
        raise UserError(
            f"Tables of {', '.join(stale)} are stale; python -m scripts.dev.recipe_memory writes them.", "README.md"
        )
    say(f"{len(families)} families, {len(stale)} READMEs written")


def up_to_date(family: str, write: bool) -> bool:
    path = ROOT / "recipes" / family / "README.md"
    text = path.read_text(encoding="utf-8")
    if not TABLE.search(text):
        raise UserError(
            f"{path}: has no table; put <!-- memory: RECIPE FILE --> and <!-- memory end --> into it.", path.name
        )
    updated = TABLE.sub(lambda m: f"{m[1]}{table(family, m[2], m[3])}\n\n{m[4]}", text)
    if write and updated != text:
        path.write_text(updated, encoding="utf-8")
    return updated == text


def table(family: str, recipe: str, accelerate: str) -> str:
    """One plan, in Markdown; the recipe's paths are those of this repository, whatever the working folder."""
    from mdpo.config.recipe import load_recipe
    from mdpo.memory.estimate import plan_memory
    from mdpo.memory.sharding import Sharding

    folder = ROOT / "recipes" / family
    sharding = Sharding.read(ROOT / "training_configs" / accelerate)
    plan = plan_memory(load_recipe([str(folder / "dpo" / recipe), f"--model_name_or_path={folder}"]), sharding)
    return f"{recipe.removesuffix('.yaml')}, {sharding}:\n\n{plan.markdown()}\n\n{plan.on_disk()}"


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
