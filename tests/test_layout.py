"""What must stay true of the repository itself: import order, budgets, accelerate files, pins, README's commands."""

import ast
import configparser
import re
import shlex
from pathlib import Path

import pytest

from mdpo.objective import LOSSES, OF_TRL
from mdpo.recipe import load_recipe

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
# A module may import those in lines above its own.
ORDER = [
    {"types", "preemption"},
    {"allocations", "sharding", "ranks", "copies", "head", "json_texts", "turn_weights", "modes"},
    {"failures", "trackers", "content", "tool_calls", "message_forms"},
    {
        "marks",
        "config",
        "retired",
        "startup",
        "checkpoints",
        "losses",
        "files",
        "messages",
        "template_fit",
        "yaml_nodes",
        "effects",
        "parallelism",
    },
    {"varlen", "fused", "columns", "left_out", "stops", "spans", "counts"},
    {"sandbox", "sandbox_child", "answers", "attention", "dates", "sides", "questions", "unread"},
    {"identity", "template", "plain_texts", "settings", "tokenizer", "objective", "packing", "forms"},
    {"precision", "launcher", "saved_weights", "data", "sets", "model_folders", "values", "adapters", "caches"},
    {"render", "recipe", "logprobs", "layout_check", "options", "history", "machine", "progress", "loading"},
    {"tokens", "sums", "layout", "dropout", "reference_columns"},
    {"turns", "positions"},
    {"reference", "reference_cache", "metrics", "data_report", "report"},
    {"pairs", "late_values", "card", "sampling", "checkpointed_trainer", "run_identity", "footprint", "rollouts"},
    {"memory", "preflight"},
    {"planning"},
    {"out_of_memory"},
    {"guarded_trainer", "run_folder", "shown", "plots", "policies", "generation", "evaluation"},
    {"mask_page", "page"},
]


def imports(path: Path) -> set[str]:
    """Names of modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def test_stages_import_downward_only():
    modules = {p.stem: p for p in (ROOT / "mdpo").glob("*.py") if p.stem != "__init__"}
    level = {name: n for n, names in enumerate(ORDER) for name in names}
    assert set(level) == set(modules), "name new modules in ORDER"
    for name, path in modules.items():
        for other in (i.removeprefix("mdpo.") for i in imports(path) if i.startswith("mdpo.")):
            assert level[other] < level[name], f"mdpo/{name}.py imports mdpo/{other}.py"
        assert not {"dpo_trainer", "run_dpo"} & imports(path), name


def test_nothing_imports_scripts_or_tests():
    files = [ROOT / "run_dpo.py", ROOT / "dpo_trainer.py", *(ROOT / "mdpo").glob("*.py")]
    names = {"scripts", "tests", *(path.stem for path in (ROOT / "scripts").glob("*.py"))}
    assert len(files) > 15 and "show_masks" in names
    for path in files:
        assert not {name.split(".")[0] for name in imports(path)} & names, path


@pytest.mark.parametrize(
    ("pattern", "most"), [("run_dpo.py", 150), ("dpo_trainer.py", 600), ("mdpo/*.py", 250), ("scripts/*.*", 150)]
)
def test_files_stay_small(pattern, most):
    files = list(ROOT.glob(pattern))
    assert files
    for path in files:
        assert path.read_text(encoding="utf-8").count("\n") <= most, path


def test_modifications_are_closed_and_in_the_readme():
    text = (ROOT / "dpo_trainer.py").read_text(encoding="utf-8")
    opened = re.findall(r"#{14} MODIFICATION (\d+): \S", text)
    closed = re.findall(r"#{14} MODIFICATION (\d+) END", text)
    assert opened == closed and len(opened) >= 4
    table = re.findall(r"^\| (\d+) \| ", README, re.MULTILINE)
    assert sorted(set(opened)) == sorted(table)


def accelerate_files():
    return sorted((ROOT / "training_configs").glob("*.yaml"))


def test_every_loss_is_in_the_readme():
    table = README.partition("\n## Losses\n")[2].partition("\n## ")[0]
    names = re.findall(r"^\| `(\w+)`( †)? \| `", table, re.MULTILINE)
    assert [name for name, _ in names] == list(LOSSES)
    assert [name for name, ours in names if not ours] == list(OF_TRL)


# Processes, machines, ZeRO stage (None without DeepSpeed), precision, CPU only.
ACCELERATE = {
    "cpu.yaml": (1, 1, None, "no", True),
    "single_gpu.yaml": (1, 1, None, "bf16", False),
    "zero2_cpu.yaml": (2, 1, 2, "no", True),
    "zero2_for_dpo.yaml": (8, 1, 2, "bf16", False),
    "zero2_pf.yaml": (8, 1, 2, "bf16", False),
    "zero3_cpu.yaml": (2, 1, 3, "no", True),
    "zero3_for_dpo.yaml": (8, 1, 3, "bf16", False),
    "zero3_offload_for_dpo.yaml": (8, 1, 3, "bf16", False),
    "zero3_pf.yaml": (8, 1, 3, "bf16", False),
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
    found = (config.num_processes, config.num_machines, deepspeed.get("zero_stage"), config.mixed_precision)
    assert (*found, config.use_cpu) == ACCELERATE[path.name]
    assert config.distributed_type == ("DEEPSPEED" if deepspeed else "NO")
    assert set(deepspeed) <= set(vars(launch_command_parser().parse_args(["run_dpo.py"])))
    assert not {"gradient_accumulation_steps", "gradient_clipping", "deepspeed_config_file"} & set(deepspeed)
    offload = "cpu" if "offload" in path.name else "none"
    if deepspeed:
        assert deepspeed["offload_optimizer_device"] == deepspeed["offload_param_device"] == offload
        assert deepspeed["deepspeed_multinode_launcher"] == "standard"
        three = deepspeed["zero_stage"] == 3  # else a checkpoint holds empty tensors
        assert deepspeed["zero3_init_flag"] is deepspeed.get("zero3_save_16bit_model", False) is three


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
    for pin in ("torch==2.13.0", "numpy>=1.26.4,<2.0", "pyarrow>=21,<26", "transformers==", "trl==", "deepspeed=="):
        assert pin in requires, pin
    assert {"flash", "quickstart", "evaluate", "dev"} <= set(config["options.extras_require"])
    assert config["options"]["packages"].split() == ["mdpo"]


def commands() -> list[str]:
    """Every line of README's code blocks and indented commands that starts one of our programs."""
    lines = re.findall(r"^(?:    )?((?:accelerate launch|python|make|pip|sbatch) [^\n`]*)$", README, re.MULTILINE)
    lines += re.findall(r"`((?:accelerate launch|python|make) [^\n`]*)`", README)
    return sorted({line.split("    #")[0].strip() for line in lines})


def test_readme_has_the_commands_that_users_come_for():
    assert "accelerate launch --config_file zero2_for_dpo.yaml run_dpo.py" in commands()
    assert {"make quickstart", "make test"} <= set(commands())
    assert {command.split()[0] for command in commands()} == {"accelerate", "python", "make", "pip", "sbatch"}


@pytest.mark.parametrize("command", commands())
def test_readme_commands_parse(command, monkeypatch, tmp_path):
    """Files and targets exist; what goes to the launcher is accepted by it, and what goes to run_dpo.py by the recipe
    parser."""
    words = shlex.split(command.replace("RECIPE.yaml", "recipes/smollm2-135m/dpo/config_quickstart.yaml"))
    monkeypatch.chdir(ROOT)
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:2]) <= set(targets), command
        return
    if words[0] == "pip":
        return
    files = [w for w in words if re.search(r"\.(py|yaml|slurm)$", w) and not w.startswith("-")]
    assert files
    for file in files:
        assert (ROOT / file).exists(), f"{command}: {file}"
    if "run_dpo.py" in words and "--help" not in words:
        load_recipe(words[words.index("run_dpo.py") + 1 :])
    if words[0] == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        assert launch_command_parser().parse_args(words[2:]).training_script == "run_dpo.py"
    if words[0] == "sbatch":
        load_recipe(words[words.index("scripts/launch.slurm") + 2 :])
