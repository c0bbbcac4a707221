"""The strict recipe: every mistake is named with its place, every good value arrives exactly."""

import dataclasses
import math
from pathlib import Path

import pytest
import yaml
from errors import refused
from trl import DPOConfig, ModelConfig, get_peft_config

from mdpo.config import precision as precision_module
from mdpo.config import recipe as recipe_module
from mdpo.config.deprecated import RETIRED_KEYS
from mdpo.config.parsing import FIELDS, PARTS, ROOT
from mdpo.config.precision import fit_to_machine, precision_note
from mdpo.config.recipe import DEFAULT_RECIPE, load_recipe
from mdpo.config.schema import DataArguments, MDPOConfig
from mdpo.config.validation import check_options

BASE = "model_name_or_path: some/model\ndataset_mixer: {a.jsonl: 1.0}\noutput_dir: out\n"  # its next line is line 4


@pytest.fixture(autouse=True)
def capable_cpu(monkeypatch):
    """A machine that changes nothing in a recipe but use_cpu; the tests of the fall-backs undo parts of it."""
    monkeypatch.setattr(precision_module, "cpu_only", lambda values: True)
    monkeypatch.setattr(precision_module, "cpu_has_bf16", lambda: True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


@pytest.fixture
def load(tmp_path):
    def load_text(lines: str = "", *flags: str, base: str = BASE):
        path = tmp_path / "r.yaml"
        path.write_text(base + lines)
        return load_recipe([str(path), *flags])

    return load_text


# What is wrong, the key of its error, and what is named: the place, the value as it was written, what is wanted.
BAD_YAML = [
    # misspelt and unknown keys
    ("bet: 0.1", "bet", "r.yaml:4: bet ", "beta?"),
    ("\n\nlearning-rate: 1", "learning-rate", "r.yaml:6: ", "learning_rate?"),
    ("batch_size: 4", "batch_size", "per_device_train_batch_size?"),
    ("qqqq: 1", "qqqq", "--help"),
    ("'<<': {beta: 0.1}", "<<", "r.yaml:4: << "),
    # types
    ("beta: true", "beta", "beta: true ", "a number"),
    ("beta: null", "beta", "beta: null ", "a number"),
    ("beta:", "beta", "beta: null ", "a number"),
    ("beta: '0.1'", "beta", "beta: '0.1' ", "a number"),
    ("max_length: 5.5", "max_length", "max_length: 5.5 ", "a whole number"),
    ("max_length: true", "max_length", "max_length: true ", "a whole number"),
    ("max_length: .inf", "max_length", "max_length: .inf ", "a whole number"),
    ("learning_rate: 4e-7x", "learning_rate", "learning_rate: 4e-7x ", "a number"),
    ("max_steps: 1_000", "max_steps", "max_steps: 1_000 ", "a whole number"),
    ("mask_user_turns: 1", "mask_user_turns", "mask_user_turns: 1 ", "true or false"),
    ("mask_user_turns: maybe", "mask_user_turns", "mask_user_turns: maybe ", "true or false"),
    ("model_revision: null", "model_revision", "model_revision: null ", "text"),
    ("run_name: [a]", "run_name", "run_name: ['a'] ", "text or null"),
    ("dataset_configs: [7]", "dataset_configs", "dataset_configs: [7] ", "a list (items: text) or null"),
    ("dataset_mixer: {b: much}", "dataset_mixer", "line 2 ", "line 4."),
    ("eval_dataset_mixer: {b: much}", "eval_dataset_mixer", "{'b': 'much'} ", "a mapping (text: a number)"),
    ("loss_weights: [a]", "loss_weights", "loss_weights: ['a'] ", "a list (items: a number)"),
    ("chat_template_kwargs: [a]", "chat_template_kwargs", "chat_template_kwargs: ['a'] ", "a mapping or null"),
    # choices
    ("lr_scheduler_type: cosin", "lr_scheduler_type", "lr_scheduler_type: cosin ", "linear, cosine", "cosine?"),
    ("eval_strategy: off", "eval_strategy", "eval_strategy: off ", "no, steps, epoch"),
    ("eval_strategy: false", "eval_strategy", "eval_strategy: false ", "no, steps, epoch"),
    ("dtype: bf16", "dtype", "dtype: bf16 ", "auto, bfloat16, float16, float32 or null"),
    ("optim: adamw", "optim", "optim: adamw ", "adamw_torch?"),
    # ranges
    ("beta: .nan", "beta", "beta: nan is out of range"),
    ("learning_rate: -1e-6", "learning_rate", "r.yaml:4: learning_rate: -1e-06 is out of range", ">= 0"),
    ("max_length: 1", "max_length", "max_length: 1 is out of range", ">= 2, or null"),
    ("num_train_epochs: 0", "num_train_epochs", "epochs: 0 is out of range"),
    ("per_device_train_batch_size: 0", "per_device_train_batch_size", "size: 0 is out of range"),
    ("per_device_eval_batch_size: 0", "per_device_eval_batch_size", "size: 0 is out of range"),
    ("gradient_accumulation_steps: 0", "gradient_accumulation_steps", "steps: 0 is out of range"),
    ("preprocessing_num_workers: 0", "preprocessing_num_workers", "r.yaml:4: ", "workers: 0 is out of range"),
    ("test_split_size: 0", "test_split_size", "size: 0 is out of range"),
    ("test_split_size: 1.0", "test_split_size", "size: 1.0 is out of range", "rows >= 1", "between 0 and 1"),
    ("test_split_size: -0.1", "test_split_size", "size: -0.1 is out of range"),
    ("max_training_samples: -1", "max_training_samples", "samples: -1 is out of range"),
    ("max_eval_samples: 0", "max_eval_samples", "samples: 0 is out of range"),
    ("eval_dataset_mixer: {b: 1.5}", "eval_dataset_mixer", "1.5 for 'b' ", "(0, 1]"),
    ("eval_dataset_mixer: {b: 0}", "eval_dataset_mixer", "0 for 'b' ", "(0, 1]"),
    ("eval_dataset_mixer: [b, b]", "eval_dataset_mixer", "'b' is listed twice"),
    ("dataset_splits: [test]", "dataset_splits", "r.yaml:4: ", "['test']", "'train'"),
    ("dataset_configs: [x, y]", "dataset_configs", "2 names", "1 datasets"),
    ("chat_template: '{{ messages }}'", "chat_template", ".jinja"),
    # combinations that transformers or TRL refuse
    ("logging_steps: 0", "logging_steps", "r.yaml:4: logging_steps"),
    ("fp16: true\nbf16: true", "fp16", "r.yaml:4: fp16, ", "r.yaml:5: bf16"),
    ("loss_weights: [1, 2]", "loss_weights", "r.yaml:4: loss_weights"),
    ("load_in_4bit: true\nload_in_8bit: true", "load_in_8bit", "4 bit"),
    # duplicates
    ("seed: 1\n'seed': 2", "seed", "line 4 ", "line 5."),
    ("eval_dataset_mixer:\n  b: 1.0\n  b: 0.5", "b", "line 5 ", "line 6."),
    ("chat_template_kwargs: {x: [{y: 1, y: 2}]}", "y", "line 4 ", "line 4."),
    ("torch_dtype: float32\ndtype: float32", "dtype", "r.yaml:5: dtype ", "r.yaml:4: torch_dtype"),
    # syntax
    ("  beta: 1", "recipe", "r.yaml:4: ", "YAML"),
    ("seed: 1\n---\nseed: 2", "recipe", "r.yaml:5: ", "YAML", "another document"),
    ("run_name: !!python/name:os.system x", "recipe", "r.yaml:4: ", "YAML"),
    ("run_name: *nowhere", "recipe", "r.yaml:4: ", "YAML", "undefined alias"),
    # older keys
    ("warmup_ratio: 1", "warmup_ratio", "warmup_ratio: 1 ", "set warmup_steps"),
    ("warmup_ratio: true", "warmup_ratio", "warmup_ratio: True ", "warmup_steps"),
    ("use_flash_attention_2: sdpa", "use_flash_attention_2", "'sdpa'", "attn_implementation"),
    ("evaluation_strategy: step", "evaluation_strategy", "r.yaml:4: evaluation_strategy: step ", "steps?"),
]


@pytest.mark.parametrize("case", BAD_YAML, ids=[lines for lines, *_ in BAD_YAML])
def test_bad_yaml_is_named(load, case):
    lines, key, *details = case
    with refused(key, *details) as caught:
        load(lines)
    assert "\n" not in str(caught.value)


BAD_FLAGS = [
    (["--bet", "0.1"], "bet", "--bet ", "--beta?"),
    (["--bet"], "bet", "--bet ", "--beta?"),
    (["--learning-rate=1"], "learning-rate", "--learning_rate?"),
    (["--no_mask_user_turns"], "no_mask_user_turns", "--mask_user_turns?"),
    (["--beta"], "beta", "--beta=VALUE"),
    (["--beta", "--seed=1"], "beta", "--beta=VALUE"),
    (["--config"], "config", "--config=VALUE"),
    (["--beta="], "beta", "--beta: null ", "a number."),
    (["--max_length=5.5"], "max_length", "--max_length: 5.5 ", "a whole number or null."),
    (["--mask_user_turns=2"], "mask_user_turns", "--mask_user_turns: 2 ", "true or false."),
    (["--mask_user_turns", "2"], "argument", "'2' is not expected"),
    (["--beta=0.1", "--beta=0.1"], "beta", "--beta is set twice"),
    (["--torch_dtype=float32", "--dtype=float32"], "dtype", "--dtype is set twice", "--torch_dtype"),
    (["--dataset_mixer={a: 1.0, a: 0.5}"], "a", "--dataset_mixer: ", "line 1 "),
    (["--dataset_mixer={a: 1.0"], "dataset_mixer", "--dataset_mixer:1: ", "YAML"),
    (["--dataset_mixer={a:1.0}"], "dataset_mixer", "{'a:1.0': None}", "a mapping (text: a number)"),
    (["--dataset_mixer={a: 2}"], "dataset_mixer", "--dataset_mixer: 2 for 'a' is out of range"),
    (["--dataset_mixer={}"], "dataset_mixer", "is missing"),
    (["--model_name_or_path="], "model_name_or_path", "is missing"),
    (["--lora_target_modules", "q_proj", "v_proj"], "argument", "'v_proj' is not expected"),
    (["-b=1"], "argument", "'-b=1' is not expected"),
    (["--"], "argument", "'--' is not expected"),
    (["other.yaml"], "recipe", "two", "other.yaml"),
    (["--config=second.yaml"], "recipe", "two", "second.yaml"),
    (["--sanity_check", "other.yaml"], "recipe", "two", "other.yaml"),
    (["--resume_from_checkpoint", "other.yaml"], "recipe", "two", "other.yaml"),
    (["--len_penalty", "0.5"], "len_penalty", "is gone"),
]


@pytest.mark.parametrize("case", BAD_FLAGS, ids=[" ".join(flags) for flags, *_ in BAD_FLAGS])
def test_bad_command_line_is_named(load, case):
    flags, key, *details = case
    with refused(key, *details):
        load("", *flags)


GOOD = [
    # (YAML line, flags, key, value): numbers
    ("learning_rate: 4e-7", [], "learning_rate", 4e-7),
    ("learning_rate: 5.0e-7", [], "learning_rate", 5e-7),
    ("", ["--learning_rate=4e-7"], "learning_rate", 4e-7),
    ("", ["--learning_rate", "4E-7"], "learning_rate", 4e-7),
    ("beta: 1", [], "beta", 1),
    ("beta: .5", [], "beta", 0.5),
    ("max_steps: 1e3", [], "max_steps", 1000),
    ("seed: 010", [], "seed", 10),
    ("", ["--max_steps", "-1"], "max_steps", -1),
    ("max_length: null", [], "max_length", None),
    ("test_split_size: 100", [], "test_split_size", 100),
    ("test_split_size: 0.1", [], "test_split_size", 0.1),
    ("warmup_steps: 0.1", [], "warmup_steps", 0.1),
    # truth
    ("bf16: no", [], "bf16", False),
    ("gradient_checkpointing: off", [], "gradient_checkpointing", False),
    ("sanity_check: on", [], "sanity_check", True),
    ("sanity_check: Yes", [], "sanity_check", True),
    ("", ["--sanity_check"], "sanity_check", True),
    ("", ["--sanity_check", "True"], "sanity_check", True),
    ("sanity_check: true", ["--sanity_check=false"], "sanity_check", False),
    ("", ["--sanity_check", "--debug"], "sanity_check", True),
    ("resume_from_checkpoint: true", [], "resume_from_checkpoint", True),
    ("", ["--resume_from_checkpoint"], "resume_from_checkpoint", True),
    ("", ["--resume_from_checkpoint", "out/checkpoint-5"], "resume_from_checkpoint", "out/checkpoint-5"),
    # text, which YAML 1.1 would have turned into something else
    ("eval_strategy: no", [], "eval_strategy", "no"),
    ("save_strategy: 'no'", [], "save_strategy", "no"),
    ("report_to: none", [], "report_to", []),
    ("run_name: 1.10", [], "run_name", "1.10"),
    ("run_name: 7", [], "run_name", "7"),
    ("run_name: 2024-01-02", [], "run_name", "2024-01-02"),
    ("run_name: on", [], "run_name", "on"),
    ("run_name: true", [], "run_name", "true"),
    ("", ["--run_name=#7: a, b [c]"], "run_name", "#7: a, b [c]"),
    ("", ["--run_name=a=b"], "run_name", "a=b"),
    # lists and mappings
    ("loss_type: sigmoid", [], "loss_type", ["sigmoid"]),
    ("", ["--loss_type=sigmoid"], "loss_type", ["sigmoid"]),
    ("", ["--loss_type=sigmoid,sft", "--loss_weights=1, 0.5"], "loss_weights", [1, 0.5]),
    ("report_to: wandb, tensorboard", [], "report_to", ["wandb", "tensorboard"]),
    ("lora_target_modules: 'a{1,2}'", [], "lora_target_modules", "a{1,2}"),
    ("", ["--lora_target_modules=[q, v]"], "lora_target_modules", ["q", "v"]),
    ("dataset_splits:\n- train_prefs\n- test_prefs", [], "dataset_splits", ["train_prefs", "test_prefs"]),
    ("eval_dataset_mixer: [b, c]", [], "eval_dataset_mixer", {"b": 1.0, "c": 1.0}),
    ("eval_dataset_mixer: {b: 1}", [], "eval_dataset_mixer", {"b": 1.0}),
    ("", ["--dataset_mixer=b.jsonl"], "dataset_mixer", {"b.jsonl": 1.0}),
    ("", ["--dataset_mixer={b.jsonl: 0.5, c: 1}"], "dataset_mixer", {"b.jsonl": 0.5, "c": 1.0}),
    ("chat_template_kwargs: {enable_thinking: false}", [], "chat_template_kwargs", {"enable_thinking": False}),
    (
        "gradient_checkpointing_kwargs:\n  use_reentrant: False",
        [],
        "gradient_checkpointing_kwargs",
        {"use_reentrant": False},
    ),
    # older keys
    ("preprocessing_num_workers: 2", [], "dataset_num_proc", 2),
    ("torch_dtype: bfloat16", [], "dtype", "bfloat16"),
    ("torch_dtype: null", [], "dtype", "float32"),
    ("evaluation_strategy: epoch", [], "eval_strategy", "epoch"),
    ("warmup_ratio: 0.1", [], "warmup_steps", 0.1),
    ("group_by_length: true", [], "train_sampling_strategy", "group_by_length"),
    ("use_flash_attention_2: false", [], "attn_implementation", None),
    ("", ["--masking_user_turn", "False"], "mask_user_turns", False),
    ("", ["--ref_model=x/y"], "ref_model_name_or_path", "x/y"),
    ("max_prompt_length: null", [], "max_length", 1024),
    ("reference_free: false", [], "beta", 0.1),
]


@pytest.mark.parametrize(("lines", "flags", "key", "value"), GOOD, ids=[f"{g[0]} {' '.join(g[1])}" for g in GOOD])
def test_good_values_arrive(load, lines, flags, key, value):
    recipe = load(lines, *flags)
    owner = next(getattr(recipe, name) for name, part in PARTS.items() if key in part.__dataclass_fields__)
    found = getattr(owner, key)
    assert found == value and isinstance(found, bool) == isinstance(value, bool)


def test_yaml_1_1_would_be_wrong():
    """The wrong twin: what the tables above guard against is what PyYAML's own rules do."""
    read = yaml.safe_load("learning_rate: 4e-7\nbf16: no\nseed: 010\nbeta: 1\nbeta: 2")
    assert read == {"learning_rate": "4e-7", "bf16": False, "seed": 8, "beta": 2}


def test_command_line_wins_and_replaces_whole_mappings(load):
    recipe = load("beta: 0.5\nseed: 7\n", "--beta=0.2", "--dataset_mixer={b: 0.5}")
    assert (recipe.training.beta, recipe.training.seed) == (0.2, 7)
    assert recipe.data.dataset_mixer == {"b": 0.5}


def test_recipe_as_option(tmp_path):
    path = tmp_path / "r.yml"
    path.write_text(BASE)
    for argv in ([f"--config={path}"], ["--config", str(path)], ["--seed=1", str(path)], [str(path), "--debug"]):
        assert load_recipe(argv).path == path


@pytest.mark.parametrize("missing", ["model_name_or_path", "dataset_mixer"])
def test_required_keys(load, missing):
    base = "".join(line for line in BASE.splitlines(keepends=True) if not line.startswith(missing))
    with refused(missing, "is missing"):
        load(base=base)


@pytest.mark.parametrize("text", ["", "# nothing\n", "beta\n", "{}\n"])
def test_not_a_mapping(load, text):
    with refused("recipe", "r.yaml", "`key: value`"):
        load(base=text)


def test_unreadable_files(tmp_path):
    with refused("recipe", "recipes/gemma-7b-it/dpo/config_full.yaml"):  # a near name is offered
        load_recipe(["recipes/gemma-7b-it/dpo/config_ful.yaml"])
    (tmp_path / "folder.yaml").mkdir()
    with refused("recipe", "folder.yaml", "Is a directory"):
        load_recipe([str(tmp_path / "folder.yaml")])
    (tmp_path / "latin.yaml").write_bytes(BASE.encode() + b"run_name: caf\xe9\n")
    with refused("recipe", "latin.yaml", "UTF-8", f"(byte {len(BASE) + 13})"):
        load_recipe([str(tmp_path / "latin.yaml")])


def test_byte_order_mark_is_harmless(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + BASE.encode())
    assert load_recipe([str(path)]).model.model_name_or_path == "some/model"


@pytest.mark.parametrize(
    ("path", "output_dir"),
    [
        ("recipes/gemma-7b-it/dpo/config_full.yaml", "outputs/gemma-7b-it/dpo/config_full"),
        ("mine/config_a.yaml", "outputs/mine/config_a"),
    ],
)
def test_output_dir_follows_the_recipe(tmp_path, path, output_dir):
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(BASE.replace("output_dir: out\n", ""))
    recipe = load_recipe([str(tmp_path / path)])
    assert recipe.training.output_dir == output_dir == recipe.values["output_dir"]
    assert recipe.notes == [f"output_dir is not set; writing to {output_dir}."]


TRICKY = """
learning_rate: 4e-7
run_name: "1e5"
chat_template_kwargs: {a: "1e5", b: "no", c: "010", d: null, e: "ä: #", f: [1, 1.5, "0.1"], g: "1:30", h: ""}
eval_strategy: "no"
eval_dataset_mixer: {"path with: colon.jsonl": 0.25}
resume_from_checkpoint: true
max_length: null
warmup_ratio: 0.05
"""


def test_round_trip(load, tmp_path):
    first = load(TRICKY, "--seed=3", "--hub_token=hf_secret")
    first.write(tmp_path / "new" / "resolved.yaml")
    second = load_recipe([str(tmp_path / "new" / "resolved.yaml")])
    assert second.values == first.resolved() and second.notes == []
    assert second.values["chat_template_kwargs"]["f"] == [1, 1.5, "0.1"]
    assert second.values["run_name"] == "1e5" and second.values["warmup_steps"] == 0.05
    assert (second.model, second.data) == (first.model, first.data)
    assert second.training.to_dict() == first.training.to_dict() | {"hub_token": "<HUB_TOKEN>"}
    second.write(tmp_path / "again.yaml")
    without_header = [(tmp_path / name).read_text().partition("\n")[2] for name in ("new/resolved.yaml", "again.yaml")]
    assert without_header[0] == without_header[1]


def test_secrets_are_not_written_or_noted(load, tmp_path):
    recipe = load("", "--push_to_hub_token=hf_secret", "--local_rank=0")
    recipe.write(tmp_path / "resolved.yaml")
    assert recipe.training.hub_token == "hf_secret"
    for text in ((tmp_path / "resolved.yaml").read_text(), *recipe.notes, repr(recipe), str(recipe.training)):
        assert "hf_secret" not in text
    assert "local_rank" not in recipe.resolved()


def test_values_are_not_shared_with_the_dataclasses(load):
    recipe = load("gradient_checkpointing_kwargs: {use_reentrant: false}")
    recipe.training.gradient_checkpointing_kwargs["use_reentrant"] = True
    assert recipe.values["gradient_checkpointing_kwargs"] == {"use_reentrant": False}


# ---------------------------------------------------------------- the table of older keys


def test_retired_keys_are_gone_and_their_successors_live():
    assert len(RETIRED_KEYS) > 50
    for key, retired in RETIRED_KEYS.items():
        assert key not in FIELDS, f"{key} is a live key"
        assert bool(retired.to) != bool(retired.advice), key
        assert retired.to is None or retired.to in FIELDS, f"{key} -> {retired.to}"


def test_advice_names_only_live_keys():
    """Every key-like word in the advice exists (or is one of the few words that only look like keys)."""
    plain = {"use_reentrant", "training_configs"}
    for key, retired in RETIRED_KEYS.items():
        words = {word.strip(".,:;{}()[]/") for word in retired.advice.split()}
        for word in words:
            assert "_" not in word or word.isupper() or word in FIELDS or word in plain, (key, word)


IN_CASES = {"max_prompt_length", "dataset_streaming"}  # tests/cases has them


@pytest.mark.parametrize("key", [key for key, new in RETIRED_KEYS.items() if new.to is None and key not in IN_CASES])
def test_refused_keys(load, key):
    with refused(key, f"r.yaml:4: {key} ", RETIRED_KEYS[key].advice):
        load(f"{key}: 1")


def test_mapped_keys_leave_one_note(load, monkeypatch):
    monkeypatch.setattr(recipe_module, "_build", lambda values, origins: dict.fromkeys(PARTS))  # gloo needs a launcher
    monkeypatch.setattr(recipe_module, "fit_to_machine", lambda values, notes: values)
    mapped = {"dtype": "float32", "eval_strategy": "epoch", "use_cpu": True, "ddp_backend": "gloo"}
    mapped |= {"mask_user_turns": False, "hub_token": "t", "optim": "adafactor", "warmup_steps": 0.25}
    checked = 0
    for key, retired in RETIRED_KEYS.items():
        if retired.to is None:
            continue
        value = mapped.get(retired.to, 2) if retired.convert is None else 0.25 if key == "warmup_ratio" else True
        recipe = load(yaml.safe_dump({key: value}))
        assert len(recipe.notes) == 1 and f"r.yaml:4: {key} is called {retired.to} now" in recipe.notes[0]
        found = recipe.values[retired.to]
        assert found == (retired.convert(value) if retired.convert else found) and found not in (None, "")
        assert str(found) == str(value) or retired.convert is not None
        checked += 1
    assert checked >= 15


def test_warmup_ratio_keeps_its_meaning(load):
    """transformers 4: ceil(ratio * steps). 0.1 of 105 steps is 10.5, so 11."""
    training = load("warmup_ratio: 0.1").training
    assert [training.get_warmup_steps(steps) for steps in (105, 100, 1)] == [11, 10, 1]
    assert load("warmup_ratio: 0").training.get_warmup_steps(100) == 0


HANDBOOK = """
model_name_or_path: alignment-handbook/zephyr-7b-sft-full
torch_dtype: null
use_flash_attention_2: true
dataset_mixer:
  HuggingFaceH4/ultrafeedback_binarized: 0.5
dataset_splits:
- train_prefs
- test_prefs
preprocessing_num_workers: 12
bf16: true
beta: 0.01
do_eval: true
evaluation_strategy: steps
eval_steps: 100
gradient_checkpointing: true
gradient_checkpointing_kwargs:
  use_reentrant: False
hub_model_id: zephyr-7b-dpo-full
learning_rate: 5.0e-7
log_level: info
lr_scheduler_type: cosine
max_length: 1024
optim: adamw_torch
output_dir: data/zephyr-7b-dpo-full
overwrite_output_dir: true
report_to:
- tensorboard
- wandb
save_strategy: "steps"
warmup_ratio: 0.1
"""


def test_handbook_recipe_works(load):
    recipe = load(base=HANDBOOK)
    assert recipe.data.dataset_mixer == {"HuggingFaceH4/ultrafeedback_binarized": 0.5}
    assert (recipe.training.dataset_num_proc, recipe.training.warmup_steps) == (12, 0.1)
    assert recipe.training.eval_strategy == "steps" and recipe.training.report_to == ["tensorboard", "wandb"]
    assert check_options(recipe.training, None, recipe.values) == []
    notes = "\n".join(recipe.notes)
    for key in ("torch_dtype", "use_flash_attention_2", "preprocessing_num_workers", "warmup_ratio"):
        assert notes.count(f" {key} is ") == 1


# ---------------------------------------------------------------- what the machine lacks


@pytest.mark.parametrize(
    ("values", "fallen", "named"),
    [
        ({}, {"bf16": False}, "(bf16)"),  # DPOConfig would turn it on
        ({"bf16": True, "dtype": "bfloat16"}, {"bf16": False, "dtype": "float32"}, "(bf16, dtype)"),
        ({"bf16": False, "dtype": "auto"}, {"bf16": False, "dtype": "float32"}, "(dtype)"),
        ({"bf16": False, "fp16": True}, {"bf16": False, "fp16": False}, "(fp16)"),
        ({"bf16": False, "dtype": "float32"}, {"bf16": False, "dtype": "float32"}, None),
    ],
)
def test_cpu_without_bf16_units(monkeypatch, values, fallen, named):
    monkeypatch.setattr(precision_module, "cpu_has_bf16", lambda: False)
    before = dict(values)
    found, note = precision_note(values, cpu_only=True)
    assert found == fallen and values == before
    assert note is None if named is None else named in note and "\n" not in note


def test_launchers_precision_is_switched_off_too(monkeypatch):
    import os

    values = {"bf16": False}
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert precision_note(values, cpu_only=True) == (values, None)  # this CPU has the units
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16"
    monkeypatch.setattr(precision_module, "cpu_has_bf16", lambda: False)
    assert precision_note({}, cpu_only=False) == ({}, None)
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16"
    _, note = precision_note(values, cpu_only=True)
    assert "the launcher's mixed_precision" in note and os.environ["ACCELERATE_MIXED_PRECISION"] == "no"


def test_bf16_stays_where_it_can(load):
    training = load().training
    assert training.bf16 is True and training.use_cpu is True  # without use_cpu transformers would refuse it


@pytest.mark.parametrize(
    ("on_cpu", "installed", "attention", "why"),
    [
        (False, True, "flash_attention_2", None),
        (False, False, None, "not installed"),
        (True, True, None, "needs a GPU"),
    ],
)
def test_flash_attention_falls_back(monkeypatch, on_cpu, installed, attention, why):
    monkeypatch.setattr(precision_module, "cpu_only", lambda values: on_cpu)
    found = (print, None) if installed else (None, "flash-attn is not installed")
    monkeypatch.setattr(precision_module, "flash_attn", lambda: found)
    notes = []
    values = fit_to_machine({"attn_implementation": "flash_attention_2", "bf16": False}, notes)
    assert values["attn_implementation"] == attention and values.get("use_cpu", False) is on_cpu
    assert len(notes) == (why is not None) and all(why in note for note in notes)
    assert fit_to_machine({"attn_implementation": "eager"}, [])["attn_implementation"] == "eager"


def test_detection_follows_recipe_and_launcher(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    assert not precision_module.cpu_only({}) and precision_module.cpu_only({"use_cpu": True})
    for text, expected in (("true", True), ("True", True), ("false", False)):
        monkeypatch.setenv("ACCELERATE_USE_CPU", text)
        assert precision_module.cpu_only({}) is expected
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert precision_module.cpu_only({})


@pytest.mark.parametrize(
    ("capabilities", "units"),
    [
        ({"architecture": "x86_64", "avx2": True, "avx512_bf16": True, "amx_bf16": False}, True),
        ({"architecture": "x86_64", "avx2": True, "avx512_bf16": False, "amx_bf16": True}, True),
        ({"architecture": "x86_64", "avx2": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"architecture": "aarch64", "neon": True, "bf16": True}, True),
        ({"architecture": "aarch64", "neon": True, "bf16": False}, False),
    ],
)
def test_bf16_units(monkeypatch, capabilities, units):
    monkeypatch.undo()
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: capabilities)
    assert precision_module.cpu_has_bf16() is units


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="no /proc/cpuinfo to compare with")
def test_torch_knows_the_bf16_units_that_the_kernel_lists(monkeypatch):
    monkeypatch.undo()
    listed = {"avx512_bf16", "amx_bf16", "bf16"} & set(Path("/proc/cpuinfo").read_text().split())
    assert precision_module.cpu_has_bf16() is bool(listed)


# ---------------------------------------------------------------- the recipes and classes themselves


def test_default_recipe():
    recipe = load_recipe([])
    assert recipe.path == DEFAULT_RECIPE
    expected = {
        "model_name_or_path": "RLHF4MATH/Gemma-7B-it-SFT3epoch",
        "dataset_mixer": {"RLHF4MATH/Gemma-7B-1.1-it-iter1-random-pairs": 1.0},
        "dataset_splits": ["train"],
        "beta": 0.1,
        "learning_rate": 4e-7,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 50,
        "max_length": 2048,
        "bf16": True,
        "dtype": "bfloat16",
        "gradient_checkpointing": True,
        "num_train_epochs": 1,
    }
    effective = {**vars(recipe.model), **vars(recipe.data), **vars(recipe.training)}
    assert {key: effective[key] for key in expected} == expected
    per_device, accumulation = recipe.training.per_device_train_batch_size, recipe.training.gradient_accumulation_steps
    assert per_device * accumulation * 8 == 32
    assert yaml.safe_load(DEFAULT_RECIPE.read_text())["attn_implementation"] == "flash_attention_2"
    assert recipe.values["attn_implementation"] is None and len(recipe.notes) == 1


def test_every_recipe_loads():
    paths = sorted((ROOT / "recipes").rglob("config_*.yaml"))
    assert DEFAULT_RECIPE in paths
    for path in paths:
        recipe = load_recipe([str(path)])
        assert recipe.training.output_dir
        assert check_options(recipe.training, get_peft_config(recipe.model), recipe.values) == []


def test_every_key_has_one_home_and_a_help():
    names = [field.name for part in PARTS.values() for field in dataclasses.fields(part)]
    assert len(names) == len(set(names)) == len(FIELDS) > 150
    for key in [*DataArguments.__dataclass_fields__, *MDPOConfig.__annotations__]:
        assert len(FIELDS[key].metadata["help"]) > 20, key


def test_help_lists_every_key_once(capsys):
    with pytest.raises(SystemExit) as exit_:
        load_recipe(["--help"])
    assert exit_.value.code == 0
    printed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  --")]
    assert sorted(printed) == sorted(f"--{key}" for key in FIELDS)


def test_classes_check_themselves():
    """Also without a recipe, as in a script that builds them directly."""
    assert DataArguments(dataset_mixer=["a", "b"]).dataset_mixer == {"a": 1.0, "b": 1.0}
    with refused("dataset_mixer", "no dataset"):
        DataArguments()
    for wrong in ({"beta": math.inf}, {"truncation_mode": "keep_all"}):
        with refused(next(iter(wrong)), "out of range"):
            MDPOConfig(output_dir="out", use_cpu=True, **wrong)
    with refused("on_bad_rows", "out of range"):
        DataArguments(dataset_mixer=["a"], on_bad_rows="keep")
    with refused("turns_without_reasoning", "'off' is out of range", "keep, mask, drop"):
        DataArguments(dataset_mixer=["a"], turns_without_reasoning="off")


def test_ours_is_on_only_in_mdpo_config():
    ours = MDPOConfig(output_dir="out", use_cpu=True, bf16=False)
    assert ours.mask_user_turns and ours.nll_coefficient == 0.0 and ours.truncation_mode == "drop"
    plain = DPOConfig(output_dir="out", use_cpu=True, bf16=False, gradient_checkpointing=None)
    assert not hasattr(plain, "mask_user_turns") and plain.truncation_mode == "keep_start"
    assert ModelConfig().dtype == "float32"  # what an absent or null torch_dtype means
