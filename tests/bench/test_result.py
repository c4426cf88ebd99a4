"""What `--json` prints is a promise to other programs: its keys and its nesting."""

from __future__ import annotations

import json
from typing import Any

from measured import METRICS, effect, result, sensitivity


def shape(value: Any) -> Any:
    """Keys and types, of a list those of its first entry."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return type(value).__name__


INTERVAL = {"value": "float", "low": "float", "high": "float"}
MODEL = {
    "name": "str",
    "path": "str",
    "engine": "str",
    "kv": "str",
    "activations": "str",
    "file_bytes": "int",
    "bits_per_weight": "float",
}


def test_the_json_of_a_measurement() -> None:
    found = json.loads(json.dumps(result().to_json(), allow_nan=False))
    metrics = dict.fromkeys(METRICS, INTERVAL)
    of_texts = ["kld_mean", "kld_p999", "top1", "perplexity_ratio", "bits_per_byte", "reference_bits_per_byte"]
    assert shape(found) == {
        "bezel_measure": "int",
        "time": "str",
        "tool": "str",
        "protocol": "str",
        "chunk": "int",
        "texts": [{"path": "str", "sha256": "str", "tokens": "int"}],
        "pictures": [{"path": "str", "sha256": "str"}],
        "chunks": "int",
        "scored": "int",
        "confidence": "float",
        "warnings": [],
        "reference": MODEL | {"formats": {"bf16": "int"}, "vision": "NoneType", "perplexity": INTERVAL},
        "candidates": [
            MODEL
            | {
                "formats": {"q4_0": "int", "q6_k": "int"},
                "vision": "str",
                "metrics": metrics,
                "by_text": [{"text": "str", "scored": "int", **dict.fromkeys(of_texts, INTERVAL)}],
                "by_position": {
                    "edges": ["int"],
                    "kld_mean": ["float"],
                    "low": ["float"],
                    "high": ["float"],
                    "count": ["int"],
                },
                "histogram": {"log10_edges": ["int"], "counts": ["int"]},
                "quantiles": {"p": ["float"], "kld": ["float"]},
                "worst": [
                    {
                        "kld": "float",
                        "text": "str",
                        "line": "NoneType",
                        "position": "int",
                        "before": "str",
                        "token": "str",
                        "reference_top": [["str"]],
                        "candidate_top": [["str"]],
                    }
                ],
                "by_layer": [{"layer": "int", "error": "float"}],
            }
        ],
        "pairs": [
            {"a": "str", "b": "str", "metric": "str", "difference": "float", "low": "float", "high": "float"},
        ],
        "effects": [{"candidate": "str", "effect": "str", "metrics": metrics}],
        "command": "NoneType",
    }
    assert found["bezel_measure"] == 1
    assert found["candidates"][0]["metrics"]["top1"] == {"value": 0.9412, "low": 0.9412 * 0.97, "high": 0.9412 * 1.04}
    assert found["candidates"][0]["worst"][0]["reference_top"][0] == [" sons", 0.71]
    assert found["effects"][0]["metrics"]["kld_mean"]["value"] == effect("weights", 0.011).metrics.kld_mean.value


def test_the_json_of_a_sensitivity() -> None:
    found = json.loads(json.dumps(sensitivity().to_json(), allow_nan=False))
    entry = {"tensors": ["str"], "role": "str", "layer": "NoneType", "format": "str"}
    assert shape(found) == {
        "bezel_sensitivity": "int",
        "model": "str",
        "text_sha256": "str",
        "tokens": "int",
        "by": "str",
        "confidence": "float",
        "entries": [entry | {"kld": "float", "low": "float", "high": "float"}],
    }
    assert found["bezel_sensitivity"] == 1
