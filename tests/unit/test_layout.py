"""What must stay true of the repository itself: import order, budgets, accelerate files, pins."""

import ast
import configparser
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from repository import ROOT
from setuptools import find_packages

# A package (or a module beside them) may import those in lines above its own.
ORDER = [
    {"errors", "storage", "sequences"},
    {"types"},
    {"console", "ranks"},
    {"masking", "forward"},
    {"loss"},
    {"config"},
    {"memory"},
    {"data"},
    {"reference"},
    {"runs"},
    {"reporting", "rollouts"},
]
PACKAGES = {"config", "data", "masking", "forward", "loss", "reference", "runs", "memory", "reporting", "rollouts"}
LEVEL = {name: n for n, names in enumerate(ORDER) for name in names}


def imports(source: str) -> set[str]:
    """Names of modules that a file imports, anywhere in it; of `from mdpo import x` mdpo.x."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"mdpo.{alias.name}" for alias in node.names} if node.module == "mdpo" else {node.module}
    return names


def upward(package: str, source: str) -> list[str]:
    """The imports of a file of `package` that go up or sideways."""
    others = {name.split(".")[1] for name in imports(source) if name.startswith("mdpo.")} - {package}
    return sorted(other for other in others if LEVEL[other] >= LEVEL[package])


def modules() -> list[Path]:
    return sorted((ROOT / "mdpo").rglob("*.py"))


def test_packages_import_downward_only():
    beside = {path.stem for path in (ROOT / "mdpo").glob("*.py")} - {"__init__"}
    assert {path.parent.name for path in (ROOT / "mdpo").glob("*/__init__.py")} == PACKAGES
    assert beside | PACKAGES == set(LEVEL), "name new packages in ORDER"
    assert len(modules()) > 60
    for path in modules():
        package = path.relative_to(ROOT / "mdpo").parts[0].removesuffix(".py")
        if package == "__init__":
            continue
        source = path.read_text(encoding="utf-8")
        assert not upward(package, source), path
        assert not {"dpo_trainer", "run_dpo"} & imports(source), path


def test_an_upward_import_would_be_seen():
    assert upward("loss", "from mdpo.config import schema") == ["config"]
    assert upward("masking", "def f():\n    import mdpo.forward.collators") == ["forward"]
    assert upward("data", "from mdpo import runs, types") == ["runs"]
    assert not upward("data", "from mdpo.data import rows\nfrom mdpo.config.schema import MDPOConfig")


def test_the_page_draws_the_packages_in_their_order():
    """Top to bottom on the page is from the last line of ORDER to the first; packages of one line share it."""
    drawing = (ROOT / "docs/architecture.md").read_text(encoding="utf-8").partition("mdpo/\n")[2].partition("```")[0]
    rows = [set(re.findall(r"\b(\w+)(?:/|\.py)(?= )", line)) for line in drawing.splitlines()]
    assert rows == ORDER[::-1]


def test_each_package_says_what_it_is_for():
    for package in PACKAGES:
        text = (ROOT / "mdpo" / package / "README.md").read_text(encoding="utf-8")
        assert text.startswith(f"# mdpo.{package}\n") and text.count("\n") <= 12, package
        for part in ("**In**", "**Out**", "**Read first**"):
            assert part in text, package
        named = re.findall(r"`(\w+\.py)`", text)
        assert named and all((ROOT / "mdpo" / package / name).is_file() for name in named), package


def test_nothing_imports_scripts_or_tests():
    files = [ROOT / "run_dpo.py", ROOT / "dpo_trainer.py", *modules()]
    names = {"scripts", "tests", *(path.stem for path in (ROOT / "scripts").rglob("*.py"))}
    assert len(files) > 15 and "show_masks" in names
    for path in files:
        assert not {name.split(".")[0] for name in imports(path.read_text(encoding="utf-8"))} & names, path


def of_tests(source: str) -> set[str]:
    """The test modules that a file imports."""
    return {name for name in imports(source) if name.split(".")[-1].startswith("test_")}


def test_no_test_module_imports_another():
    """What two of them need is in tests/helpers, which imports none."""
    folders = ("unit", "integration", "faults", "helpers")
    files = {folder: sorted((ROOT / "tests" / folder).glob("*.py")) for folder in folders}
    assert all(len(found) >= 5 for found in files.values())
    assert {path.parent.name for path in (ROOT / "tests").rglob("test_*.py")} == set(folders) - {"helpers"}
    for path in sum(files.values(), [ROOT / "tests/conftest.py"]):
        assert not of_tests(path.read_text(encoding="utf-8")), path


def test_an_import_between_test_modules_would_be_seen():
    assert of_tests("def f():\n    from test_masks import ROWS") == {"test_masks"}
    assert of_tests("from unit.test_masks import ROWS\nimport tiny") == {"unit.test_masks"}
    assert not of_tests("from templates import ROWS\nimport pytest")


def lines(source: str) -> int:
    """Of a file, without those of its import statements: imports fold by length, code by what it says."""
    statements = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Import | ast.ImportFrom)]
    return source.count("\n") - sum(n.end_lineno - n.lineno + 1 for n in statements)


def test_a_unit_test_starts_no_process():
    for start in (lambda: subprocess.run(["true"]), lambda: os.system("true"), os.fork):
        with pytest.raises(RuntimeError, match="test_a_unit_test_starts_no_process starts a process"):
            start()


@pytest.mark.parametrize(
    ("pattern", "most"),
    [("run_dpo.py", 150), ("dpo_trainer.py", 480), ("mdpo/**/*.py", 250), ("scripts/**/*.py", 150)],
)
def test_files_stay_small(pattern, most):
    files = list(ROOT.glob(pattern))
    assert files
    for path in files:
        assert lines(path.read_text(encoding="utf-8")) <= most, path


def test_lines_are_counted_without_imports():
    folded = "import os\n\nfrom x import (\n    a,\n    b,\n)\n\n\ndef f():\n    import y\n\n    return 1\n"
    assert lines(folded) == lines(folded.replace("(\n    a,\n    b,\n)", "a, b")) == 6
    assert lines("x = 1\n" * 151) == 151 and lines('"""import x\nfrom y import z"""\n') == 2


def test_modifications_are_closed_and_on_their_page():
    text = (ROOT / "dpo_trainer.py").read_text(encoding="utf-8")
    opened = re.findall(r"#{14} MODIFICATION (\d+): \S", text)
    closed = re.findall(r"#{14} MODIFICATION (\d+) END", text)
    assert opened == closed and len(opened) >= 4
    page = (ROOT / "docs/trl-differences.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| (\d+) \| ", page, re.MULTILINE)
    assert sorted(set(opened)) == sorted(table)


def accelerate_files():
    return sorted((ROOT / "training_configs").glob("*.yaml"))


# Processes, machines, ZeRO stage (None without DeepSpeed), precision, CPU only.
ACCELERATE = {
    "cpu.yaml": (1, 1, None, "no", True),
    "single_gpu.yaml": (1, 1, None, "bf16", False),
    "zero2_cpu.yaml": (2, 1, 2, "no", True),
    "zero2_for_dpo.yaml": (8, 1, 2, "bf16", False),
    "zero2_pf.yaml": (8, 1, 2, "bf16", False),
    "zero3_cpu.yaml": (2, 1, 3, "no", True),
    "zero3_for_dpo.yaml": (8, 1, 3, "bf16", False),
    "zero3_four_nodes.yaml": (32, 4, 3, "bf16", False),
    "zero3_offload_for_dpo.yaml": (8, 1, 3, "bf16", False),
    "zero3_pf.yaml": (8, 1, 3, "bf16", False),
    "zero3_plus_plus_two_nodes.yaml": (16, 2, 3, None, False),  # the recipe says bf16, the DeepSpeed file "auto"
    "zero3_sequence_parallel.yaml": (8, 1, 3, "bf16", False),
    "zero3_two_nodes.yaml": (16, 2, 3, "bf16", False),
}


@pytest.mark.parametrize("path", accelerate_files(), ids=lambda p: p.name)
def test_accelerate_files_load(path):
    """Through accelerate's own loader, which refuses unknown keys; those in deepspeed_config it takes unread, and so
    they are compared with the launcher's flags. No recipe's numbers: TrainingArguments fills them in."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    config = load_config_from_file(str(path))
    deepspeed = config.deepspeed_config
    whole = deepspeed_file_of(deepspeed)
    stage = whole["stage"] if whole else deepspeed.get("zero_stage")
    found = (config.num_processes, config.num_machines, stage, config.mixed_precision)
    assert (*found, config.use_cpu) == ACCELERATE[path.name]
    assert config.distributed_type == ("DEEPSPEED" if deepspeed else "NO")
    assert set(deepspeed) <= set(vars(launch_command_parser().parse_args(["run_dpo.py"])))
    assert not {"gradient_accumulation_steps", "gradient_clipping"} & set(deepspeed)
    offload = "cpu" if "offload" in path.name else None if whole else "none"
    if deepspeed:
        assert deepspeed.get("offload_optimizer_device") == deepspeed.get("offload_param_device") == offload
        assert deepspeed["deepspeed_multinode_launcher"] == "standard"
        saves = (whole or {}).get("stage3_gather_16bit_weights_on_model_save")
        saves = saves if whole else deepspeed.get("zero3_save_16bit_model", False)
        assert deepspeed["zero3_init_flag"] is saves is (stage == 3)  # else a checkpoint holds empty tensors


def deepspeed_file_of(deepspeed: dict) -> dict:
    """zero_optimization of the DeepSpeed file that an accelerate file names, by DeepSpeed's own reading of it; {}
    without one. What the recipe decides is "auto" there."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    if "deepspeed_config_file" not in deepspeed:
        return {}
    engine = json.loads((ROOT / deepspeed["deepspeed_config_file"]).read_text(encoding="utf-8"))
    zero = engine.pop("zero_optimization")
    assert {name: value for name, value in engine.items() if value != "auto"} == {
        kind: {"enabled": "auto"} for kind in ("bf16", "fp16")
    }
    assert {"gradient_clipping", "gradient_accumulation_steps", "train_micro_batch_size_per_gpu"} <= set(engine)
    DeepSpeedZeroConfig(**zero)  # raises for an unknown key
    return zero


def test_an_unknown_accelerate_key_would_be_seen(tmp_path):
    from accelerate.commands.config.config_args import load_config_from_file

    wrong = tmp_path / "wrong.yaml"
    wrong.write_text((ROOT / "training_configs/cpu.yaml").read_text() + "num_proceses: 2\n")
    with pytest.raises(ValueError, match="num_proceses"):
        load_config_from_file(str(wrong))


def test_links_of_older_names():
    assert (ROOT / "zero2_for_dpo.yaml").resolve() == ROOT / "training_configs/zero2_for_dpo.yaml"
    for stage in (2, 3):
        link = ROOT / f"training_configs/zero{stage}_pf.yaml"
        assert link.is_symlink() and link.resolve().name == f"zero{stage}_for_dpo.yaml"
    assert [path.name for path in accelerate_files()] == list(ACCELERATE)


def test_pins():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    requires = config["options"]["install_requires"]
    assert config["options"]["python_requires"] == ">=3.11,<3.12"  # no other has been run
    for pin in ("torch==2.13.0", "numpy>=1.26.4,<2.0", "pyarrow>=21,<26", "transformers==", "trl==", "deepspeed=="):
        assert pin in requires, pin
    assert {"flash", "quickstart", "evaluate", "dev"} <= set(config["options.extras_require"])
    assert config["options"]["packages"] == "find:"
    assert PACKAGES <= {name.removeprefix("mdpo.") for name in find_packages(str(ROOT), include=["mdpo*"])}
