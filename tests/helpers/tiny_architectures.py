"""Overrides that make any text architecture of transformers tiny, found from its own default configuration."""

from __future__ import annotations

from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto import modeling_auto

SIZES: dict[str, int] = {
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "emb_dim": 32, "embed_dim": 32, "embedding_size": 32,
    "word_embed_proj_dim": 32, "true_hidden_size": 32, "intra_bottleneck_size": 32, "attention_hidden_size": 32,
    "bottleneck_size": 32, "lru_width": 32, "dim_model": 32, "conv_dim": 32,
    "hidden_dim": 64, "intermediate_size": 64, "ffn_dim": 64, "n_inner": 64, "d_inner": 64, "dim_ff": 64, "dff": 64,
    "d_ff": 64, "ffn_hidden_size": 64, "intermediate_size_mlp": 64, "shared_intermediate_size": 64,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32,
    "expert_ffn_hidden_size": 32, "expert_dim": 32, "moe_layer_intermediate_size": 32,
    "num_hidden_layers": 2, "n_layers": 2, "n_layer": 2, "num_layers": 2, "num_blocks": 2,
    "num_attention_heads": 2, "n_heads": 2, "n_head": 2, "num_heads": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "num_key_value_heads": 2, "attention_heads": 2,
    "head_dim": 16, "d_head": 16, "d_kv": 16, "dim_head": 16, "attention_head_size": 16, "kv_channels": 16,
    "global_head_dim": 16, "v_head_dim": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "kv_lora_rank": 16,
    "q_lora_rank": 16, "index_head_dim": 16, "index_n_heads": 2,
    "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "num_experts_per_token": 2, "linear_num_heads": 2, "linear_head_dim": 16, "num_expert_group": 1,
    "vocab_size_per_layer_input": 256, "mamba_headdim": 32, "n_mamba_heads": 2, "attention_head_dim": 32,
    "ngram_vocab_size_base": 100, "ple_embed_dim": 32, "hc_lowrank": 8, "embedding_dim": 32, "adapter_rank": 8,
    "moe_k": 2, "moe_topk": 2, "experts_per_token": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "n_shared_experts": 1, "num_shared_experts": 1,
    "rotary_dim": 8, "num_buckets": 16, "num_hash_functions": 2, "window_size": 16, "local_attention": 16,
    "state_size": 8, "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2, "mamba_n_groups": 1,
    "mamba_chunk_size": 8, "chunk_size": 8, "n_groups": 1, "time_step_rank": 4, "mamba_dt_rank": 4,
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
"""Sizes by the names that configurations have for them."""

_ROPE_ONLY = {"head_dim": 8}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_LINEAR_AND_FULL = {"layer_types": ["linear_attention", "full_attention"]}
SPECIAL: dict[str, dict[str, Any]] = {
    "axk1": _ROPE_ONLY,
    "deepseek_v3": _ROPE_ONLY,
    "longcat_flash": _ROPE_ONLY,
    "youtu": _ROPE_ONLY,
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy"},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "qwen3_next": _LINEAR_AND_FULL,
    "qwen3_5_text": _LINEAR_AND_FULL,
    "qwen3_5_moe_text": _LINEAR_AND_FULL,
    "kimi_linear": {**_LINEAR_AND_FULL, **_ROPE_ONLY, "mlp_layer_types": ["dense", "sparse"]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "lilt": {"hidden_size": 48, "channel_shrink_ratio": 4},
    "mamba2": {"head_dim": 16, "num_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "funnel": {"block_sizes": [1, 1], "block_repeats": [1, 1], "num_decoder_layers": 1},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "cohere_compass_text": {"rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE}},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "hidden_size": 32},
    },
    "xlstm": {"hidden_size": 64, "num_heads": 2, "embedding_dim": 64},
    "reformer": {"axial_pos_embds_dim": [8, 24], "axial_pos_shape": [4, 8]},
    "codegen": {"n_head": 4, "n_embd": 32, "rotary_dim": 4},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "bailing_hybrid": {**_ROPE_ONLY, **_LINEAR_AND_FULL, "topk_group": 1},
    "mimo_v2_flash": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "attention_hidden_size": 64,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "kv_channels": 32,
        "attention_hidden_size": 64,
        "hybrid_layer_ids": [1, 3],
    },
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "intermediate_size": [64, 64],
        "hidden_size_per_layer_input": 16,
        "activation_sparsity_pattern": [0.0, 0.0],
        "laurel_rank": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 2,
        "split_ngram_parts": 1,
        "heads_per_ngram": 2,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
}
"""What single architectures need besides: sizes that hang together."""

_LAYER_LISTS = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types", "attention_types")


def text_architectures() -> list[str]:
    """All model types of the installed transformers that some text head exists for."""
    mappings = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
    )
    return sorted({name for mapping in mappings for name in mapping})


def overrides_of(model_type: str) -> dict[str, Any]:
    """Overrides of the default configuration that make it tiny."""
    try:
        default = transformers.CONFIG_MAPPING[model_type]()
    except StrictDataclassError:  # It has no default configuration.
        return {}
    known = default.to_dict()
    found: dict[str, Any] = {}
    for name, value in SIZES.items():
        before = known.get(name)
        if isinstance(before, int) and not isinstance(before, bool) and before > value:
            found[name] = value
    if model_type == "funnel":
        found.pop("num_hidden_layers", None)
    return {**found, **SPECIAL.get(model_type, {})}
