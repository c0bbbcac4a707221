"""Every option works, is refused or is named: one table, and each of its words is true."""

import os
import re
from pathlib import Path

import pytest
import torch
import transformers
import trl
from datasets import Dataset
from errors import refused
from tiny import CHATML, agent_rows, tiny_llama, tokenizer_for
from trl import DPOConfig

from dpo_trainer import DPOTrainer
from mdpo.config.effects import NAMED, QUIET, REFUSED, REFUSED_ELSEWHERE
from mdpo.config.option_readers import WORKS
from mdpo.config.parallelism import refuse_model, refuse_parallelism
from mdpo.config.parsing import FIELDS, ROOT
from mdpo.config.recipe import load_recipe
from mdpo.config.schema import MDPOConfig
from mdpo.config.validation import INSTEAD, check_options
from mdpo.forward.layout import packing_refused
from mdpo.runs.resumable_trainer import ResumableTrainer

BASE = {"output_dir": "out", "use_cpu": True, "bf16": False}
# A value other than the default for each key that is refused or named.
OTHER = {
    "label_smoothing_factor": 0.1, "do_predict": True, "liger_kernel_config": {"rope": True},
    "eval_use_gather_object": True, "average_tokens_across_devices": False, "prediction_loss_only": True,
    "eval_do_concat_batches": False, "eval_accumulation_steps": 2, "include_for_metrics": ["loss"],
    "batch_eval_metrics": True, "label_names": ["a"], "length_column_name": "n", "remove_unused_columns": False,
}  # fmt: skip
CONDITIONS = [
    ("optim_target_modules", {"optim_target_modules": ["q_proj"]}, "with optim: adamw_torch"),
    ("eval_steps", {"eval_steps": 5}, "eval_strategy: no"),
    ("eval_delay", {"eval_delay": 5}, "eval_strategy: no"),
    ("logging_steps", {"logging_steps": 3, "logging_strategy": "epoch"}, "logging_strategy: epoch"),
    ("save_steps", {"save_steps": 5, "save_strategy": "epoch"}, "save_strategy: epoch"),
    ("save_total_limit", {"save_total_limit": 5, "save_strategy": "no"}, "save_strategy: no"),
    ("hub_strategy", {"hub_strategy": "end"}, "push_to_hub"),
    ("trackio_space_id", {"trackio_space_id": "a/b", "report_to": "none"}, "trackio in report_to"),
    ("num_train_epochs", {"num_train_epochs": 2, "max_steps": 7}, "max_steps: 7"),
    ("warmup_steps", {"warmup_steps": 2, "lr_scheduler_type": "constant"}, "lr_scheduler_type: constant"),
    ("greater_is_better", {"greater_is_better": True}, "metric_for_best_model"),
    ("dataloader_in_order", {"dataloader_in_order": False}, "dataloader_num_workers"),
    ("group_pairs", {"group_pairs": False, "train_sampling_strategy": "sequential"}, "sequential"),
    (
        "gradient_checkpointing_kwargs",
        {"gradient_checkpointing_kwargs": {"use_reentrant": True}, "gradient_checkpointing": False},
        "without gradient_checkpointing",
    ),
]


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    for name in ("ACCELERATE_USE_PARALLELISM_CONFIG", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM"):
        monkeypatch.delenv(name, raising=False)


def test_every_option_has_one_class():
    working = [key for keys in WORKS.values() for key in keys]
    classes = [*working, *REFUSED, *REFUSED_ELSEWHERE, *INSTEAD, *NAMED, *QUIET]
    assert len(classes) == len(set(classes))
    assert set(classes) == set(FIELDS), (
        "a new option: read who uses it, and put it into mdpo/config/option_readers.py or effects.py"
    )


@pytest.mark.parametrize("file", WORKS)
def test_what_works_is_read_where_the_table_says(file):
    package, _, rest = file.partition("/")
    roots = {"transformers": transformers, "trl": trl}
    path = Path(roots[package].__file__).parent / rest if package in roots else ROOT / file
    text = path.read_text(encoding="utf-8")
    for key in WORKS[file]:
        assert re.search(rf"""(\.|["'=]){key}\b|get_{key}\(""", text) or re.search(rf"^    {key}: ", text, re.M), key


@pytest.mark.parametrize("key", OTHER)
def test_what_changes_nothing_is_said(key):
    assert set(OTHER) == {*REFUSED, *NAMED}
    args = MDPOConfig(**BASE, **{key: OTHER[key]})
    plain = DPOConfig(**BASE, **{key: OTHER[key]})
    assert [line for line in check_options(plain) if line.startswith(f"{key}: has no effect")]
    if key in REFUSED:
        with refused(key, "no effect"):
            check_options(args)
    else:
        assert check_options(args) == [f"{key}: has no effect: {NAMED[key]}."]


def trained(tmp_path, values: dict) -> tuple[list, dict]:
    """The weights after three steps, and the evaluation, of a tiny model under TRL's own configuration."""
    tokenizer = tokenizer_for(CHATML, "letters", eos="<|im_end|>")
    rows = Dataset.from_list(agent_rows(6))
    given = {**BASE, "output_dir": str(tmp_path), "report_to": "none", "max_steps": 3, "save_strategy": "no"}
    args = DPOConfig(**given, per_device_train_batch_size=2, per_device_eval_batch_size=2, learning_rate=1e-3, **values)
    trainer = DPOTrainer(tiny_llama(tokenizer), args=args, train_dataset=rows, eval_dataset=rows,
                         processing_class=tokenizer)  # fmt: skip
    trainer.train()
    timing = ("runtime", "per_second")
    found = {name: value for name, value in trainer.evaluate().items() if not name.endswith(timing)}
    return [p.detach().clone() for p in trainer.model.parameters()], found


@pytest.mark.slow
def test_what_is_said_to_change_nothing_changes_nothing(tmp_path):
    """All such options at once against none; and a wrong twin, an option that works."""
    values = {key: value for key, value in OTHER.items() if key != "do_predict"}
    weights, figures = trained(tmp_path / "a", {})
    others, same = trained(tmp_path / "b", values)
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
    assert figures == same and len(figures) > 10
    twin, _ = trained(tmp_path / "c", {"weight_decay": 0.5})
    assert not all(torch.equal(a, b) for a, b in zip(weights, twin, strict=True))


NOT_OFFERED = ["padding_free", "use_liger_kernel", "activation_offloading", "auto_find_batch_size", "ignore_data_skip",
               "restore_callback_states_from_checkpoint", "enable_jit_checkpoint", "bf16_full_eval", "fp16_full_eval",
               "save_on_each_node"]  # fmt: skip


@pytest.mark.parametrize("key", NOT_OFFERED)
@pytest.mark.parametrize("config", [MDPOConfig, DPOConfig])
def test_what_is_not_offered_is_refused(config, key):
    assert {*INSTEAD} == {*NOT_OFFERED, "torch_compile", "torch_compile_backend", "torch_compile_mode"}  # tests/cases
    args = config(**BASE)
    setattr(args, key, True)
    with refused(key, "not supported"):
        check_options(args)


# What no run could honor: the options, the error's key, what it names.
CONTRADICTIONS = [
    ({"loss_type": ["sigmoid", "sigmoid"]}, "loss_type", "twice"),
    ({"f_divergence_type": "chi"}, "f_divergence_type", "'chi'"),
    ({"f_divergence_type": "forward_kl", "loss_type": ["apo_zero"]}, "f_divergence_type", "apo_zero;"),
    ({"use_weighting": True, "loss_type": ["aot"]}, "use_weighting", "aot"),
    ({"label_smoothing": 0.5, "loss_type": ["robust"]}, "label_smoothing", "0.5 is out of range"),
    ({"loss_type": ["exo_pair"]}, "label_smoothing", "exo_pair"),
    ({"ld_alpha": 1.5}, "ld_alpha", "1.5 is out of range"),
    ({"loss_type": ["kl"]}, "margin_scale", ": kl "),
]


@pytest.mark.parametrize(("options", "key", "detail"), CONTRADICTIONS, ids=[str(row[0]) for row in CONTRADICTIONS])
def test_what_no_run_could_honor_is_refused(options, key, detail):
    with refused(key, detail):
        check_options(MDPOConfig(**BASE, **options))


WITHOUT_EFFECT = [
    {"margin_scale": 1.0, "loss_type": ["ipo"]},
    {"length_penalty": 0.1, "loss_type": ["hinge"]},
    {"pad_to_multiple_of": 8},
    {"ld_alpha": 0.5, "loss_type": ["sft"]},
    {"f_alpha_divergence_coef": 0.3},
    {"ref_model_mixup_alpha": 0.5},
    {"ref_model_sync_steps": 5},
    {"precompute_ref_batch_size": 2},
]
OURS_ALONE = ("margin_scale", "length_penalty", "pad_to_multiple_of")  # under trl.DPOConfig no key, or one that works


@pytest.mark.parametrize("options", WITHOUT_EFFECT, ids=lambda options: next(iter(options)))
def test_options_without_effect_are_refused_or_named(options):
    """Refused under MDPOConfig, which recipes use; named under trl.DPOConfig, under which TRL's scripts run on."""
    key = next(iter(options))
    with refused(key, "no effect"):
        check_options(MDPOConfig(**BASE, **options))
    if key not in OURS_ALONE:
        [line] = check_options(DPOConfig(**BASE, **options))
        assert line.startswith(f"{key}: has no effect")


@pytest.mark.parametrize(("key", "values", "says"), CONDITIONS, ids=[key for key, *_ in CONDITIONS])
def test_what_needs_another_option_is_said(key, values, says):
    lines = check_options(MDPOConfig(**BASE, **values))
    assert len(lines) == 1 and lines[0].startswith(f"{key}: has no effect ") and says in lines[0]


def test_defaults_are_silent():
    assert check_options(MDPOConfig(**BASE)) == check_options(DPOConfig(**BASE)) == []
    useful = {"eval_strategy": "steps", "eval_steps": 5, "save_steps": 5, "warmup_steps": 3, "num_train_epochs": 2}
    assert check_options(MDPOConfig(**BASE, **useful)) == []


RUNS = [
    # (the recipe, the key of its error and what is in it; None where it is good)
    ({"do_train": True}, None),
    ({"do_eval": True}, None),  # the default splits hold `test`
    ({"do_eval": True, "dataset_splits": ["train"]}, ("do_eval", "nothing to evaluate on", "test_split_size")),
    ({"do_eval": True, "dataset_splits": ["train"], "test_split_size": 0.1}, None),
    ({"do_eval": False, "dataset_splits": ["train"]}, None),
    ({"do_eval": False}, ("do_eval", "do_eval: false", "dataset_splits asks")),
    (
        {"do_eval": False, "dataset_splits": ["train"], "eval_dataset_mixer": {"a": 1.0}},
        ("do_eval", "do_eval: false", "eval_dataset_mixer asks"),
    ),
    ({"fsdp_config": {"min_num_params": 1}}, ("fsdp_config", "not supported")),
]


@pytest.mark.parametrize(("recipe", "error"), RUNS, ids=[str(recipe) for recipe, _ in RUNS])
def test_a_recipe_that_asks_for_another_run(recipe, error):
    args = MDPOConfig(**BASE)
    if error is None:
        assert check_options(args, None, recipe) == []
        return
    with refused(*error):
        check_options(args, None, recipe)


# ---------------------------------------------------------------- parallelism


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true"),
        *((f"PARALLELISM_CONFIG_{axis}_SIZE", "2") for axis in ("TP", "CP", "DP_SHARD", "DP_REPLICATE")),
    ],
)
def test_parallelism_of_the_accelerate_file(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with refused("parallelism_config", "not supported"):
        check_options(MDPOConfig(**BASE))


def test_parallelism_as_the_launcher_passes_it(monkeypatch):
    """Of an accelerate file through accelerate's own code, not by names that we remember."""
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils.launch import prepare_extend_env_parallelism_config

    flags = ["--use_parallelism_config", "--parallelism_config_cp_size", "2", "run_dpo.py"]
    passed = prepare_extend_env_parallelism_config(launch_command_parser().parse_args(flags), {})
    assert len(passed) > 5
    for name in passed:
        monkeypatch.setenv(name, passed[name])
    with refused("parallelism_config", "the accelerate file's"):
        check_options(MDPOConfig(**BASE))


@pytest.mark.parametrize(
    ("key", "options", "env"),
    [
        ("parallelism_config", {}, {}),  # one process
        ("parallelism_config", {}, {"PARALLELISM_CONFIG_SP_BACKEND": "ring"}),
        ("disable_dropout", {"disable_dropout": False}, {"WORLD": "4"}),
        ("neftune_noise_alpha", {"neftune_noise_alpha": 5.0}, {"WORLD": "4"}),
        ("torch_compile", {"torch_compile": True}, {"WORLD": "4"}),
        ("pad_to_multiple_of", {"pad_to_multiple_of": 8}, {"WORLD": "4"}),
        ("include_num_input_tokens_seen", {"include_num_input_tokens_seen": "all"}, {"WORLD": "4"}),
        ("train_sampling_strategy", {"train_sampling_strategy": "batch_rebalance"}, {"WORLD": "4"}),
        ("parallelism_config", {}, {"WORLD": "3"}),
    ],
)
def test_what_does_not_go_with_sequence_parallel(key, options, env, monkeypatch):
    monkeypatch.setenv("PARALLELISM_CONFIG_SP_SIZE", "2")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    args = MDPOConfig(**{**BASE, **options})
    monkeypatch.setattr(type(args), "world_size", property(lambda _: int(os.environ.get("WORLD", 1))))
    with refused(key, "parallelism_config"):
        refuse_parallelism(args)


def test_models_whose_rows_cannot_be_shared(monkeypatch):
    layers = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    few = transformers.LlamaConfig(num_attention_heads=2, num_key_value_heads=1)
    other = transformers.Qwen3NextConfig(**layers)
    assert refuse_model(few) == refuse_model(other) == []
    monkeypatch.setenv("PARALLELISM_CONFIG_SP_SIZE", "4")
    assert refuse_model(None) == []
    (line,) = refuse_model(transformers.LlamaConfig(num_attention_heads=9, num_key_value_heads=3, hidden_size=36))
    assert "2 to 3 of 9" in line and "1.33" in line
    with refused("parallelism_config", "2 heads"):
        refuse_model(few)
    with refused("parallelism_config", "linear_attention"):
        refuse_model(other)
    with refused("parallelism_config", "rwkv"):
        refuse_model(transformers.RwkvConfig())


def test_what_a_trainer_refuses_where_ranks_share_rows(monkeypatch):
    model = tiny_llama(tokenizer_for(CHATML))
    model.config.layer_types = ["linear_attention", "full_attention"]
    assert "linear_attention" in packing_refused(model)
    monkeypatch.setenv("PARALLELISM_CONFIG_SP_SIZE", "2")
    with refused("parallelism_config", "LlamaForCausalLM", "linear_attention"):
        packing_refused(model)
    with refused("compute_metrics"):
        ResumableTrainer(model, compute_metrics=len)


def test_sequence_parallel_is_kept_from_accelerate(monkeypatch):
    """Which would cut batches along their rows."""
    monkeypatch.setenv("PARALLELISM_CONFIG_SP_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    args = MDPOConfig(**BASE)
    monkeypatch.setattr(type(args), "world_size", property(lambda _: 4))
    refuse_parallelism(args)
    assert os.environ["ACCELERATE_USE_PARALLELISM_CONFIG"] == "false"


def test_parallelism_of_the_arguments(monkeypatch, tmp_path):
    from accelerate.parallelism_config import ParallelismConfig

    with refused("parallelism_config", "not supported"):
        check_options(MDPOConfig(**BASE, parallelism_config=ParallelismConfig()))
    path = tmp_path / "r.yaml"
    path.write_text("model_name_or_path: m\ndataset_mixer: {a: 1.0}\nparallelism_config: {cp_size: 2}\n")
    with refused("parallelism_config", "r.yaml:3: ", "not supported"):
        load_recipe([str(path)])
    args = MDPOConfig(**BASE)
    args.model_init_kwargs = {"tp_plan": "auto"}
    with refused("model_init_kwargs", "tp_plan is not supported"):
        check_options(args)
    monkeypatch.setenv("ACCELERATE_USE_MEGATRON_LM", "true")
    with refused("megatron_lm_config", "MEGATRON_LM"):
        refuse_parallelism(MDPOConfig(**BASE))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sequence_parallel_size", 2),
        ("tensor_parallel", {"autotp_size": 2}),
        ("expert_parallel", {"enabled": True, "autoep_size": 2}),
    ],
)
def test_parallelism_of_a_deepspeed_configuration(key, value):
    class Plugin:
        zero_stage, deepspeed_config = 2, {key: value}

    args = MDPOConfig(**BASE)
    args.deepspeed_plugin = Plugin()
    with refused("deepspeed", f"its {key} is not supported"):
        refuse_parallelism(args)
    Plugin.deepspeed_config = {"sequence_parallel_size": 1, "zero_optimization": {"stage": 2}}
    refuse_parallelism(args)
