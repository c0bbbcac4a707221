"""What recipes/smollm2-135m/expected.txt says of the laptop recipes is what they end with, and what README says."""

import json
import math
import re
import subprocess
import sys

import pytest
from repository import ROOT

from mdpo.reporting.run_report import REPORT, SHOWN

FAMILY = ROOT / "recipes" / "smollm2-135m"
MODEL = ROOT / "models" / "smollm2-135m-instruct"
RECIPES = ("quickstart", "rpo", "margin", "turn_weights")
KEYS = dict(SHOWN)  # what a figure is called -> its metric


def expected() -> dict[str, dict[str, tuple[float, float, float]]]:
    """recipe -> figure -> (before, after, off by), of expected.txt."""
    found: dict[str, dict] = {}
    for line in (FAMILY / "expected.txt").read_text(encoding="utf-8").splitlines():
        if row := re.fullmatch(r"(config_\w+\.yaml) {2,}(\D+?) +(-?[\d.]+) +(-?[\d.]+) +([\d.]+)", line):
            found.setdefault(row[1], {})[row[2]] = tuple(float(number) for number in row.groups()[2:])
    return found


def test_every_figure_of_every_laptop_recipe_is_there():
    """Before training policy and reference are one model: no margin, and ln 2, or what the recipe adds to it."""
    found = expected()
    assert set(found) == {f"config_{name}.yaml" for name in RECIPES}
    for name, figures in found.items():
        assert list(figures) == list(KEYS), name
        assert (FAMILY / "dpo" / name).is_file()
        assert figures["reward accuracy"][0] == figures["mean reward margin"][0] == 0
        assert all(off > 0 for _, _, off in figures.values())
    before = {name: figures["loss"][0] for name, figures in found.items()}
    assert before["config_quickstart.yaml"] == before["config_turn_weights.yaml"] == round(math.log(2), 4)
    towards = [math.log1p(math.exp(margin)) for margin in (1, 2)]  # -log sigmoid(0 - margin), half of the pairs each
    assert before["config_margin.yaml"] == pytest.approx(sum(towards) / 2, abs=1e-4)


def test_the_quickstart_s_figures_are_those_of_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    figures = expected()["config_quickstart.yaml"]
    assert figures["loss"][1] == 0.1541 and figures["reward accuracy"][1] == 0.9844
    for name, (before, after, _) in figures.items():
        assert re.search(rf"│ {name} +│ +{before:.4f} │ +{after:.4f} │", readme), name


@pytest.mark.parametrize("name", RECIPES[1:])
def test_headers_say_the_same(name):
    text = (FAMILY / "dpo" / f"config_{name}.yaml").read_text(encoding="utf-8")
    ((before, after, accuracy),) = re.findall(
        r"^# To expect of held-out pairs: loss ([\d.]+) -> ([\d.]+), accuracy ([\d.]+)\b.* \(expected\.txt\)$",
        text,
        re.MULTILINE,
    )
    figures = expected()[f"config_{name}.yaml"]
    assert (float(before), float(after)) == figures["loss"][:2] and float(accuracy) == figures["reward accuracy"][1]


@pytest.mark.slow
@pytest.mark.skipif(not MODEL.exists(), reason="needs models/smollm2-135m-instruct: scripts/prepare_quickstart.py")
@pytest.mark.parametrize("name", [RECIPES[0], *(pytest.param(name, marks=pytest.mark.long) for name in RECIPES[1:])])
def test_a_run_ends_with_them(name, tmp_path):
    recipe = f"config_{name}.yaml"
    command = [sys.executable, "run_dpo.py", str(FAMILY / "dpo" / recipe), f"--output_dir={tmp_path / 'out'}"]
    done = subprocess.run([*command, "--report_to=none"], cwd=ROOT, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "out" / REPORT).read_text(encoding="utf-8"))
    for figure, (before, after, off_by) in expected()[recipe].items():
        assert report["before"][KEYS[figure]] == pytest.approx(before, abs=off_by), figure
        assert report["after"][KEYS[figure]] == pytest.approx(after, abs=off_by), figure
    if name == "quickstart":
        assert report["warnings"] == [] and len(report["answers"]) == 8
