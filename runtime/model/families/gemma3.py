from .family import Family

GEMMA3 = Family(
    name="gemma3",
    title="Gemma 3",
    hf_type="gemma3_text",
    hf_class="Gemma3ForCausalLM",
    hf_outer="gemma3",
    # The published config.json of 4B holds its sizes, window and RoPE factor, and nothing else.
    hf_defaults={
        "vocab_size": 262208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "query_pre_attn_scalar": 256,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    hf_must_be={"attn_logit_softcapping": (None,)},  # which transformers reads and leaves unused
    period=6,
    rope_base=1e6,
    local_rope_base=1e4,
    post_norms=True,
    qk_norms=True,
    softcaps=("final",),
    scales_by_width=frozenset({62}),  # the 27B
    unties=True,
    chat_templates=frozenset(
        {
            "02ee7cb921fe6c7d6b7d6669074d7dc866ce0eb9d4ac4449efd7dab1e9811fd3",
            "a618ecee175fe1d5d299a02e2998ea1cb29e2a71f30fa2aa229856ee0c9378e5",  # of the bundled model that sees
        }
    ),
)
