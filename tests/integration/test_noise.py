"""The reference's log-probs hold no noise, whatever the policy is trained with: NEFTune's on embeddings, or dropout."""

import math

import pytest
import torch
import trl
from peft import LoraConfig, get_peft_model
from tiny import CHATML, agent_rows, tiny_llama, tokenizer_for
from torch import nn
from trainers import trainer_of
from transformers.integrations.neftune import activate_neftune

from dpo_trainer import DPOTrainer
from mdpo.config.schema import MDPOConfig
from mdpo.forward.collators import PackedCollator, PairCollator
from mdpo.forward.modes import evaluating
from mdpo.reference.model import score_reference

TOKENIZER = tokenizer_for(CHATML, "byte", eos="<|im_end|>")
ALPHA = 20.0
NOISES = {"neftune": {"neftune_noise_alpha": ALPHA}, "dropout": {"disable_dropout": False}}
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.3, "task_type": "CAUSAL_LM"}


def dropping(seed=0):
    return tiny_llama(TOKENIZER, seed=seed, attention_dropout=0.3)


def adapted(seed=0):
    torch.manual_seed(3)
    return get_peft_model(dropping(), LoraConfig(**LORA, init_lora_weights=False))


# (policy, reference, adapter's configuration): what a reference may be.
REFERENCES = {
    "no adapter": lambda: (dropping(), None, LoraConfig(**LORA)),
    "own adapter": lambda: (adapted(), None, None),
    "a copy": lambda: (dropping(), None, None),
    "an object": lambda: (dropping(), dropping(1), None),
}


def trainer(folder, name, **options):
    policy, reference, peft_config = REFERENCES[name]()
    rows, models = agent_rows(8), lambda: (policy, reference)
    options = {"max_steps": 1, **options}
    return trainer_of(DPOTrainer, rows, folder, TOKENIZER, MDPOConfig, models, peft_config, **options)


def first_loss(trained) -> float:
    trained.train()
    return trained.state.log_history[0]["loss"]


def test_every_module_is_in_its_mode_again():
    model = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)))
    model.train()
    model[1][0].eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == before == [True, True, True, False, True]


@pytest.mark.parametrize(
    ("name", "noise", "shared_prefix"),
    [
        ("no adapter", "neftune", True),
        ("no adapter", "dropout", True),
        ("own adapter", "dropout", False),
        ("a copy", "dropout", True),
        ("an object", "neftune", False),
    ],
)
def test_the_first_loss_is_the_same_computed_ahead(name, noise, shared_prefix, tmp_path):
    """Not ln 2, as the policy's own log-probs do hold noise. A second start finds log-probs on disk."""
    options = {**NOISES[noise], "shared_prefix": shared_prefix}
    ahead = {"precompute_ref_log_probs": True, "reference_cache_dir": str(tmp_path / "cache"), **options}
    losses = [first_loss(trainer(tmp_path, name, **given)) for given in (options, ahead, ahead)]
    assert losses[0] == losses[1] == losses[2]
    assert abs(losses[0] - math.log(2)) > 1e-3


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("name", "noise"),
    [("no adapter", "neftune"), ("no adapter", "dropout"), ("own adapter", "dropout"), ("a copy", "dropout")],
)
def test_a_step_s_reference_is_that_of_evaluation(name, noise, checkpointing, tmp_path):
    """Bit by bit, with the policy in training mode; neither its modes nor the generator move. With noise, the policy's
    own log-probs move."""
    made = trainer(tmp_path, name, gradient_checkpointing=checkpointing, **NOISES[noise])
    model = made.model
    if noise == "neftune":
        activate_neftune(model, ALPHA, made.accelerator)
    batch = next(iter(made.get_train_dataloader()))

    def logps():
        return score_reference(made.ref_model, model, made.accelerator, batch, made.layout).logps

    model.eval()
    wanted = logps()
    model.train()
    list(model.modules())[-1].training = False
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    assert torch.equal(logps(), wanted)
    assert [m.training for m in model.modules()] == modes and torch.equal(torch.get_rng_state(), state)
    losses = [made.compute_loss(model, batch).item() for _ in range(2)]
    assert losses[0] != losses[1]
    model.eval()
    assert len({made.compute_loss(model, batch).item() for _ in range(2)}) == 1


@pytest.mark.parametrize("noise", NOISES)
def test_evaluation_between_steps_holds_none(noise, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.0, "max_steps": 2, **NOISES[noise]}
    made = trainer(tmp_path, "an object", **options)
    made.train()
    found = [log["eval_loss"] for log in made.state.log_history if "eval_loss" in log]
    found.append(made.evaluate()["eval_loss"])
    assert len(found) == 3 and len(set(found)) == 1


def test_a_reference_that_moves_holds_none(tmp_path):
    options = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5, **NOISES["dropout"]}
    made = trainer(tmp_path, "a copy", **options)
    made.train()
    batch = next(iter(made.get_train_dataloader()))
    made.model.train()
    twice = [score_reference(made.ref_model, made.model, made.accelerator, batch, made.layout).logps for _ in range(2)]
    assert torch.equal(*twice)


@pytest.mark.parametrize("name", REFERENCES)
def test_training_draws_the_same_wherever_the_reference_comes_from(name, tmp_path):
    ahead = {"precompute_ref_log_probs": True, "reference_cache_dir": str(tmp_path / "cache")}
    states = []
    for options in ({}, ahead, ahead):
        trainer(tmp_path, name, **options)
        states.append(torch.get_rng_state())
    assert all(torch.equal(state, states[0]) for state in states)


def test_embeddings_noise_is_that_of_padded_rows(tmp_path, capsys):
    """A packed row is as long as all of its pairs together, and NEFTune divides by the square root of that."""
    packed = trainer(tmp_path, "a copy")
    noisy = trainer(tmp_path, "a copy", **NOISES["neftune"])
    assert isinstance(packed.data_collator, PackedCollator) and isinstance(noisy.data_collator, PairCollator)
    assert "shared_prefix: off for LlamaForCausalLM: neftune_noise_alpha's noise goes by" in capsys.readouterr().out


def test_embeddings_noise_is_trl_s(tmp_path):
    """Two steps of both trainers draw the same noise, and without it have other losses."""
    losses = {}
    for alpha in (None, ALPHA):
        for cls in (DPOTrainer, trl.DPOTrainer):
            made = trainer_of(cls, agent_rows(8), tmp_path, TOKENIZER, neftune_noise_alpha=alpha)
            made.train()
            losses[cls, alpha] = [log["loss"] for log in made.state.log_history if "loss" in log]
        assert losses[DPOTrainer, alpha] == pytest.approx(losses[trl.DPOTrainer, alpha], rel=1e-4)
    assert losses[DPOTrainer, ALPHA] != pytest.approx(losses[DPOTrainer, None], rel=1e-2)
