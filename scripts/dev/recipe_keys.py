"""Write the tables of docs/recipe-keys.md: python -m scripts.dev.recipe_keys [--check]

Each of our own keys with type, default and help, as `run_dpo.py --help` has them, between `<!-- keys: TITLE -->` and
`<!-- keys end -->`. With --check nothing is written; exit code 1 where a table would change.
"""

import json
import re
import sys
from pathlib import Path

from mdpo.config.recipe import key_facts, key_groups
from mdpo.console import say
from mdpo.errors import UserError
from mdpo.runs.entrypoint import run

PAGE = Path(__file__).resolve().parents[2] / "docs/recipe-keys.md"
TABLE = re.compile(r"(<!-- keys: (.+?) -->\n).*?(<!-- keys end -->)", re.DOTALL)


def main(argv: list[str]) -> None:
    if {"-h", "--help"} & set(argv):
        return say(str(__doc__).strip())
    if unknown := sorted(set(argv) - {"--check"}):
        raise UserError(f"{unknown[0]}: is not an option; there is --check.")
    text = PAGE.read_text(encoding="utf-8")
    updated = filled(text)
    if updated != text and "--check" in argv:
        raise UserError(f"{PAGE.name} is stale; python -m scripts.dev.recipe_keys writes it.", PAGE.name)
    PAGE.write_text(updated, encoding="utf-8")
    say(f"{PAGE.name}: {'unchanged' if updated == text else 'written'}")


def filled(text: str) -> str:
    """The page with its tables rewritten, one for each group of our keys. Raises UserError where one is missing."""
    titles = [title for title in key_groups() if "ours" in title]
    if [title for _, title, _ in TABLE.findall(text)] != titles:
        markers = f"a `<!-- keys: TITLE -->` and a `<!-- keys end -->` for each of {titles}"
        raise UserError(f"{PAGE.name} needs {markers}.", PAGE.name)
    return TABLE.sub(lambda match: f"{match[1]}{table(match[2])}{match[3]}", text)


def table(title: str) -> str:
    lines = ["| key | type | default | what it does |", "|---|---|---|---|"]
    for key in key_groups()[title]:
        kind, default, text = key_facts(key)
        cells = (f"`{key}`", kind, f"`{json.dumps(default)}`", text)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
