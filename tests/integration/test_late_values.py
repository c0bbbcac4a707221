"""Values that only transformers, torch and PEFT refuse: told by their key, before anything is loaded."""

import dataclasses
import math

import pytest
import torch
from errors import refused
from tiny import CHATML, agent_rows, tiny_llama, tokenizer_for
from transformers import AutoConfig, LlamaConfig
from trl import ModelConfig

from mdpo.config.adapters import adapter_config, bare_model, one_entry, refuse_targets
from mdpo.config.late_values import check_steps, metric_names, refuse_late_values, refuse_unfit
from mdpo.config.recipe import load_recipe
from mdpo.config.schema import MDPOConfig
from mdpo.errors import UserError

BASE = {"output_dir": "out", "use_cpu": True, "bf16": False}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
LLAMA = LlamaConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, intermediate_size=32, num_attention_heads=4)


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


LATE = [
    ({"model_init_kwargs": {"torch_dtype": "float16"}}, "model_init_kwargs"),
    ({"metric_for_best_model": "nll_loss"}, "metric_for_best_model"),  # shown with nll_coefficient alone
    ({"metric_for_best_model": "eval_margins/turn_0"}, "metric_for_best_model"),
    ({"save_strategy": "best"}, "save_strategy"),
    ({"save_strategy": "best", "metric_for_best_model": "loss"}, "save_strategy"),
    ({"optim": "adamw_bnb_8bit"}, "optim"),
    ({"optim": "galore_adamw"}, "optim"),
    ({"optim": "schedule_free_adamw"}, "optim"),
    ({"optim": "sgd", "optim_args": "momentum=much"}, "optim_args"),
    ({"optim": "sgd", "optim_args": "nesterov=true"}, "optim_args"),  # torch: needs a momentum
    ({"optim": "sgd", "optim_args": "momentum"}, "optim_args"),
    ({"lr_scheduler_type": "warmup_stable_decay"}, "lr_scheduler_kwargs"),
    ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 0.01}}, "lr_scheduler_kwargs"),  # above lr
    ({"lr_scheduler_type": "polynomial", "learning_rate": 1e-8}, "lr_scheduler_kwargs"),
    ({"optim": "sgd", "optim_args": "momentum", "optim_target_modules": ["q_proj"]}, "optim_args"),
    ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": "x"}}, "lr_scheduler_kwargs"),
    ({"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"min_lr": 1}}, "lr_scheduler_kwargs"),
    ({"report_to": ["tensorboard", "tensorbord"]}, "report_to"),
    ({"gradient_checkpointing_kwargs": {"use_rentrant": True}}, "gradient_checkpointing_kwargs"),
    ({"gradient_checkpointing_kwargs": {"use_reentrant": "no"}}, "gradient_checkpointing_kwargs"),
    ({"accelerator_config": {"split_batches": True}}, "accelerator_config"),
    ({"accelerator_config": {"even_batches": False}}, "accelerator_config"),
    ({"dataloader_persistent_workers": True}, "dataloader_persistent_workers"),
    (
        {"dataloader_multiprocessing_context": "spork", "dataloader_num_workers": 1},
        "dataloader_multiprocessing_context",
    ),
]


@pytest.mark.parametrize(("values", "key"), LATE, ids=[str(values) for values, _ in LATE])
def test_a_late_value_is_refused_by_its_key(values, key):
    with refused(key, f"{key}: ") as caught:
        refuse_late_values(MDPOConfig(**BASE, **values), ModelConfig())
    assert "\n" not in str(caught.value)


FINE = [
    {},
    {"load_best_model_at_end": True, "metric_for_best_model": "eval_rewards/accuracies", **EVALUATED},
    {"metric_for_best_model": "nll_loss", "nll_coefficient": 0.1},
    {"metric_for_best_model": "margins/turn_2"},
    {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-6}},
    {"lr_scheduler_type": "reduce_lr_on_plateau", **EVALUATED},
    {"optim": "sgd", "optim_args": "momentum=0.9, nesterov=true"},
    {"optim": "adafactor"},
    {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1e-9}},
    {"gradient_checkpointing_kwargs": {"use_reentrant": True, "every_n_layers": 2}},
    {"accelerator_config": {"non_blocking": True}},
    {"report_to": ["tensorboard"]},
]


@pytest.mark.parametrize("values", FINE, ids=str)
def test_what_works_is_let_pass(values):
    assert refuse_late_values(MDPOConfig(**BASE, **values), ModelConfig()) == []


def test_what_the_optimizer_does_not_read_is_said():
    args = MDPOConfig(**BASE, optim="sgd", adam_beta1=0.8, optim_args="momentum=0.5")
    assert refuse_late_values(args, ModelConfig()) == ["adam_beta1: has no effect with optim: sgd."]
    args = MDPOConfig(**BASE, optim_args="momentum=0.5")
    assert refuse_late_values(args, ModelConfig()) == ["optim_args: has no effect with optim: adamw_torch_fused."]
    args = MDPOConfig(
        **BASE, optim_args="momentum=0.5", optim_target_modules=["q_proj"]
    )  # which mdpo.config.validation names
    assert refuse_late_values(args, ModelConfig()) == ["optim_args: has no effect with optim: adamw_torch_fused."]


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"attn_implementation": "flash"}, "attn_implementation"),
        ({"load_in_4bit": True}, "load_in_4bit"),
        ({"load_in_8bit": True}, "load_in_8bit"),
    ],
)
def test_values_of_the_model(values, key):
    with refused(key, f"{key}: "):
        refuse_late_values(MDPOConfig(**BASE), ModelConfig(**values))
    refuse_late_values(MDPOConfig(**BASE), ModelConfig(attn_implementation="sdpa"))


def test_metrics_are_those_of_an_evaluation(tmp_path):
    """Of a real evaluation: each name but figures by turn is known, and nothing else is but aux_loss."""
    from datasets import Dataset

    from dpo_trainer import DPOTrainer

    tokenizer = tokenizer_for(CHATML, "letters", eos="<|im_end|>")
    rows = Dataset.from_list(agent_rows(4))
    args = MDPOConfig(**{**BASE, "output_dir": str(tmp_path)}, report_to="none", per_device_eval_batch_size=4)
    trainer = DPOTrainer(tiny_llama(tokenizer), args=args, train_dataset=rows, eval_dataset=rows,
                         processing_class=tokenizer)  # fmt: skip
    found = {name.removeprefix("eval_") for name in trainer.evaluate()}
    by_turn = {name for name in found if "turn" in name}
    assert by_turn and found - by_turn - {"epoch", "model_preparation_time"} == metric_names(args) - {"aux_loss"}
    for name in by_turn:
        refuse_late_values(dataclasses.replace(args, metric_for_best_model=name), ModelConfig())


# ---------------------------------------------------------------- adapters


def refusal(**values) -> str | None:
    model = ModelConfig(use_peft=True, lora_dropout=0.0, **values)
    one_entry(model)
    try:
        refuse_unfit(MDPOConfig(**BASE), adapter_config(model), LLAMA)
    except UserError as error:
        assert "\n" not in str(error)
        return str(error)
    return None


TARGETS = [
    ({"lora_target_modules": ["(q|v)_proj"]}, "lora_target_modules: the pattern '(q|v)_proj' matches no whole path"),
    ({"lora_target_modules": ["(q"]}, "lora_target_modules: '(q' is no pattern"),
    ({"lora_target_modules": ["all_linear"]}, "Did you mean all-linear?"),
    ({"lora_target_modules": ["norm"]}, "lora_target_modules: PEFT cannot put this adapter on LlamaForCausalLM"),
    ({"lora_target_modules": []}, "lora_target_modules: "),
    ({"lora_modules_to_save": ["head"]}, "lora_modules_to_save: 'head' is no part of the model. Did you mean lm_head?"),
    ({"lora_target_parameters": ["up.weight"]}, "lora_target_parameters: 'up.weight' is no part of the model"),
    ({"lora_r": 0}, "lora_r: "),
    ({"lora_alpha": 0}, "lora_alpha: 0 makes"),
    ({"lora_task_type": "SEQ_CLS"}, "lora_task_type: SEQ_CLS is not supported"),
    ({"lora_task_type": "CAUSAL"}, "lora_task_type: Invalid task type: 'CAUSAL'"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "says"), TARGETS, ids=[str(values) for values, _ in TARGETS])
def test_targets_of_no_module(values, says):
    assert says in (refusal(**values) or "")


@pytest.mark.parametrize(
    "targets", [None, ["q_proj"], ["q_proj", "v_proj"], ["all-linear"], [r".*\.(q|v)_proj"], ["layers.1.mlp.up_proj"]]
)
def test_targets_that_are_there(targets):
    assert refusal(lora_target_modules=targets, lora_modules_to_save=["lm_head"]) is None


EXPERTS = {
    "qwen3_moe": ["q_proj", "gate_proj", "up_proj", "down_proj"],
    "mixtral": ["w1", "w2", "w3"],
}


@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_by_the_names_of_checkpoints(kind):
    """PEFT turns them into the stacked weights' names; one half of a stacked matrix alone is refused, and so is a name
    that no expert has."""
    sizes = {"hidden_size": 32, "moe_intermediate_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    count = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "num_attention_heads": 2}
    model = bare_model(AutoConfig.for_model(kind, **sizes, **count, num_key_value_heads=2, head_dim=16, vocab_size=64))

    def adapter(*names: str):
        return adapter_config(ModelConfig(use_peft=True, lora_dropout=0.0, lora_r=2, lora_target_modules=[*names]))

    half = EXPERTS[kind][-3 if kind == "qwen3_moe" else 0]
    for names, says in (((half, "q_proj"), half), (("q_proj", "up_projs"), "'up_projs' is no part of the model")):
        with refused("lora_target_modules", says):
            refuse_targets(model, adapter(*names))
    refuse_targets(model, adapter(*EXPERTS[kind], "k_proj"))
    adapted = {name.split(".lora_A")[0].split(".")[-1] for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == {"experts", "base_layer", "k_proj"} | ({"q_proj"} if kind == "qwen3_moe" else set())


def test_one_entry_means_that_module():
    """PEFT puts the adapter on both layers' q_proj; as trl.ModelConfig has it, a text, on none."""
    model = ModelConfig(use_peft=True, lora_target_modules=["q_proj"])
    assert model.lora_target_modules == "q_proj"
    with refused("lora_target_modules", "'q_proj'"):
        refuse_targets(bare_model(LLAMA), adapter_config(model))
    one_entry(model)
    bare = bare_model(LLAMA)
    refuse_targets(bare, adapter_config(model))
    assert sum("lora_A" in name for name, _ in bare.named_parameters()) == 2


def test_the_model_without_weights_holds_none_and_moves_no_generator():
    before = torch.random.get_rng_state()
    bare = bare_model(LLAMA)
    assert {p.device.type for p in bare.parameters()} == {"meta"}
    assert torch.equal(before, torch.random.get_rng_state())
    assert LLAMA._attn_implementation != "eager" or LLAMA._attn_implementation_internal is None


@pytest.mark.parametrize("key", ["use_cach", "num_layer", "atn_implementation"])
def test_model_init_kwargs_of_no_model(key):
    args = MDPOConfig(**BASE, model_init_kwargs={"use_cache": False, "dtype": "auto", "cache_dir": "x", key: 1})
    with refused("model_init_kwargs", f"'{key}'", "LlamaConfig"):
        refuse_unfit(args, None, LLAMA)
    known = {"revision": "main", "subfolder": "x", "quantization_config": None, "device_map": None,
             "low_cpu_mem_usage": True, "attn_implementation": "sdpa", "trust_remote_code": True, "token": "x",
             "local_files_only": True, "num_hidden_layers": 1, "use_safetensors": True, "variant": "x"}  # fmt: skip
    refuse_unfit(MDPOConfig(**BASE, model_init_kwargs=known), None, LLAMA)


def test_optimizers_of_some_modules():
    args = MDPOConfig(**BASE, optim="galore_adamw", optim_target_modules=["q_proj"])
    with refused("optim", "galore_torch"):  # not installed
        refuse_unfit(args, None, LLAMA)


# ---------------------------------------------------------------- with the data


def test_a_batch_as_large_as_the_set():
    args = MDPOConfig(**BASE, dataloader_drop_last=True, per_device_train_batch_size=16)
    assert check_steps(args, 16) == []
    assert check_steps(MDPOConfig(**BASE, per_device_train_batch_size=16), 4) == []


def test_warm_up_that_outlasts_training():
    """20 pairs by 4, two accumulated: 3 steps an epoch, 6 in two."""
    values = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_train_epochs": 2}
    assert check_steps(MDPOConfig(**BASE, **values, warmup_steps=5), 20) == []
    assert check_steps(MDPOConfig(**BASE, **values, warmup_steps=0.9), 20) == []
    [line] = check_steps(MDPOConfig(**BASE, **values, warmup_steps=6), 20)
    assert line == "warning: warmup_steps: 6 are not over after all 6 steps."


# ---------------------------------------------------------------- from a recipe

RANGES = ["weight_decay: -1", "adam_beta1: 1.5", "adam_epsilon: -1", "neftune_noise_alpha: -5", "max_steps: 0",
          "max_grad_norm: -1", "dataloader_num_workers: -1", "save_steps: -2", "ref_model_sync_steps: 0",
          "ref_model_mixup_alpha: 1.5", "include_num_input_tokens_seen: some", "discopop_tau: 0"]  # fmt: skip


@pytest.mark.parametrize(
    "line",
    [*RANGES, "debug: foo", "deepspeed: '{x'", "accelerator_config: no_such_file.json"],
)
def test_what_a_dataclass_refuses_is_placed(tmp_path, line):
    path = tmp_path / "r.yaml"
    path.write_text(f"model_name_or_path: m\ndataset_mixer: {{a: 1.0}}\nbf16: false\nuse_cpu: true\n{line}\nseed: 3\n")
    key = line.partition(":")[0]
    with refused(key, f"r.yaml:5: {key}: ") as caught:
        load_recipe([str(path)])
    assert "\n" not in str(caught.value)


def test_the_edges_of_ranges():
    edges = {"weight_decay": 0, "adam_beta1": 0, "max_steps": -1, "max_grad_norm": 0, "ref_model_mixup_alpha": 1.0}
    args = MDPOConfig(**BASE, **edges, eval_delay=0, pad_to_multiple_of=8, dataset_num_proc=1)
    assert all(math.isclose(getattr(args, key), value) for key, value in edges.items())
