"""README.md, CONTRIBUTING.md and docs/: commands can be run, links lead somewhere, tables say what the code says."""

import argparse
import configparser
import importlib.util
import json
import os
import re
import shlex
import sys
from functools import cache
from pathlib import Path

import pytest
from errors import refused

from mdpo.config.parsing import FIELDS, ROOT
from mdpo.config.recipe import key_facts, key_groups, load_recipe
from mdpo.errors import UserError
from mdpo.loss.registry import LOSSES, OF_TRL
from scripts.dev import draw_masks, healthy_runs, recipe_keys, recipe_memory

QUICKSTART = "recipes/smollm2-135m/dpo/config_quickstart.yaml"
LOG = ROOT / "docs/log.md"  # a history: it names files and commands that are gone
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = [*ROOT.glob("benchmarks/*.md"), *ROOT.glob("recipes/**/*.md"), *ROOT.glob("mdpo/*/README.md")]
TOPS = ("mdpo", "scripts", "recipes", "tests", "docs", "training_configs", "benchmarks")
PROGRAMS = "accelerate launch|python|make|pip|sbatch|bash|hf|wandb"
PLACEHOLDERS = {"RECIPE.yaml": QUICKSTART, "RECIPE": QUICKSTART, "FAMILY": "smollm2-135m"}
WRITTEN_BY_A_RUN = {"recipe_resolved.yaml"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


# ---- commands


def commands(text: str) -> list[str]:
    """Lines of shell blocks and of blocks by indentation, and code within a line, that start a program."""
    blocks = "\n".join(re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = re.findall(rf"^((?:{PROGRAMS}) .*)$", blocks, re.MULTILINE)
    lines += re.findall(rf"^    ((?:{PROGRAMS}) .*)$", prose, re.MULTILINE)
    lines += re.findall(rf"`((?:{PROGRAMS}) [^\n`]*)`", prose)
    return sorted({re.split(r" +#", line)[0].strip() for line in lines})


class Parsed(Exception):
    """What a script's parser was given, in place of all that the script would do next."""


def script_arguments(path: str, argv: list[str], monkeypatch) -> list[str]:
    """The arguments that a script's own parser leaves to the recipe. Raises UserError or SystemExit for others."""
    known, parse = argparse.ArgumentParser.parse_known_args, argparse.ArgumentParser.parse_args
    spec = importlib.util.spec_from_file_location(f"page_{Path(path).stem}", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def stop(parser, args=None, namespace=None):
        raise Parsed(known(parser, args, namespace)[1])

    def stop_strictly(parser, args=None, namespace=None):
        with monkeypatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_known_args", known)
            parse(parser, args, namespace)
        raise Parsed([])

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
        patch.setattr(argparse.ArgumentParser, "parse_args", stop_strictly)
        with pytest.raises(Parsed) as parsed:
            module.main(argv)
    return parsed.value.args[0]


def check_command(command: str, monkeypatch) -> None:
    """Raises where a file, a Makefile target, an extra of setup.cfg, a launcher's, script's or recipe's option of it is
    not there."""
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(command)]
    program, argv = words[0], words[1:]
    for word in words:
        if re.search(r"\.(py|yaml|slurm|sh)$", word) and not word.startswith("-"):
            assert (ROOT / word).exists(), f"{command}: {word}"
    if program == "make":
        assert argv[0] in re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE), command
    elif program == "pip":
        config = configparser.ConfigParser()
        config.read(ROOT / "setup.cfg")
        extras = {name for word in argv for group in re.findall(r"\[(.+)\]", word) for name in group.split(",")}
        assert argv[0] == "install" and extras <= set(config["options.extras_require"]), command
    elif program in ("hf", "wandb"):
        assert Path(sys.executable).with_name(program).exists(), command
    elif program == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        launch = launch_command_parser().parse_args(argv[1:])
        assert launch.training_script == "run_dpo.py", command
        load_recipe(launch.training_script_args)
    elif program == "sbatch":
        load_recipe(argv[argv.index("scripts/launch.slurm") + 2 :])
    elif argv[0] == "-m":
        assert argv[1] == "pytest" or (ROOT / f"{argv[1].replace('.', '/')}.py").exists(), command
    elif argv[0] == "run_dpo.py":
        if argv[1:] != ["--help"]:
            load_recipe(argv[1:])
    elif program == "python" and argv[0].startswith("scripts/"):
        rest = script_arguments(argv[0], argv[1:], monkeypatch)
        if rest:
            load_recipe(rest)


def all_commands() -> list[str]:
    return sorted({command for page in PAGES if page != LOG for command in commands(page.read_text(encoding="utf-8"))})


@pytest.mark.parametrize("command", all_commands())
def test_commands_can_be_run(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    check_command(command, monkeypatch)


WRONG = """
    make qickstart
```sh
accelerate launch --config_fil zero2_for_dpo.yaml run_dpo.py
accelerate launch --config_file zero2_for_dpo.yaml run_dpo.py --bta=0.2    # a remark
python scripts/merge_adapter.py one two --dtyp=float32
```
The command `python scripts/show_masks.py RECIPE.yaml --htlm masks.html`, then `pip install '.[evaluation]'`
and `python scripts/nothing.py`. Every launcher has to make the model.
```text
make nothing
```
"""


def test_wrong_commands_are_found(monkeypatch):
    """Each with a slip of one letter, but for the last two words that look like one and the block of text."""
    monkeypatch.chdir(ROOT)
    found = commands(WRONG)
    assert len(found) == 7
    for command in found:
        with pytest.raises((AssertionError, UserError, SystemExit)):
            check_command(command, monkeypatch)


def test_readme_has_the_commands_that_users_come_for():
    found = commands(read("README.md"))
    assert "accelerate launch --config_file zero2_for_dpo.yaml run_dpo.py" in found
    assert {"make quickstart", "make test", "make test-slow"} <= set(found)
    assert {command.split()[0] for command in all_commands()} == {
        *("accelerate", "python", "make", "pip", "sbatch", "bash", "hf", "wandb")
    }


# ---- links and paths


def anchors(text: str) -> set[str]:
    """What GitHub makes of headings: lower case, without punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(text: str, folder: Path) -> list[str]:
    broken = []
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if re.match(r"https?:", target):
            continue
        file = folder / path if path else None
        if file is not None and not file.exists():
            broken.append(target)
        elif anchor and anchor not in anchors(text if file is None else file.read_text(encoding="utf-8")):
            broken.append(target)
    return broken


@cache
def names() -> set[str]:
    """Names of all files of the repository, wherever they are."""
    below = {name for top in TOPS for _, _, files in os.walk(ROOT / top) for name in files}
    return below | {path.name for path in ROOT.iterdir()}


def missing_paths(text: str) -> list[str]:
    """Paths in backticks that are not there: those that begin with a folder of the repository, and bare names of
    files, which may be anywhere in it. FAMILY, NAME and * stand for any name."""
    missing = []
    for code in re.findall(r"`([\w.*/-]+)`", text):
        top = code.partition("/")[0]
        if top in TOPS and "/" in code:
            pattern = re.sub(r"\b(?:FAMILY|RECIPE)\b|NAME", "*", code.rstrip("/"))
            if not list(ROOT.glob(pattern)):
                missing.append(code)
        elif re.fullmatch(r"[\w.-]+\.(?:py|sh|slurm|cfg|toml|cff|yaml)", code) and code not in WRITTEN_BY_A_RUN:
            if code not in names():
                missing.append(code)
    return missing


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=name_of)
def test_links_and_paths_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    assert not broken_links(text, page.parent)
    if page != LOG:
        assert not missing_paths(text)


def test_code_and_recipes_point_to_pages_that_exist():
    """Messages, comments and recipes name pages of docs/; README has no sections left that a message could mean."""
    places = [*ROOT.glob("*.py"), ROOT / "setup.cfg", *ROOT.glob("recipes/**/*.yaml"), *ROOT.glob("benchmarks/*.*")]
    places += [path for top in ("mdpo", "scripts") for path in ROOT.glob(f"{top}/**/*.py")]
    named = [page for path in places for page in re.findall(r"docs/[\w-]+\.\w+", path.read_text(encoding="utf-8"))]
    assert {"docs/rows.md", "docs/clusters.md"} <= set(named)
    assert not [page for page in named if not (ROOT / page).exists()]


def test_wrong_links_and_paths_are_found():
    text = "# A page\n[a](docs/data.md) [b](docs/dat.md) [c](docs/data.md#dataset) [d](#a-page) [e](#the-page) `x`\n"
    assert broken_links(text, ROOT) == ["docs/dat.md", "docs/data.md#dataset", "#the-page"]
    text = "`mdpo/loss/losses.py` `mdpo/loss/` `test_maks.py` `recipes/FAMILY/README.md` `recipe_resolved.yaml` `beta`"
    assert missing_paths(text) == ["mdpo/loss/losses.py", "test_maks.py"]
    assert len(PAGES) > 15 and len(OTHERS) > 15 and "launch.slurm" in names()


def uneven_rows(text: str) -> list[str]:
    """Rows of tables with more or fewer cells than the row before: an unescaped | in a cell moves all that follow."""
    uneven, cells = [], 0
    for line in text.splitlines():
        count = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        if count and cells and count != cells:
            uneven.append(line)
        cells = count
    return uneven


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=name_of)
def test_tables_are_even(page):
    assert not uneven_rows(page.read_text(encoding="utf-8"))


def test_an_uneven_table_is_found():
    assert uneven_rows("| a | b |\n|---|---|\n| 1 | x \\| y |\n| 2 | x | y |\n\n| a |\n|---|\n") == ["| 2 | x | y |"]


# ---- what pages say


def test_readme_fits_one_sitting():
    assert 6000 < len((ROOT / "README.md").read_bytes()) <= 9000
    first = read("README.md").split("\n## ")[0]
    assert "docs/masks.svg" in first and "make quickstart" in first and "zero2_for_dpo.yaml" in first


def test_the_index_has_each_page_once():
    listed = re.findall(r"^\| \[([\w-]+\.md)\]\(\1\) \| \S", read("docs/README.md"), re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in (ROOT / "docs").glob("*.md") if path.name != "README.md")


def test_every_loss_is_on_its_page():
    named = re.findall(r"^\| `(\w+)`( †)? \| `", read("docs/losses.md"), re.MULTILINE)
    assert [name for name, _ in named] == list(LOSSES)
    assert [name for name, ours in named if not ours] == list(OF_TRL)
    assert f"{len(LOSSES)} losses" in read("docs/README.md")


def test_recipe_keys_are_those_of_the_dataclasses():
    text = read("docs/recipe-keys.md")
    assert recipe_keys.filled(text) == text, "python -m scripts.dev.recipe_keys writes the page"
    ours = {key for title, keys in key_groups().items() if "ours" in title for key in keys}
    assert ours == set(re.findall(r"^\| `(\w+)` \|", text.partition("<!-- keys end -->\n\n## ")[0], re.MULTILINE))
    assert {"mask_user_turns", "dataset_mixer", "shared_prefix"} <= ours and "beta" not in ours
    kind, default, said = key_facts("max_bad_fraction")
    assert f"| `max_bad_fraction` | {kind} | `{default}` | {said} |" in text


def test_a_stale_page_of_keys_is_named(tmp_path, monkeypatch):
    text = read("docs/recipe-keys.md")
    page = tmp_path / "recipe-keys.md"
    page.write_text(text.replace("| `0.2` |", "| `0.3` |"), encoding="utf-8")
    assert page.read_text(encoding="utf-8") != text
    monkeypatch.setattr(recipe_keys, "PAGE", page)
    with refused("recipe-keys.md", "python -m scripts.dev.recipe_keys"):
        recipe_keys.main(["--check"])
    recipe_keys.main([])
    assert page.read_text(encoding="utf-8") == text
    recipe_keys.main(["--check"])
    page.write_text(text.replace("<!-- keys: Data (ours) -->", ""), encoding="utf-8")
    with refused("recipe-keys.md", "<!-- keys: TITLE -->", "Data (ours)"):
        recipe_keys.main([])
    with refused("chek", "--check"):
        recipe_keys.main(["--chek"])


@pytest.mark.parametrize("script", [draw_masks, healthy_runs, recipe_keys, recipe_memory])
def test_scripts_for_this_repository_say_what_they_do(script, capsys):
    script.main(["--help"])
    assert capsys.readouterr().out.strip() == script.__doc__.strip()


def test_keys_of_trl_on_the_page_have_its_defaults():
    table = read("docs/recipe-keys.md").partition("## Keys of TRL to know first")[2]
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| (.*?) ?\| ", table, re.MULTILINE)
    assert len(rows) >= 6
    for cells, default in rows:
        for key in re.findall(r"`(\w+)`", cells):
            assert key in FIELDS and key_facts(key)[1] is not None or key in ("model_name_or_path", "loss_weights")
        if re.fullmatch(r"`?[\d.]+`?|`(?:true|false)`", default):
            assert json.loads(default.strip("`")) == key_facts(re.findall(r"`(\w+)`", cells)[0])[1], cells


@pytest.mark.parametrize(("title", "most"), [("A pair, from its row to its loss", 12), ("A checkpoint, from", 6)])
def test_a_newcomer_s_way_is_short(title, most):
    """Numbered from 1, one file a line, none twice."""
    lines = read("docs/architecture.md").partition(f"**{title}")[2].split("\n\n")[1].splitlines()
    files = [re.match(r"(\d+)\. `([\w./]+\.py)`: \S", line) for line in lines]
    assert all(files) and [int(match[1]) for match in files] == list(range(1, len(files) + 1))
    assert 4 <= len({match[2] for match in files}) == len(files) <= most


def test_readme_names_every_recipe():
    """Beside config_full.yaml and config_lora.yaml, which all have; `iter2_` and `iter3_` with `moved_reference` and
    `fixed_reference` are four files."""
    rows = re.findall(r"^\| `([\w.-]+)` \| [^|]* \|([^|]*)\|$", read("README.md"), re.MULTILINE)
    assert {family for family, _ in rows} == {path.name for path in (ROOT / "recipes").iterdir()}
    for family, cell in rows:
        named = {"full", "lora", *re.findall(r"`(\w+)`", cell)}
        before = {name for name in named if name.endswith("_")}
        after = {name for name in named if name.endswith("_reference")}
        named = named - before - after | {a + b for a in before for b in after}
        files = (ROOT / "recipes" / family / "dpo").glob("config_*.yaml")
        assert named == {path.stem.removeprefix("config_") for path in files}, family


def test_the_six_files_to_read_first():
    table = read("README.md").partition("## Read these six files first")[2].partition("\n## ")[0]
    assert len(re.findall(r"^\| `[\w/]+\.py` \| \S", table, re.MULTILINE)) == 6
