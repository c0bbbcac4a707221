"""No key without a use: every key of ours, of trl.DPOConfig and every loss stands in a recipe, or in a list below with
the test that holds what it does."""

import ast
import dataclasses
import re
from functools import cache

import pytest
import yaml
from repository import ROOT
from trl import DPOConfig

from mdpo.config.schema import DataArguments, MDPOConfig
from mdpo.loss.registry import LOSSES, OF_TRL

OURS = [field.name for field in dataclasses.fields(DataArguments)] + list(MDPOConfig.__annotations__)
OF_DPO = [key for key in DPOConfig.__annotations__ if key not in OURS]

# Keys of ours that every recipe leaves at their defaults, and the test of what they do when set.
WITHOUT_A_RECIPE = {
    "dataset_configs": "test_pairs: test_dataset_configs",
    "tokenizer_name_or_path": "test_pairs: test_tokenizer_name_or_path",
    "chat_template": "test_pairs: test_chat_template_and_its_kwargs",
    "pairs": "test_groups: test_which_answers_are_compared",
    "min_reward_gap": "test_groups: test_which_answers_are_compared",
    "max_pairs_per_prompt": "test_groups: test_which_answers_are_compared",
    "allow_different_prompts": "test_data_report: test_prompts_that_differ_are_kept_where_the_recipe_allows_it",
    "turns_without_reasoning": "test_left_out: test_turns_without_reasoning_are_kept_masked_or_dropped",
    "on_bad_rows": "test_data_report: test_check_data_ends_as_the_run_would",
    "max_bad_fraction": "test_data_report: test_one_broken_set_of_a_mix_is_noticed",
    "mask_user_turns": "test_trl_parity: test_turn_masks_are_the_difference",
    "length_penalty": "test_modifications: test_length_penalty_in_the_trainer",
    "truncation_mode": "test_pairs: test_max_length_and_truncation_mode",
    "shared_prefix": "test_trainer: test_shared_prefix_changes_no_number",
    "group_pairs": "test_sampler: test_what_the_key_changes",
    "fused_ops": "test_fused: test_the_key_switches_policy_and_reference",
    "reference_cache_dir": "test_reference_cache: test_values_are_those_of_the_slow_twin",
    "sanity_check": "test_pairs: test_sanity_check_takes_the_first_pairs_of_each_set",
    "resume_from_checkpoint": "test_trainer: test_a_reference_that_moves_is_part_of_the_checkpoint",
    "max_nonfinite_steps": "test_guards: test_too_many_in_a_row_end_the_run_with_the_last_good_checkpoint",
    "logging_nan_inf_filter": "test_keys: test_trainer_s_filter_of_losses_is_off",
}
# Parity with TRL: keys of its DPOConfig that no recipe sets, and the test that compares them with TRL or refuses them.
OF_TRL_WITHOUT_A_RECIPE = {
    "beta": "test_trl_parity: test_options",
    "loss_type": "test_trl_parity: test_losses",
    "loss_weights": "test_trl_parity: test_options",
    "label_smoothing": "test_trl_parity: test_losses",
    "discopop_tau": "test_trl_parity: test_losses",
    "f_divergence_type": "test_trl_parity: test_divergences",
    "f_alpha_divergence_coef": "test_trl_parity: test_divergences",
    "ld_alpha": "test_trl_parity: test_options",
    "use_weighting": "test_trl_parity: test_options",
    "sync_ref_model": "test_trl_parity: test_options",
    "ref_model_mixup_alpha": "test_trl_parity: test_options",
    "ref_model_sync_steps": "test_trl_parity: test_options",
    "pad_to_multiple_of": "test_trl_parity: test_options",
    "disable_dropout": "test_dropout: test_every_rate_is_off",
    "pad_token": "test_trainer: test_what_only_the_trainer_refuses",
    "model_init_kwargs": "test_late_values: test_model_init_kwargs_of_no_model",
    "trust_remote_code": "test_startup: test_a_configuration_is_looked_for_where_the_model_is",
    "dataset_num_proc": "test_config: test_handbook_recipe_works",
    "padding_free": "test_effects: test_what_is_not_offered_is_refused",
    "activation_offloading": "test_effects: test_what_is_not_offered_is_refused",
}
# Losses that no recipe minimizes: TRL's are compared with TRL, those of M-DPO's code with their formulas.
LOSSES_WITHOUT_A_RECIPE = {
    **dict.fromkeys((name for name in OF_TRL if name != "sigmoid"), "test_trl_parity: test_losses"),
    **dict.fromkeys((name for name in LOSSES if name not in OF_TRL), "test_modifications: test_in_the_trainer"),
}
LISTED = {**WITHOUT_A_RECIPE, **OF_TRL_WITHOUT_A_RECIPE, **LOSSES_WITHOUT_A_RECIPE}


@cache
def in_recipes() -> tuple[frozenset[str], frozenset[str]]:
    """Keys that any recipe sets, and the losses that any minimizes."""
    recipes = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in (ROOT / "recipes").glob("*/dpo/*.yaml")]
    assert len(recipes) > 20
    losses = [
        recipe.get("loss_type", MDPOConfig.__dataclass_fields__["loss_type"].default_factory()) for recipe in recipes
    ]
    return frozenset(key for recipe in recipes for key in recipe), frozenset(name for names in losses for name in names)


def source_of(test: str) -> str:
    """The text of a test, "file: function", with its decorators and the tables of its module that it names; "" if there
    is no such test."""
    file, name = test.split(": ")
    paths = list((ROOT / "tests").rglob(f"{file}.py"))
    text = paths[0].read_text(encoding="utf-8") if paths else ""
    body = ast.parse(text).body
    for node in body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            first = min(part.lineno for part in (node, *node.decorator_list))
            source = "\n".join(text.splitlines()[first - 1 : node.end_lineno])
            tables = [part for part in body if isinstance(part, ast.Assign) and names_of(part) & words(source)]
            return "\n".join([source, *(ast.get_source_segment(text, table) for table in tables)])
    return ""


def names_of(node: ast.Assign) -> set[str]:
    return {target.id for target in node.targets if isinstance(target, ast.Name)}


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


def test_every_key_and_loss_has_a_recipe_or_a_test():
    keys, losses = in_recipes()
    assert {key for key in OURS if key not in keys} == set(WITHOUT_A_RECIPE)
    assert {key for key in OF_DPO if key not in keys} == set(OF_TRL_WITHOUT_A_RECIPE)
    assert {name for name in LOSSES if name not in losses} == set(LOSSES_WITHOUT_A_RECIPE)
    assert {"nll_coefficient", "margin_scale"} <= keys and "sigmoid" in losses


@pytest.mark.parametrize("name", LISTED)
def test_the_named_test_is_there_and_names_it(name):
    """TRL's losses by the list that they are in."""
    word = "OF_TRL" if name in OF_TRL else name
    assert word in words(source_of(LISTED[name])), LISTED[name]


def test_a_test_that_is_gone_or_of_something_else_would_be_seen():
    assert source_of("test_trl_parity: test_gone") == source_of("test_gone: test_losses") == ""
    assert "margin_scale" not in words(source_of("test_trl_parity: test_options"))


def test_trainer_s_filter_of_losses_is_off():
    """Ours leaves such steps out by itself, and says so; a plain DPOConfig keeps what Trainer does."""
    ours, plain = (config("out", use_cpu=True, bf16=False) for config in (MDPOConfig, DPOConfig))
    assert not ours.logging_nan_inf_filter and plain.logging_nan_inf_filter
