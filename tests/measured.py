"""A measurement result as `bezel measure` gives it, small and with round figures."""

from __future__ import annotations

from typing import Any

METRICS = {
    "kld_mean": 0.0123456,
    "kld_median": 0.004,
    "kld_p90": 0.03,
    "kld_p99": 0.12,
    "kld_p999": 0.31415,
    "kld_max": 1.5,
    "top1": 0.9412,
    "top5": 0.9601,
    "flips": 0.0588,
    "rms_dp": 0.0211,
    "perplexity": 8.4321,
    "perplexity_ratio": 1.00512,
}


def candidate(name: str, times: float = 1.0, file_bytes: int = 1_500_000_000) -> dict[str, Any]:
    """A candidate whose KLD figures are `times` those of METRICS."""
    scaled = {k: v * times if k.startswith("kld") else v for k, v in METRICS.items()}
    return {
        "name": name,
        "path": f"/models/{name}.gguf",
        "engine": "native",
        "kv": "f16",
        "activations": "int8",
        "file_bytes": file_bytes,
        "bits_per_weight": 4.5625,
        "formats": {"q4_0": 182, "q6_k": 1},
        "metrics": {k: {"value": v, "low": v * 0.97, "high": v * 1.04} for k, v in scaled.items()},
        "by_position": {
            "edges": [256, 320, 384, 512],
            "kld_mean": [0.011 * times, 0.012 * times, 0.014 * times],
            "low": [0.01 * times] * 3,
            "high": [0.016 * times] * 3,
            "count": [640, 640, 1280],
        },
        "histogram": {"log10_edges": [-5, -4, -3, -2, -1, 0, 1], "counts": [0, 100, 900, 1200, 350, 10]},
        "quantiles": {"p": [0.5, 0.9, 0.99, 0.999], "kld": [v * times for v in (0.004, 0.03, 0.12, 0.31)]},
        "worst": [
            {
                "kld": 1.5 * times,
                "text": "/texts/tales.txt",
                "position": 1234,
                "before": "Once upon a time there was a king who had three",
                "token": " sons",
                "reference_top": [[" sons", 0.71], [" daughters", 0.2], ["\n", 0.02], [",", 0.01], ["", 0.001]],
                "candidate_top": [[" daughters", 0.55], [" sons", 0.31], ["\n", 0.03], [",", 0.02], ["\u202e", 0.001]],
            }
        ],
        "by_layer": [{"layer": i, "error": 0.01 * times * (i + 1)} for i in range(4)],
    }


def result(**changes: Any) -> dict[str, Any]:
    """Two candidates, with every optional part."""
    entries = [
        {
            "tensors": [f"blk.{layer}.{role}.weight"],
            "role": role,
            "layer": layer,
            "format": "q4_0",
            "kld": 0.001 * (1 + layer + 3 * i),
            "low": 0.0009 * (1 + layer + 3 * i),
            "high": 0.0012 * (1 + layer + 3 * i),
        }
        for layer in range(4)
        for i, role in enumerate(("attn_q", "attn_v", "ffn_down"))
    ]
    head = {"tensors": ["token_embd.weight"], "role": "token_embd", "layer": None, "format": "q4_0", "kld": 0.02}
    return {
        "bezel_measure": 1,
        "time": "2026-01-02T03:04:05Z",
        "tool": "bezel 0.1.0",
        "protocol": "chunks",
        "chunk": 512,
        "texts": [{"path": "/texts/tales.txt", "sha256": "0123456789abcdef" * 4, "tokens": 5120}],
        "chunks": 10,
        "scored": 2560,
        "confidence": 0.95,
        "reference": {
            "name": "exact",
            "path": "/models/exact",
            "engine": "reference",
            "kv": "f32",
            "activations": "f32",
            "file_bytes": 5_200_000_000,
            "bits_per_weight": 16.0,
            "perplexity": {"value": 8.389, "low": 8.1, "high": 8.7},
        },
        "candidates": [candidate("small"), candidate("large", 0.1, 2_700_000_000)],
        "pairs": [
            {"a": "small", "b": "large", "metric": "kld_mean", "difference": 0.0111, "low": 0.0105, "high": 0.0117}
        ],
        "effects": [
            {
                "candidate": "small",
                "effect": effect,
                "metrics": {"kld_mean": {"value": v, "low": v * 0.9, "high": v * 1.1}},
            }
            for effect, v in (("weights", 0.011), ("activations int8", 0.0012), ("kv int8", 0.0003))
        ],
        "sensitivity": {"format": "q4_0", "by": "tensor", "entries": [*entries, {**head, "low": 0.018, "high": 0.022}]},
        **changes,
    }
