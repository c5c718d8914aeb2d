"""One tiny random model for each causal language model that transformers knows."""

import zlib

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as MODELS

NAMES = list(MODELS)
LAYERS, VOCAB = 4, 160
DEPTHS = (
    "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers num_blocks"
    " encoder_layers num_encoder_layers depth conf_num_hidden_layers num_global_layers"
).split()

# (value, attributes that get it wherever a configuration has them and they are switched on);
# multipliers come last, none of them 1
SMALL_VALUES = (
    (LAYERS, " ".join(DEPTHS)),
    (
        VOCAB,
        "vocab_size decoder_vocab_size vocab_size_per_layer_input unpadded_vocab_size"
        " encoder_hash_byte_group_vocab",
    ),
    (
        64,
        "hidden_size d_model n_embd emb_dim embedding_dim embedding_size lru_width"
        " hidden_size_global input_embedding_size output_embedding_size word_embed_proj_dim"
        " out_hidden_size attention_hidden_size backbone_hidden_size input_size"
        " projector_input_dim projector_output_dim vision_output_dim output_channels"
        " pronunciation_embed_dim shape_embed_dim adapter_in_dim adapter_out_dim"
        " adapter_input_size nemo_conv_channels ext_pw_out_channel"
        " depthwise_separable_out_channel max_position_embeddings n_positions n_ctx max_seq_len"
        " model_max_length context_length max_target_positions max_source_positions",
    ),
    (
        96,
        "intermediate_size d_ff dff dim_ff ffn_dim ffn_hidden_size d_inner feed_forward_size"
        " mlp_dim decoder_ffn_dim encoder_ffn_dim n_inner dense_intermediate_size"
        " intermediate_size_mlp",
    ),
    (
        32,
        "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size"
        " moe_shared_expert_intermediate_size expert_ffn_hidden_size shared_intermediate_size"
        " attention_head_dim dim_model_base adapter_rank router_hidden_size image_size crop_size"
        " pronunciation_vocab_size shape_vocab_size",
    ),
    (23, "query_pre_attn_scalar"),
    (
        16,
        "head_dim dim_head d_head attention_head_size kv_channels linear_head_dim"
        " linear_key_head_dim linear_value_head_dim v_head_dim swa_head_dim kv_lora_rank"
        " q_lora_rank o_lora_rank d_kv index_head_dim mamba_d_head mamba_head_dim mamba_headdim"
        " hidden_size_per_layer_input sliding_window sliding_window_size attention_window_size"
        " window_size local_attention attention_chunk_size laurel_rank rel_extent"
        " relative_max_distance position_bias_max_distance qk_head_dim num_position_embeddings"
        " patch_size num_mel_bins vector_quantization_hidden_dimension codebook_dim"
        " codebook_size num_filters upsample_groups prompt_mid_dim",
    ),
    (
        8,
        "qk_nope_head_dim qk_rope_head_dim mamba_n_heads mamba_num_heads n_mamba_heads"
        " rotary_dim mamba_d_state ssm_state_size state_size chunk_size mamba_chunk_size"
        " index_topk d_rel position_bias_num_buckets lsh_attn_chunk_length"
        " local_attn_chunk_length gated_norm_rank block_size relative_attention_num_buckets"
        " num_buckets prompt_length",
    ),
    (
        4,
        "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads"
        " encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads"
        " conf_num_attention_heads swa_num_attention_heads linear_num_heads"
        " linear_num_value_heads num_experts num_local_experts n_routed_experts moe_num_experts"
        " mamba_dt_rank time_step_rank ffn_round_up_to_multiple_of prompt_types segment_types"
        " index_block_size",
    ),
    (3, "moe_layer_end_index n_layers_per_attn_res_block scale_emb"),
    (
        2,
        "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads"
        " linear_num_key_heads num_query_groups num_experts_per_tok num_experts_per_token"
        " moe_topk moe_top_k moe_k top_k_experts index_n_heads index_topk_blocks zero_expert_num"
        " o_groups n_groups num_codebooks num_quantizers n_group num_expert_group"
        " num_layers_per_stack",
    ),
    (
        1,
        "first_k_dense_replace num_dense_layers moe_layer_start_index rescale_every topk_group",
    ),
    (0.4, "residual_multiplier full_attn_beta_factor"),
    (0.45, "attention_out_multiplier mlp_beta_factor"),
    (0.55, "ssm_out_multiplier"),
    (
        0.6,
        "embedding_multiplier scale_depth attention_value_scale linear_attn_beta_factor"
        " logits_mup_width_multiplier",
    ),
    (0.65, "lm_head_multiplier"),
    (
        0.7,
        "attention_multiplier logit_scale embedding_scale mlp_alpha_factor"
        " routed_scaling_factor moe_routed_scaling_factor router_scaling_factor route_scale",
    ),
    (0.8, "logits_scaling linear_attn_alpha_factor"),
    (0.85, "ssm_in_multiplier"),
    (0.9, "attention_in_multiplier full_attn_alpha_factor"),
    (1.3, "key_multiplier"),
    ([0.75, 0.35], "mlp_multipliers"),
    ([0.4, 0.6, 0.7, 0.8, 0.9], "ssm_multipliers"),
)
GROUPS = ("n_group", "num_expert_group")  # of experts; 1 stays 1
FILLED = dict(head_dim=16, num_key_value_heads=2)  # also where the default is None
SMALL = {name: value for value, names in SMALL_VALUES for name in names.split()}

ATTENTION_FIRST = ["full_attention", "linear_attention", "linear_attention", "full_attention"]
ALTERNATING = ["full_attention", "sliding_attention"] * 2
MAMBA_HYBRID = ["linear_attention", "hybrid"] * 2
RATES = dict(compressed_sparse_attention=2, heavily_compressed_attention=4)
CONVOLUTIONS = ["conv", "full_attention"] * 2
LATENT = "num_attention_heads q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim".split()
LATENT = {k: SMALL[k] for k in [*LATENT, "head_dim", "v_head_dim"]} | {"num_key_value_heads": 4}
SLIDING_LATENT = {2: LATENT, 3: LATENT}  # layer -> its own sizes
QWEN4 = dict(
    eos_token_id=2,
    indexer_n_heads=2,
    indexer_kv_heads=1,
    indexer_head_dim=16,
    indexer_budget=8,
    indexer_compress_ratio=2,
    hc_lowrank=8,
    ple_layer_ids=[1],
    ple_embed_dim=64,
    heads_per_ngram=2,
    ngram_vocab_size_base=97,
    make_ngram_vocab_size_divisible_by=8,
    split_ngram_parts=1,
)
# what the tables above do not get right; "part.name" is an attribute of a part
OVERRIDES = {
    "bamba": dict(attn_layer_indices=[1, 3]),
    "cohere_compass_text": dict(
        rope_parameters={
            "full_attention": dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 2, 2])
        }
    ),
    "dbrx": {"attn_config.rope_theta": 1e4, "attn_config.clip_qkv": 8},
    "deepseek_v2": dict(num_experts_per_tok=2, first_k_dense_replace=1),
    "deepseek_v4": dict(compress_rates=RATES),
    "dots1": dict(
        n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, first_k_dense_replace=1
    ),
    "dots3_note": {"text_config.head_dim": 16, "text_config.per_layer_config": SLIDING_LATENT},
    "dots3_note_text": dict(head_dim=16, per_layer_config=SLIDING_LATENT),
    "falcon_h1": dict(mamba_d_ssm=128),
    "falcon_mamba": dict(intermediate_size=128),
    "gemma3n_text": dict(
        intermediate_size=[96] * 4, num_kv_shared_layers=2, layer_types=ALTERNATING
    ),
    "gemma4": {"text_config.global_head_dim": 32},
    "gemma4_text": dict(global_head_dim=32),
    "gemma4_unified": {"text_config.global_head_dim": 32},
    "gemma4_unified_text": dict(global_head_dim=32),
    "granitemoe_swa": dict(shared_intermediate_size=32),
    "granitemoehybrid": dict(layer_types=["linear_attention", "full_attention"] * 2),
    "granitemoeshared": dict(shared_intermediate_size=32),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "laguna": dict(layer_types=ALTERNATING, num_attention_heads_per_layer=[4] * 4),
    "lfm2": dict(layer_types=CONVOLUTIONS),
    "lfm2_moe": dict(layer_types=CONVOLUTIONS),
    "mamba": dict(intermediate_size=128),
    "mamba2": dict(num_heads=8),
    "mellum": dict(layer_types=ALTERNATING),
    "minimax_m3_vl_text": dict(layer_types=["full_attention", "minimax_m3_sparse"] * 2),
    "qwen4_exp": {f"text_config.{k}": v for k, v in QWEN4.items()},
    "qwen4_exp_text": QWEN4,
    "reformer": dict(
        axial_pos_embds_dim=(16, 48),
        axial_pos_shape=(8, 8),
        attn_layers=("local", "lsh") * 2,
        num_buckets=4,
        hash_seed=0,
    ),
    "xlstm": dict(autocast_kernel_dtype="float32"),
    "xmod": dict(default_language="en_XX"),
    "zamba": dict(attention_hidden_size=128, layers_block_type=MAMBA_HYBRID),
    "zamba2": dict(
        attention_hidden_size=128,
        layers_block_type=MAMBA_HYBRID,
        hybrid_layer_ids=[1, 3],
        num_query_groups=4,
    ),
    "zaya": dict(
        num_experts_per_tok=1, layer_types=["hybrid", "hybrid_sliding"] * 2, sliding_window=16
    ),
}
VARIANTS = {
    "granite@default": dict.fromkeys(
        "residual_multiplier embedding_multiplier attention_multiplier logits_scaling".split(), 1.0
    ),
    "falcon@new_decoder": dict(new_decoder_architecture=True),
    "falcon@sequential": dict(parallel_attn=False),
    "gpt_neox@sequential": dict(use_parallel_residual=False),
    "qwen3_moe@dense_first": dict(mlp_only_layers=[0]),
    "stablelm@parallel": dict(use_parallel_residual=True),
    "opt@post_norm": dict(do_layer_norm_before=False),
    "bloom@post_norm_residual": dict(apply_residual_connection_post_layernorm=True),
    "olmo_hybrid@attention_first": dict(layer_types=ATTENTION_FIRST),
    "qwen3_next@attention_first": dict(layer_types=ATTENTION_FIRST),
    "qwen3_5_text@attention_first": dict(layer_types=ATTENTION_FIRST),
    "doge@moe": dict(is_moe=True),
    "gemma4_text@moe": dict(
        enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=32
    ),
    "gemma4_text@shared": dict(num_kv_shared_layers=2, layer_types=ALTERNATING),
    "mistral@short_window": dict(sliding_window=2),
}


def build(name):
    """The tiny random model of a type, or of one of VARIANTS: float32, in eval mode."""
    model_type = name.split("@")[0]
    changes = OVERRIDES.get(model_type, {}) | VARIANTS.get(name, {})
    config = _small(CONFIG_MAPPING[model_type](), changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _construct(config, model_type)
    _randomise(model, torch.Generator().manual_seed(zlib.crc32(name.encode())))
    return model


def _construct(config, model_type):
    if model_type.startswith("musicgen"):  # the causal model is one part of the configuration
        return getattr(transformers, MODELS[model_type])(config.decoder).eval()
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def _small(config, changes):
    "A configuration of the same class with small values; `changes` have the last word."
    old = {k: v for k, v in vars(config).items() if not k.startswith("_")}
    depth = max([v for k, v in old.items() if k in DEPTHS and isinstance(v, int)], default=0)
    new = {}
    for key, value in old.items():
        if key == "ignore_keys_at_rope_validation":
            continue
        if isinstance(value, PreTrainedConfig):
            start = key + "."
            part = {k.removeprefix(start): v for k, v in changes.items() if k.startswith(start)}
            new[key] = _small(value, part)
        else:
            new[key] = _small_value(key, value, depth)
    if "kv_lora_rank" in old:  # latent attention has keys for every head
        new["num_key_value_heads"] = 4
        if "head_dim" in old:
            new["head_dim"] = new["qk_rope_head_dim"]
    new |= {k: v for k, v in changes.items() if "." not in k}
    return type(config)(**new)


def _small_value(key, value, depth):
    if key == "is_decoder":
        return True
    if not value:  # nothing, or switched off
        return FILLED.get(key, value)
    if isinstance(value, list | tuple) and len(value) == depth > LAYERS:
        return type(value)(_cut(value))
    if key.endswith(("token_id", "token_index")):
        largest = max(value) if isinstance(value, list) else value
        return value if largest < VOCAB else _token(key)
    if key in GROUPS and value == 1:
        return 1
    return SMALL.get(key, value)


def _token(key):
    special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return special.get(key, 128 + zlib.crc32(key.encode()) % 32)


def _cut(values):
    "The first LAYERS of a list with one entry per layer, every kind of entry kept."
    if values[0] == "dense":
        values = ["dense", *(v for v in values if v != "dense")]
    if len(set(values)) > LAYERS:  # numbers of layers
        return values[:LAYERS]
    first = list(values[:LAYERS])
    missing = [v for v in dict.fromkeys(values) if v not in first]
    return first[: LAYERS - len(missing)] + missing


def _randomise(model, generator):
    "Every parameter and every saved float buffer becomes random."
    saved = model.state_dict()
    tensors = dict(model.named_parameters())
    tensors |= {k: b for k, b in model.named_buffers() if k in saved and b.is_floating_point()}
    for name, tensor in tensors.items():
        noise = torch.randn(tensor.shape, generator=generator)
        with torch.no_grad():
            tensor.copy_(_random(name, tensor, noise))
    for name, table in saved.items():
        if name.endswith("tid2eid"):  # which experts a token goes to
            order = torch.rand(len(table), LAYERS, generator=generator).argsort(1)
            table.copy_(order[:, : table.shape[1]])


def _random(name, tensor, noise):
    start = tensor.nan_to_num(0, 0, 0).clamp(-8, 8)
    if tensor.ndim >= 2 and not name.endswith("A_log") and not (start == 1).all():
        fan = tensor[0].numel() if tensor.ndim == 2 else tensor.shape[-1]
        return noise * min(max(fan**-0.5, 0.1), 0.3)
    return start + 0.15 * noise.clamp(-2, 2)
