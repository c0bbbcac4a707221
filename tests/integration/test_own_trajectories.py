"""docs/your-own-trajectories.md does what it says: its blocks are run from the first to the last, and what it shows is
what comes out. The page alone has the commands: nothing of it is repeated here."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from repository import ROOT

from mdpo.reporting.token_view import END, SUPERVISED

PAGE = ROOT / "docs" / "your-own-trajectories.md"
MODEL = ROOT / "models" / "smollm2-135m-instruct"
LINKED = ("run_dpo.py", "dpo_trainer.py", "mdpo", "scripts", "recipes", "models", "training_configs")
pytestmark = pytest.mark.skipif(not MODEL.exists(), reason="needs models/smollm2-135m-instruct: make model")


@dataclass
class Block:
    """A command or a program of the page, and the texts that it shows behind it."""

    kind: str
    text: str
    shown: list[tuple[str, str]] = field(default_factory=list)

    @property
    def script(self) -> str:
        """The repository's program that it starts, "" if none."""
        return next((word for word in shlex.split(self.text) if word.endswith(".py")), "") if self.kind == "sh" else ""

    def run(self, folder: Path) -> str:
        """What it prints to stdout, in a folder that stands for the repository's."""
        command = ["bash", "-euc", self.text] if self.kind == "sh" else [sys.executable, "-c", self.text]
        paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = {**os.environ, "PATH": paths, "COLUMNS": "200", "WANDB_MODE": "disabled"}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=3600)
        assert done.returncode == 0, f"{self.text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return done.stdout


def blocks() -> list[Block]:
    found: list[Block] = []
    for kind, text in re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        if kind in ("sh", "python"):
            found.append(Block(kind, text))
        else:
            found[-1].shown.append((kind, text))
    return found


def spaced(text: str) -> list[str]:
    """Its lines, whatever the white space in them."""
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the repository's programs and data in it, in which the page's files may be written."""
    folder = tmp_path_factory.mktemp("own")
    for name in LINKED:
        folder.joinpath(name).symlink_to(ROOT / name)
    return folder


@pytest.fixture(scope="module")
def before_training(folder) -> dict[str, tuple[Block, str]]:
    """Everything up to the training command, run once: program or kind -> (block, its output)."""
    done = {}
    for block in blocks():
        if block.script == "run_dpo.py":
            return done
        done[block.script or f"{block.kind} {len(done)}"] = block, block.run(folder)
    raise AssertionError("the page has no training command")


def test_the_page_goes_from_trajectories_to_the_report():
    programs = [block.script or block.kind for block in blocks()]
    assert programs == ["sh", "python", "scripts/check_data.py", "scripts/show_masks.py", "run_dpo.py", "python"]


def test_the_three_attempts_that_it_shows_are_the_first_of_the_file(before_training):
    block, output = before_training["sh 0"]
    attempts = [json.loads(line) for line in output.splitlines()]
    ((kind, shown),) = block.shown
    assert kind == "json" and json.loads(shown) == attempts[0]
    assert len({row["task"] for row in attempts}) == 1 and [row["reward"] for row in attempts] == [1.0, 0.0, 0.0]
    assert attempts[0]["messages"][1]["tool_calls"]


def test_each_failure_is_paired_with_its_task_s_success(folder, before_training):
    pairs = [json.loads(line) for line in (folder / "outputs/pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = (folder / "recipes/smollm2-135m/data/trajectories.jsonl").read_text(encoding="utf-8").splitlines()
    reward = {json.dumps(row["messages"]): row["reward"] for row in map(json.loads, rows)}
    assert len(pairs) == 32
    for pair in pairs:
        assert [reward[json.dumps(pair[side])] for side in ("chosen", "rejected")] == [1.0, 0.0]
        assert pair["chosen"][0] == pair["rejected"][0] and pair["tools"][0]["function"]["name"] == "python"


def test_the_data_report_is_the_one_shown(before_training):
    block, output = before_training["scripts/check_data.py"]
    ((_, shown),) = block.shown
    printed = spaced(output)
    assert len(spaced(shown)) >= 8 and "│ outputs/pairs.jsonl (train) │ 32 │ 32 │ 0 │" in spaced(shown)
    for line in spaced(shown):
        assert line in printed, line


def test_the_supervised_words_are_the_ones_shown(folder, before_training):
    """The calls and answers of the first pair's chosen side, and no word of the tool's, the user's or the system's; the
    page for a browser marks the same."""
    block, output = before_training["scripts/show_masks.py"]
    (_, last), (_, supervised) = block.shown
    assert spaced(last)[-1] == spaced(output)[-1]
    words = shlex.split(block.text)
    at = words.index("--html")
    command = [sys.executable, *words[1:at], "--json"]
    printed = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    first, *others = map(json.loads, printed.splitlines())
    side = first["chosen"]
    kept = [token for token, bit in zip(side["tokens"], side["mask"], strict=True) if bit]
    assert "".join(kept).replace("<|im_end|>", "<|im_end|>\n") == supervised
    assert f"{len(kept)} supervised tokens" in PAGE.read_text(encoding="utf-8") and len(others) == 23
    rest = "".join(token for token, bit in zip(side["tokens"], side["mask"], strict=True) if not bit)
    assert "tool\n117<|im_end|>" in rest and '{"name": "python", "description"' in rest and "<tool_call>\n" not in rest
    page = (folder / words[at + 1]).read_text(encoding="utf-8")
    data = json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', page, re.DOTALL)[1])
    [sequence] = data["pairs"][0]["sides"][0]
    colored = [text for text, _, _, kind in sequence["tokens"] if data["kinds"][kind] in (SUPERVISED, END)]
    assert "".join(colored) == "".join(kept) and len(data["pairs"]) == 24


@pytest.mark.slow
def test_the_run_ends_with_the_figures_shown(folder, before_training):
    """And its last program reads them from the report that the training command left."""
    train, read = blocks()[-2:]
    output = train.run(folder)
    ((_, shown),) = train.shown
    report = json.loads((folder / "outputs/my-agent/run_report.json").read_text(encoding="utf-8"))
    assert report["steps"] == 6 and report["after"]["eval_pairs"] == 8 and "held-out pairs: 8" in output
    numbers = re.compile(r"-?\d+\.\d+|\d+")
    for line in spaced(shown):
        name = numbers.split(line)[0].strip()
        (printed,) = [found for found in spaced(output) if found.startswith(name)]
        close(numbers.findall(printed), numbers.findall(line))
    ((_, shown),) = read.shown
    printed = read.run(folder)
    assert [numbers.split(line)[0] for line in spaced(printed)] == [numbers.split(line)[0] for line in spaced(shown)]
    close(numbers.findall(printed), numbers.findall(shown))
    page = (folder / "outputs/my-agent/run_report.html").read_text(encoding="utf-8")
    for section in re.findall(r"^\| \*\*(.+?)\*\* \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE):
        assert re.search(rf"<h2>{section}\b", page), section
    assert f"{report['after']['eval_loss']:.4f}" in page


def close(found: list[str], wanted: list[str]) -> None:
    """Whole numbers are the same; others may be off by what another order of sums makes of six steps."""
    assert len(found) == len(wanted) > 0, (found, wanted)
    for got, number in zip(found, wanted, strict=True):
        assert float(got) == pytest.approx(float(number), rel=0.01, abs=0.02) if "." in number else got == number
