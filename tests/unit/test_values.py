"""What stands in a recipe and means something else: merge keys, variables and ~ in paths, null in other languages."""

import os

import pytest
import yaml
from errors import refused

from mdpo.config.recipe import load_recipe
from mdpo.config.yaml_nodes import Loader, prepare

BASE = "model_name_or_path: some/model\ndataset_mixer: {a.jsonl: 1.0}\noutput_dir: out\nbf16: false\nuse_cpu: true\n"


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")

    def load_text(lines: str = "", *flags: str, base: str = BASE):
        (tmp_path / "r.yaml").write_text(base + lines)
        return load_recipe([str(tmp_path / "r.yaml"), *flags])

    return load_text


# ---------------------------------------------------------------- merge keys

MERGES = [
    "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3, z: 4}",
    "a: &a {x: 1, y: 2}\nb: {y: 3, <<: *a}",
    "a: &a {x: 1}\nc: &c {x: 2, y: 5}\nb: {<<: [*a, *c], z: 0}\nd: {<<: [*c, *a]}",
    "a: &a {x: 1}\nc: &c {<<: *a, y: {q: 1}}\nb: {<<: *c, y: [{<<: *a, w: 2}]}",
    "a: &a {x: 1}\nb: {<<: *a, x: 2}\nc: {<<: *a}\nd: {<<: {x: 9}, y: 1}",
    "a: &a {x: 1}\n<<: *a\nx: 7",
]


@pytest.mark.parametrize("text", MERGES)
def test_merge_keys_are_those_of_yaml_1_1(text):
    """PyYAML's own reader, another implementation, gives the same."""
    loader = Loader(text)
    node = loader.get_single_node()
    prepare(node, "r.yaml")
    assert loader.construct_document(node) == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("text", "key", "details"),
    [
        ("a: &a {<<: *a, x: 1}", "<<", ["line 1 ", "that it is in"]),
        ("a: 1\nb: {<<: 3}", "<<", ["line 2 ", "*ANCHOR"]),
        ("a: &a {x: 1}\nb: {<<: [*a, 2]}", "<<", ["line 2 ", "*ANCHOR"]),
        ("a: &a {x: 1}\nb: {<<: *a, <<: *a}", "<<", ["line 2 ", "again on line 2."]),
        ("a: &a {x: 1, x: 2}\nb: {<<: *a}", "x", ["line 1 ", "again on line 1."]),
    ],
)
def test_merge_keys_stay_strict(text, key, details):
    with refused(key, "r.yaml: ", *details):
        prepare(Loader(text).get_single_node(), "r.yaml")


def test_merge_keys_in_a_recipe(load):
    lines = "model_init_kwargs: &d {use_cache: false}\nchat_template_kwargs:\n  <<: *d\n  x: 1\n"
    assert load(lines).data.chat_template_kwargs == {"use_cache": False, "x": 1}
    assert load("<<: {beta: 0.3, seed: 5}\nseed: 6").values["beta"] == 0.3
    assert load("<<: {beta: 0.3, seed: 5}\nseed: 6").values["seed"] == 6
    with refused("bta", "r.yaml:6: bta "):
        load("<<: {bta: 0.3}")
    with refused("beta", "r.yaml:7: beta: fast ", "a number"):
        load("<<:\n  beta: fast")
    flag = "--chat_template_kwargs={a: &a {x: 1}, b: {<<: *a, y: 2}}"
    assert load("", flag).data.chat_template_kwargs["b"] == {"x": 1, "y": 2}
    quoted = load("chat_template_kwargs: {'<<': 1}\nrun_name: <<")
    assert quoted.data.chat_template_kwargs == {"<<": 1} and quoted.training.run_name == "<<"


# ---------------------------------------------------------------- paths

HOMES = [
    ("model_name_or_path", "model"), ("ref_model_name_or_path", "training"), ("tokenizer_name_or_path", "data"),
    ("output_dir", "training"), ("chat_template", "data"), ("reference_cache_dir", "training"),
    ("resume_from_checkpoint", "training"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "part"), HOMES)
def test_variables_and_home_in_every_path(load, monkeypatch, key, part):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("STORE", "/store")
    base = "".join(f"{line}\n" for line in BASE.splitlines() if not line.startswith(key))
    for text, wanted in (("~/m/x", "/home/me/m/x"), ("${STORE}/x", "/store/x"), ("$STORE/x$5", "/store/x$5")):
        recipe = load(f"{key}: {text}", base=base)
        assert getattr(getattr(recipe, part), key) == recipe.values[key] == wanted
    monkeypatch.setenv("EMPTY", "")
    for text, *details in (
        ("$(pwd)/x", "$(pwd)/x", "$NAME and ${NAME}"),
        ("${STORE:-/tmp}/x", "${STORE:-/tmp}/x", "$NAME and ${NAME}"),
        ("$EMPTY/x", "variable EMPTY is empty"),
        ("~nobody-of-this-name/x", "~nobody-of-this-name ", "home folder"),
    ):
        with refused(key, *details):
            load(f"{key}: {text}", base=base)


def test_variables_in_the_names_of_sets(load, monkeypatch):
    monkeypatch.setenv("STORE", "/store")
    base = BASE.replace("{a.jsonl: 1.0}", "{$STORE/a.jsonl: 0.5, org/set: 1.0}")
    recipe = load("eval_dataset_mixer: ['${STORE}/b.jsonl', ~/c.jsonl]", base=base)
    assert recipe.data.dataset_mixer == {"/store/a.jsonl": 0.5, "org/set": 1.0}
    assert list(recipe.data.eval_dataset_mixer) == ["/store/b.jsonl", os.path.expanduser("~/c.jsonl")]
    with refused("eval_dataset_mixer", "twice"):
        load("eval_dataset_mixer: {$STORE/b: 1.0, '${STORE}/b': 1.0}")
    with refused("eval_dataset_mixer", "variable NOT_SET_HERE is not set"):
        load("eval_dataset_mixer: {$NOT_SET_HERE/b: 1.0}")


def test_a_folder_of_that_name_and_names_in_braces(load, monkeypatch, tmp_path):
    (tmp_path / "$odd").mkdir()
    assert load(f"reference_cache_dir: {tmp_path}/$odd").values["reference_cache_dir"] == f"{tmp_path}/$odd"
    monkeypatch.setenv("JOB", "17")
    recipe = load("run_name: run-${JOB} costs $JOB\nmodel_init_kwargs: {cache_dir: $JOB/x, other: $JOB}")
    assert recipe.values["run_name"] == "run-17 costs $JOB"
    assert recipe.values["model_init_kwargs"] == {"cache_dir": "17/x", "other": "$JOB"}
    with refused("hub_token", "--hub_token: ", "variable NO_TOKEN is not set"):
        load("", "--hub_token=${NO_TOKEN}")


# ---------------------------------------------------------------- null in other languages


@pytest.mark.parametrize("text", ["None", "none", "NONE", "nil", "nULL", "'null'", "'None'", "'~'", "''"])
@pytest.mark.parametrize("key", ["hub_model_id", "lora_target_modules", "eval_dataset_mixer", "max_eval_samples"])
def test_null_is_understood_where_it_is_meant(load, key, text):
    recipe = load(f"{key}: {text}")
    assert recipe.values[key] is None
    assert [note for note in recipe.notes if f"{key}: {text.strip(chr(39))!r} is taken as null" in note]


def test_null_on_the_command_line_and_where_it_is_none(load):
    assert load("", "--hub_model_id", "None").training.hub_model_id is None
    assert load("", "--hub_model_id=null").notes == []
    with refused("model_revision", "'None' is a text", "main"):
        load("model_revision: None")
    with refused("model_name_or_path", "missing"):
        load("", "--model_name_or_path=None")
    assert load("eval_strategy: no\nlog_level: info\ndebug: ''").training.eval_strategy == "no"
    for text in ("none", "None", "null", "[none]", "~"):
        assert load(f"report_to: {text}").training.report_to == []


@pytest.mark.parametrize(
    ("lines", "details"),
    [
        ("model_init_kwargs: {revision: None}", ["r.yaml:6: model_init_kwargs.revision: None is a text"]),
        ("model_init_kwargs: {revision: 'null'}", ["model_init_kwargs.revision: null is a text"]),
        ("chat_template_kwargs: {a: {b: [None]}}", ["chat_template_kwargs.a.b: None is a text", "write null"]),
        ("chat_template_kwargs:\n  enable_thinking: no", ["chat_template_kwargs.enable_thinking: no is a text"]),
        ("gradient_checkpointing_kwargs: {use_reentrant: Off}", ["use_reentrant: Off is a text", "write false"]),
        ("lora_modules_to_save: [lm_head, None]", ["lora_modules_to_save: None is a text"]),
        ("ref_model_name_or_path: false", [": false is no name", "write null"]),
        ("hub_model_id: no", [": no is no name", "write null", "'no'"]),
        ("chat_template: True", [": True is no name"]),
    ],
)
def test_words_that_are_no_values(load, lines, details):
    with refused(lines.partition(":")[0], *details):
        load(lines)


def test_words_that_are_meant(load):
    recipe = load("chat_template_kwargs: {reasoning_effort: none, a: 'no', b: 'None', c: null}\nhub_model_id: 'no'")
    assert recipe.data.chat_template_kwargs == {"reasoning_effort": "none", "a": "no", "b": "None", "c": None}
    assert recipe.training.hub_model_id == "no"
