"""Every causal language model of the installed transformers, as small as its configuration allows."""

import copy
import dataclasses

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

FAMILIES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
MOST = 4_000_000  # weights
# How small each size can be, by what the families call it.
NAMES = {
    32: "hidden_size d_model n_embd dim_model embedding_size word_embed_proj_dim emb_dim hidden_size_per_layer_input "
    "attention_hidden_size lru_width input_embedding_size output_embedding_size embedding_dim mamba_d_ssm "
    "router_hidden_size hidden_size_global",
    64: "intermediate_size ffn_dim d_ff n_inner decoder_ffn_dim encoder_ffn_dim ffn_hidden_size dim_ff dff d_inner "
    "intermediate_size_mlp dense_intermediate_size feed_forward_size",
    2: "num_hidden_layers num_layers n_layer n_layers decoder_layers encoder_layers num_decoder_layers "
    "num_encoder_layers num_blocks num_key_value_heads num_experts_per_tok num_experts_per_token moe_topk moe_k "
    "swa_num_key_value_heads num_kv_heads num_nextn_predict_layers num_layers_per_stack num_query_groups n_mamba_heads "
    "max_window_layers",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads "
    "num_decoder_attention_heads num_encoder_attention_heads num_experts n_routed_experts num_local_experts "
    "moe_num_experts index_n_heads linear_num_value_heads linear_num_key_heads linear_num_heads mamba_n_heads "
    "mamba_num_heads swa_num_attention_heads zero_expert_num n_shared_experts mamba_d_state state_size ssm_state_size "
    "time_step_rank mamba_dt_rank laurel_rank o_groups",
    8: "head_dim v_head_dim qk_rope_head_dim qk_nope_head_dim kv_channels index_head_dim linear_key_head_dim "
    "linear_value_head_dim linear_head_dim swa_head_dim dim_head d_head attention_head_size chunk_size "
    "mamba_chunk_size block_size",
    16: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size kv_lora_rank q_lora_rank "
    "o_lora_rank shared_experts_intermediate_size shared_intermediate_size moe_shared_expert_intermediate_size "
    "mamba_d_head mamba_head_dim mamba_headdim attention_head_dim qk_head_dim index_topk hc_lowrank adapter_rank",
    1: "first_k_dense_replace num_dense_layers n_group topk_group num_kv_shared_layers n_groups mamba_n_groups "
    "mamba_ngroups num_expert_group num_shared_experts moe_layer_start_index",
    512: "max_position_embeddings n_positions n_ctx max_seq_len model_max_length context_length rel_extent "
    "sliding_window max_target_positions",
}
SIZES = {name: size for size, names in NAMES.items() for name in names.split()}
# What else a family needs.
MAMBA = {"layer_types": ["mamba", "attention"]}
SPARSE = {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1}
QSA = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
ALSO: dict[str, dict] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3, 4]},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {
        "layer_types": ["full_attention"] * 2,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}},
    },
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {**SPARSE, "n_group": 1, "topk_group": 1},
    "dots1": {**SPARSE, "n_group": 1, "topk_group": 1},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gptj": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "intermediate_size": 64},
    "granitemoehybrid": MAMBA,
    "hrm_text": {"num_hidden_layers": 16, "num_layers_per_stack": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]},
    **dict.fromkeys(("qwen4_exp", "qwen4_exp_text"), QSA),
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [16, 32],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "lsh"],
    },
    "roc_bert": {
        "shape_vocab_size": 64,
        "pronunciation_vocab_size": 64,
        "shape_embed_dim": 8,
        "pronunciation_embed_dim": 8,
    },
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "chunk_size": 16, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(family: str, vocabulary: int):
    """The family's configuration, as small as it can be."""
    kind = CONFIG_MAPPING[family]
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    tokens |= {"vocab_size": vocabulary, "vocab_size_per_layer_input": vocabulary}
    return kind(**_small(kind(), {**tokens, **ALSO.get(family, {})}))


def _small(plain, also: dict) -> dict:
    fields = {field.name for field in dataclasses.fields(plain)}
    fields -= set(plain.per_layer_attributes or ()) if hasattr(plain, "per_layer_attributes") else set()
    sizes = {name: size for name, size in SIZES.items() if name in fields and _is_size(plain, name)}
    if "kv_lora_rank" in fields:  # latent attention has as many of them as heads
        sizes["num_key_value_heads"] = 4
    for name in {"layer_types", "mlp_layer_types", "layers_block_type"} & fields:
        if isinstance(kinds := getattr(plain, name, None), list):
            sizes[name] = list(dict.fromkeys(reversed(kinds)))[-2:] if len(set(kinds)) > 1 else kinds[:2]
    for name in plain.sub_configs:
        if hasattr(sub := getattr(plain, name, None), "sub_configs"):
            sizes[name] = type(sub)(**_small(sub, {key: also[key] for key in also if hasattr(sub, key)}))
    return {**sizes, **{key: value for key, value in also.items() if key in fields}}


def _is_size(config, name: str) -> bool:
    try:
        value = getattr(config, name, None)
    except AttributeError:  # it differs from layer to layer
        return False
    return isinstance(value, int) or (value is None and name in ("head_dim", "num_key_value_heads"))


def tiny_model(family: str, vocabulary: int, seed: int = 0):
    """A random model in float32. Raises ValueError where it would not be small, else whatever transformers raises."""
    config = tiny_config(family, vocabulary)
    with torch.device("meta"):
        weights = sum(p.numel() for p in AutoModelForCausalLM.from_config(copy.deepcopy(config)).parameters())
    if weights > MOST:
        raise ValueError(f"{weights} weights at its smallest")
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).float().eval()
