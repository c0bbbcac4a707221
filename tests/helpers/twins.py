"""Small models of the recipes' families."""

import json
from pathlib import Path

import torch
from repository import ROOT
from tiny import CHATML, tokenizer_for, trl_template
from transformers import AutoConfig, AutoModelForCausalLM

# Mistral-7B-Instruct-v0.3 in short: the same text where there is no system message and no list of tools.
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
    "{% elif m['role'] == 'tool' %}{{ '[TOOL_RESULTS] {\"content\": ' + m['content'] + ', \"call_id\": \"' + "
    "m['tool_call_id'] + '\"}[/TOOL_RESULTS]' }}"
    "{% elif m['tool_calls'] %}{{ '[TOOL_CALLS] [' }}{% for call in m['tool_calls'] %}"
    "{% if call['id']|length != 9 %}{{ raise_exception('Tool call IDs should have 9 characters') }}{% endif %}"
    "{{ (call['function']|tojson)[:-1] + ', \"id\": \"' + call['id'] + '\"}' }}{{ ', ' if not loop.last }}"
    "{% endfor %}{{ ']' + eos_token }}"
    "{% else %}{{ ' ' + m['content']|trim + eos_token }}{% endif %}{% endfor %}"
)
TEMPLATES = {  # family: (template, kind of tokenizer, end of turn)
    "codegemma-7b-it": (trl_template("gemma"), "byte", "<eos>"),
    "gemma-2-9b-it": (trl_template("gemma"), "byte", "<eos>"),
    "gemma-7b-it": (trl_template("gemma"), "byte", "<eos>"),
    "llama-3.1-8b": (trl_template("llama3_1"), "byte", "<|eot_id|>"),
    "llama-3.3-70b": (trl_template("llama3_1"), "byte", "<|eot_id|>"),  # TRL ships none of 3.3's own; the same markers
    "mistral-7b-v0.3": (MISTRAL, "always", "<eos>"),
    "qwen2.5-7b": (trl_template("qwen2_5"), "byte", "<|im_end|>"),
    "qwen3-30b-a3b": (trl_template("qwen3"), "byte", "<|im_end|>"),
    "qwen3-8b": (trl_template("qwen3"), "byte", "<|im_end|>"),
    "smollm2-135m": (CHATML, "byte", "<|im_end|>"),
}
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def small_twin(family: str, folder: Path, seed: int) -> Path:
    """A random model of the family's own architecture with small sizes: shared keys and values, tied embeddings, soft
    caps, windows and wide heads stay; and a small tokenizer with the family's template."""
    template, kind, end = TEMPLATES[family]
    tokenizer = tokenizer_for(template, kind, end)
    published = json.loads((ROOT / "recipes" / family / "config.json").read_text())
    heads, shared = published["num_attention_heads"], published["num_key_value_heads"]
    sizes = SMALL | {"num_key_value_heads": 4 if heads == shared else 2, "vocab_size": len(tokenizer) + 8}
    wide = published.get("head_dim", 0) * heads > published["hidden_size"]
    sizes |= {"head_dim": 16 if wide else 8} if "head_dim" in published else {}
    sizes |= {"sliding_window": 32} if family == "gemma-2-9b-it" else {}
    sizes |= (
        {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16} if "num_experts" in published else {}
    )
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = AutoConfig.for_model(**{**published, **sizes, **ids, "initializer_range": 0.3, "dtype": "float32"})
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
