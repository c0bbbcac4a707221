"""What TRL's users find on this trainer under a plain DPOConfig, beside the numbers of test_trl_parity.py."""

import pytest
import torch
import trl
from datasets import Dataset
from errors import refused
from peft import LoraConfig, get_peft_model
from tiny import CHATML, agent_rows, tiny_llama, tiny_mixtral, tokenizer_for
from trainers import explicit
from trl import DPOConfig

from dpo_trainer import DPOTrainer
from mdpo.config.schema import MDPOConfig

TOKENIZER = tokenizer_for(CHATML, "byte", eos="<|im_end|>")
ROLES = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"


def trainer_of(cls, folder, model, config=DPOConfig, tokenizer=TOKENIZER, peft_config=None, **options):
    defaults = {"per_device_train_batch_size": 2, "max_steps": 2, "logging_steps": 1, "learning_rate": 1e-2}
    fixed = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "gradient_checkpointing": False}
    args = config(str(folder / cls.__module__), **{**defaults, **fixed, **options})
    rows = Dataset.from_list(explicit(agent_rows(4)))
    return cls(model, args=args, train_dataset=rows, processing_class=tokenizer, peft_config=peft_config)


def test_a_user_s_mistake_is_a_value_error(tmp_path):
    with pytest.raises(ValueError, match="same object"):
        model = tiny_llama(TOKENIZER)
        args = DPOConfig(str(tmp_path), use_cpu=True, bf16=False)
        DPOTrainer(model, model, args, train_dataset=Dataset.from_list(agent_rows(2)), processing_class=TOKENIZER)


def test_trl_s_rule_asks_a_template_for_no_end_of_turn(tmp_path):
    """This one closes turns with a line break, which is no special token; masks of turns are not to be had from it."""
    tokenizer = tokenizer_for(ROLES, "byte")
    with refused("chat_template", r"'\nuser: '"):
        trainer_of(DPOTrainer, tmp_path, tiny_llama(tokenizer), MDPOConfig, tokenizer)
    losses = []
    for cls in (trl.DPOTrainer, DPOTrainer):
        model = tiny_llama(tokenizer)
        model.save_pretrained(tmp_path / "model")
        model.config._name_or_path = str(tmp_path / "model")
        trainer = trainer_of(cls, tmp_path, model, tokenizer=tokenizer)
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0][0] != losses[0][1]


EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("targets", [{"target_modules": "all-linear"}, EXPERTS], ids=["all-linear", "experts"])
def test_lora_on_experts_ends_with_trl_s_adapters(targets, wrapped, tmp_path):
    found = []
    for cls in (trl.DPOTrainer, DPOTrainer):
        model, config = tiny_mixtral(TOKENIZER), LoraConfig(r=2, **targets)
        torch.manual_seed(3)
        model = get_peft_model(model, config) if wrapped else model
        trainer = trainer_of(cls, tmp_path, model, peft_config=None if wrapped else config)
        trainer.train()
        shapes = {name: (tuple(p.shape), p.requires_grad) for name, p in trainer.model.named_parameters()}
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        flags = trainer.aux_loss_enabled, trainer.router_aux_loss_coef, trainer.ref_model
        found.append((sorted(trainer.model.peft_config), shapes, flags, losses))
    (*theirs, loss), (*ours, our_loss) = found
    assert ours == theirs and ours[0] == (["default", "ref"] if wrapped else ["default"])
    assert our_loss == pytest.approx(loss, rel=1e-4)


def test_experts_with_lora_dropout_are_refused_in_words(tmp_path):
    config = LoraConfig(r=2, lora_dropout=0.1, **EXPERTS)
    with refused("peft_config", "MixtralForCausalLM", "lora_dropout"):
        trainer_of(DPOTrainer, tmp_path, tiny_mixtral(TOKENIZER), peft_config=config)
