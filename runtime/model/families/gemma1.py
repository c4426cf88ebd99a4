from .family import Family

GEMMA1 = Family(
    name="gemma",
    title="Gemma 1",
    hf_type="gemma",
    hf_class="GemmaForCausalLM",
    hf_activation="hidden_act",
    # The first configs say "gelu" and mean the tanh approximation, as transformers reads them too.
    hf_activations=("gelu_pytorch_tanh", "gelu"),
    says_query_scalar=False,
)
