"""One mistake has one home: a value of a key is refused by a case, or by one module's tables, not by both."""

import ast
import re

import pytest
from repository import ROOT

CASES = ROOT / "tests" / "cases"
TABLES = {  # of rows (what is set, the error's key, ...), or of what is set alone
    "unit/test_config.py": ("BAD_YAML", "BAD_FLAGS"),
    "unit/test_effects.py": ("CONTRADICTIONS", "WITHOUT_EFFECT"),
    "integration/test_late_values.py": ("LATE", "TARGETS", "RANGES"),
    "integration/test_trainer.py": ("REFUSED",),
}
AGAIN = {("router_aux_loss_coef", "0.1")}  # run_dpo.py calls this check, and the trainer by itself


def settings(lines: str | list | dict) -> dict[str, str]:
    """Key -> value as plain text, of YAML's lines, flags, or keyword arguments."""
    if not isinstance(lines, dict):
        lines = lines.splitlines() if isinstance(lines, str) else " ".join(lines).split(" --")
        lines = dict((re.split("[=: ]", line.removeprefix("--"), maxsplit=1) + ["true"])[:2] for line in lines)
    plain = {key.strip("'"): re.sub("['\" ]", "", str(value)).lower() for key, value in lines.items()}
    return {key: re.sub(r"^\[(.*)\]$", r"\1", value) for key, value in plain.items()}


def offending(made: dict[str, str], key: str | None) -> set[tuple[str, str]]:
    return {(key, made[key])} if key in made else set(made.items())


def of_table(source: str, name: str) -> set[tuple[str, str]]:
    [table] = [n.value for n in ast.parse(source).body if isinstance(n, ast.Assign) and n.targets[0].id == name]
    rows = [ast.literal_eval(re.sub(r", \*\*[A-Z]+", "", ast.unparse(row))) for row in table.elts]
    rows = [row if isinstance(row, tuple) else (row, None) for row in rows]
    return set().union(*(offending(settings(row[0]), row[1]) for row in rows))


def of_case(folder) -> set[tuple[str, str]]:
    base, *files = (CASES / "recipe.yaml", *folder.glob("recipe.yaml"), *folder.glob("flags.txt"))
    made = dict(pair for file in files for pair in settings(file.read_text("utf-8")).items())
    made = dict(made.items() - settings(base.read_text("utf-8")).items())
    said = re.findall(r"\w+", (folder / "expected.txt").read_text("utf-8"))
    return offending(made, next((word for word in said if word in made), None))


def twice(homes: list[set[tuple[str, str]]]) -> set[tuple[str, str]]:
    return {pair for i, home in enumerate(homes) for other in homes[:i] for pair in home & other}


def test_a_mistake_stands_in_one_home():
    sources = {path: (ROOT / "tests" / path).read_text("utf-8") for path in TABLES}
    tables = [[of_table(sources[path], name) for name in TABLES[path]] for path in TABLES]
    cases = set().union(*(of_case(path) for path in CASES.iterdir() if path.is_dir()))
    assert len(cases) > 50 and all(table for home in tables for table in home)
    assert {("loss_type", "sigmod"), ("sync_ref_model", "true"), ("max_prompt_length", "512")} <= cases
    assert twice([cases, *(set().union(*home) for home in tables)]) == AGAIN


@pytest.mark.parametrize("row", ["{'beta': -1}, 'beta'", "'seed: 1\\nbeta: -1', 'beta'", "['--beta', '-1'], 'beta'"])
def test_a_mistake_in_two_homes_would_be_seen(row):
    case = offending(settings("--beta=-1"), None)
    assert twice([of_table(f"T = [({row})]", "T"), case]) == case
    assert twice([of_table(f"T = [({row.replace('-1', '-2')})]", "T"), case]) == set()
