"""What other people's code may import: six names, where they are and how they are called."""

import importlib
import inspect

import pytest
import trl

from mdpo.data.groups import AnswerPairs

REQUIRED = inspect.Parameter.empty
SURFACE = {
    "dpo_trainer.DPOTrainer": {
        "model": REQUIRED,
        "ref_model": None,
        "args": None,
        "data_collator": None,
        "train_dataset": None,
        "eval_dataset": None,
        "processing_class": None,
        "compute_metrics": None,
        "callbacks": None,
        "optimizers": (None, None),
        "quantization_config": None,
        "peft_config": None,
    },
    "mdpo.config.recipe.load_recipe": {"argv": REQUIRED},
    "mdpo.data.tokenize.tokenize_dataset": {
        "rows": REQUIRED,
        "tokenizer": REQUIRED,
        "settings": REQUIRED,
        "name": REQUIRED,
        "num_proc": None,
        "answers": AnswerPairs(),
    },
    "mdpo.forward.collators.PairCollator": {"pad_token_id": REQUIRED, "pad_to_multiple_of": None},
    "mdpo.forward.token_logps.enable_scoring": {"model": REQUIRED, "fused": False},
}
# MDPOConfig is TRL's DPOConfig and these.
OWN_KEYS = {
    "mask_user_turns": True,
    "nll_coefficient": 0.0,
    "margin_scale": 0.0,
    "length_penalty": 0.0,
    "ref_model_name_or_path": None,
    "shared_prefix": True,
    "group_pairs": True,
    "fused_ops": True,
    "reference_cache_dir": None,
    "sanity_check": False,
    "overwrite_output_dir": False,
    "max_nonfinite_steps": 3,
    "show_answers": 0,
}


def imported(path: str):
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def parameters(function) -> dict[str, object]:
    """By name, in order: the default of each parameter."""
    return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}


@pytest.mark.parametrize("path", SURFACE)
def test_where_it_is_and_how_it_is_called(path):
    found = parameters(imported(path))
    assert found == SURFACE[path] and list(found) == list(SURFACE[path])


def test_the_trainer_is_called_as_trl_s():
    assert parameters(trl.DPOTrainer) == SURFACE["dpo_trainer.DPOTrainer"]


def test_mdpo_config_is_trl_s_with_keys_of_its_own():
    ours, theirs = parameters(imported("mdpo.config.schema.MDPOConfig")), parameters(trl.DPOConfig)
    assert {name: ours[name] for name in ours if name not in theirs} == OWN_KEYS
    assert not set(theirs) - set(ours)


def test_a_parameter_of_another_name_order_or_default_would_be_seen():
    wanted = SURFACE["mdpo.forward.token_logps.enable_scoring"]
    assert parameters(lambda model, fused=False: None) == wanted
    assert parameters(lambda model, compiled=False: None) != wanted
    assert parameters(lambda model, fused=True: None) != wanted
    assert list(parameters(lambda fused=False, *, model: None)) != list(wanted)
