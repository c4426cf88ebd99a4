from .family import Family

GEMMA2 = Family(
    name="gemma2",
    title="Gemma 2",
    hf_type="gemma2",
    hf_class="Gemma2ForCausalLM",
    hf_outer="paligemma",
    hf_outer_sees_prefix=True,
    # PaliGemma 2's text_config leaves out what transformers has as Gemma 2's defaults.
    hf_outer_defaults={
        "vocab_size": 257216,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    period=2,
    post_norms=True,
    softcaps=("attn", "final"),
    says_softcaps=True,
    gguf_softcaps={"attn": 50.0, "final": 30.0},
    scales_by_width=frozenset({46}),  # the 27B
    chat_templates=frozenset({"1e51d5c0fec2f83da1953fb850b7b532b7da02d0dc35f9201e671e0b9a35a123"}),
)
