"""Recipes of small configurations, for memory plans."""

from pathlib import Path

import yaml
from transformers import GemmaConfig, LlamaConfig, Qwen3Config

from mdpo.config.recipe import load_recipe

LENGTH = 400
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 8192,
    "max_position_embeddings": 2048,
}
CONFIGS = {
    "llama": LlamaConfig(**{**SIZES, "vocab_size": 32000}),
    "gemma": GemmaConfig(**{**SIZES, "num_key_value_heads": 1}),
    "qwen3": Qwen3Config(**SIZES),
}


def recipe_for(folder: Path, config, **keys):
    """A recipe that trains the model of `config`, whose configuration alone is in the folder."""
    config.save_pretrained(folder / "model")
    values = {
        "model_name_or_path": str(folder / "model"),
        "dataset_mixer": {"none.jsonl": 1.0},
        "dataset_splits": ["train"],
        "output_dir": str(folder / "out"),
        "max_length": LENGTH,
        "per_device_train_batch_size": 1,
        "precompute_ref_log_probs": True,
        "fused_ops": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "dtype": "float32",
        "bf16": False,
        **keys,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return load_recipe([str(folder / "recipe.yaml")])


LORA = {"use_peft": True, "lora_r": 16, "lora_dropout": 0.0}
TINY = Qwen3Config(**{**SIZES, "num_hidden_layers": 1})
BF16 = {"dtype": "bfloat16", "bf16": True, "gradient_checkpointing": True, "fused_ops": True}
