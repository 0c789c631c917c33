"""What single model types need beside the common settings, and which cannot be built."""

from __future__ import annotations

from typing import Any, Final

from tests.zoo.settings import LAYERS

MIXED: Final = ["sliding_attention", "full_attention"] * 2
LINEAR: Final = ["linear_attention", "full_attention"] * 2
HYBRID: Final = ["linear_attention", "hybrid"] * 2
DECODER: Final = {"is_decoder": True}

# What one type needs beside or instead of COMMON. A dictionary under the name of a part
# (text_config, ...) goes over that part's own settings.
OWN: Final[dict[str, dict[str, Any]]] = {
    "bert": DECODER,
    "bert-generation": DECODER,
    "big_bird": {**DECODER, "attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "camembert": DECODER,
    "data2vec-text": DECODER,
    "electra": DECODER,
    "ernie": DECODER,
    "megatron-bert": DECODER,
    "rembert": DECODER,
    "roberta": DECODER,
    "roberta-prelayernorm": DECODER,
    "roc_bert": {
        **DECODER,
        "pronunciation_embed_dim": 16,
        "shape_embed_dim": 16,
        "pronunciation_vocab_size": 128,
        "shape_vocab_size": 128,
    },
    "roformer": DECODER,
    "xlm-roberta": DECODER,
    "xlm-roberta-xl": DECODER,
    "xmod": {**DECODER, "default_language": "en_XX"},
    "bailing_hybrid": {"head_dim": 16},
    "bamba": {"attn_layer_indices": [1, 3]},
    "dots1": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "layer_types": MIXED,
    },
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0},
    "cohere2_moe": {"logit_scale": 1.0},
    "cohere_compass_text": {
        "layer_types": MIXED,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "layer_types": [
            "sliding_attention",
            "heavily_compressed_attention",
            "compressed_sparse_attention",
            "sliding_attention",
        ],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 16},
    },
    "dory": {
        "n_input_layers": 1,
        "n_recurrent_layers": 2,
        "n_output_layers": 1,
        "layer_types": MIXED,
    },
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "dots3_note_text": {
        "head_dim": 16,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 16,
    },
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3": {"mm_tokens_per_image": 4},
    "gemma3n_text": {
        "intermediate_size": [64] * LAYERS,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
        "num_kv_shared_layers": 2,
        "laurel_rank": 8,
    },
    "gemma4_text": {"global_head_dim": 32, "num_kv_shared_layers": 2},
    "gemma4_unified_text": {"global_head_dim": 32, "num_global_key_value_heads": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": LINEAR},
    "hrm_text": {"num_hidden_layers": 1},  # its two stacks take turns, eight in all
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "inkling_text": {"logits_mup_width_multiplier": 1.0},
    "inkling2_text": {"unpadded_vocab_size": 128},
    "inkling2_loop_text": {
        "unpadded_vocab_size": 128,
        "n_layers_per_attn_res_block": 1,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 3,
        "loop_num_passes": 2,
    },
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "laguna": {"num_attention_heads_per_layer": [4] * LAYERS, "layer_types": MIXED},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "llama4_text": {"moe_layers": [1, 3]},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8},
    "mellum": {"layer_types": MIXED},
    "minicpm3": {"dim_model_base": 64},
    "minimax_m3_vl_text": {
        "layer_types": ["minimax_m3_sparse", "full_attention"] * 2,
        "index_block_size": 16,
    },
    "ministral": {"layer_types": MIXED, "head_dim": 16},
    "modernbert-decoder": {"local_attention": 96},
    "mpt": {"use_cache": True},
    "musicgen": {"decoder": {"num_codebooks": 1, "decoder_start_token_id": 1}},
    "musicgen_melody": {"decoder": {"num_codebooks": 1, "decoder_start_token_id": 1}},
    "nemotron": {"num_key_value_heads": 2},
    "phi4_multimodal": {
        "audio_config": {
            "ext_pw_out_channel": 64,
            "depthwise_separable_out_channel": 64,
            "nemo_conv_channels": 64,
        },
    },
    "qwen2": {"layer_types": MIXED, "sliding_window": 48, "use_sliding_window": True},
    "qwen2_moe": {"layer_types": MIXED, "sliding_window": 48, "use_sliding_window": True},
    "qwen3": {"layer_types": MIXED, "sliding_window": 48, "use_sliding_window": True},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 512,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"w_init_variance_scale": 0.64},
    "reformer": {
        **DECODER,
        "attn_layers": ["local", "lsh"] * 2,
        "axial_pos_embds": False,
        "num_buckets": 8,
        "hash_seed": 0,
    },
    "rwkv": {"attention_hidden_size": 64},
    "smollm3": {"layer_types": MIXED, "sliding_window": 48, "use_sliding_window": True},
    "whisper": {"begin_suppress_tokens": None},
    "xlm": {"causal": True, "mask_token_id": 4},
    "xlstm": {"qk_dim_factor": 1.0},
    "zaya": {
        "num_experts_per_tok": 1,
        "sliding_window": 48,
        "layer_types": ["hybrid_sliding", "hybrid"] * 2,
        "router_hidden_size": 16,
    },
    "zamba": {"layers_block_type": HYBRID, "attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": {"layers_block_type": HYBRID},
}

# What generate() must be told that transformers leaves open.
GENERATION: Final[dict[str, dict[str, Any]]] = {
    "musicgen": {"num_return_sequences": 1},
    "musicgen_melody": {"num_return_sequences": 1},
}

UNBUILT: Final[dict[str, str]] = {
    "blt": "transformers cannot generate with it: its configuration has no number of layers",
    "gemma3n": "needs the package timm for its image encoder; gemma3n_text has the same decoder",
    "gemma4_assistant": "drafts for another model, whose keys and values it needs as input",
    "gemma4_unified_assistant": "drafts for another model, whose keys and values it needs as input",
}
