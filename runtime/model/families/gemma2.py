from .family import Family

GEMMA2 = Family(
    name="gemma2",
    title="Gemma 2",
    hf_type="gemma2",
    hf_class="Gemma2ForCausalLM",
    period=2,
    post_norms=True,
    softcaps=("attn", "final"),
    says_softcaps=True,
    gguf_softcaps={"attn": 50.0, "final": 30.0},
    scales_by_width=frozenset({46}),  # the 27B
    chat_templates=frozenset({"1e51d5c0fec2f83da1953fb850b7b532b7da02d0dc35f9201e671e0b9a35a123"}),
)
