"""A measurement and a sensitivity as their commands find them, small and with round figures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bezel.bench.loss.intervals import Interval
from bezel.bench.loss.result import (
    ByPosition,
    Candidate,
    Effect,
    Histogram,
    LayerError,
    MeasuredPicture,
    MeasuredText,
    Measurement,
    Metrics,
    Pair,
    Quantiles,
    Reference,
    Sensitivity,
    SensitivityEntry,
    TextLoss,
    WorstToken,
)

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


def metrics(times: float = 1.0) -> Metrics:
    """METRICS with intervals, the KLD figures times `times`."""
    scaled = {k: v * times if k.startswith("kld") else v for k, v in METRICS.items()}
    return Metrics(**{k: Interval(v, v * 0.97, v * 1.04) for k, v in scaled.items()})


def without_intervals(found: Metrics) -> Metrics:
    return Metrics(**{name: Interval(figure.value, None, None) for name, figure in vars(found).items()})


def candidate(name: str, times: float = 1.0, file_bytes: int = 1_500_000_000) -> Candidate:
    """A candidate whose KLD figures are `times` those of METRICS."""
    klds = [v * times for v in (0.011, 0.012, 0.014)]
    expected = [(" sons", 0.71), (" daughters", 0.2), ("\n", 0.02), (",", 0.01), ("", 0.001)]
    found = [(" daughters", 0.55), (" sons", 0.31), ("\n", 0.03), (",", 0.02), ("\u202e", 0.001)]
    before = "Once upon a time there was a king who had three"
    return Candidate(
        name=name,
        path=f"/models/{name}.gguf",
        engine="native",
        kv="f16",
        activations="int8",
        file_bytes=file_bytes,
        bits_per_weight=4.5625,
        formats={"q4_0": 182, "q6_k": 1},
        vision="/models/mmproj-exact.gguf",
        metrics=metrics(times),
        by_text=[text_loss("/texts/tales.txt", times)],
        by_position=ByPosition(
            [256, 320, 384, 512], [*klds], [0.01 * times] * 3, [0.016 * times] * 3, [640, 640, 1280]
        ),
        histogram=Histogram([-5, -4, -3, -2, -1, 0, 1], [0, 100, 900, 1200, 350, 10]),
        quantiles=Quantiles([0.5, 0.9, 0.99, 0.999], [v * times for v in (0.004, 0.03, 0.12, 0.31)]),
        worst=[WorstToken(1.5 * times, "/texts/tales.txt", None, 1234, before, " sons", expected, found)],
        by_layer=[LayerError(i, 0.01 * times * (i + 1)) for i in range(4)],
    )


def text_loss(path: str, times: float = 1.0) -> TextLoss:
    found = metrics(times)
    names = ("kld_mean", "kld_p999", "top1", "perplexity_ratio")
    bits = [Interval(x, x * 0.9, x * 1.1) for x in (0.91, 0.9)]
    return TextLoss(path, 2560, *(getattr(found, name) for name in names), *bits)


def effect(cause: str, kld: float) -> Effect:
    return Effect("small", cause, replace(metrics(), kld_mean=Interval(kld, kld * 0.9, kld * 1.1)))


def result(**changes: Any) -> Measurement:
    """Two candidates, with every optional part."""
    made = Measurement(
        time="2026-01-02T03:04:05Z",
        tool="bezel 0.1.0",
        protocol="chunks",
        chunk=512,
        texts=[MeasuredText("/texts/tales.txt", "0123456789abcdef" * 4, 5120)],
        pictures=[MeasuredPicture("/pictures/cat.png", "fedcba9876543210" * 4)],
        chunks=10,
        scored=2560,
        confidence=0.95,
        warnings=[],
        reference=Reference(
            name="exact",
            path="/models/exact",
            engine="reference",
            kv="f32",
            activations="f32",
            file_bytes=5_200_000_000,
            bits_per_weight=16.0,
            formats={"bf16": 183},
            vision=None,
            perplexity=Interval(8.389, 8.1, 8.7),
        ),
        candidates=[candidate("small"), candidate("large", 0.1, 2_700_000_000)],
        pairs=[Pair("small", "large", "kld_mean", 0.0111, 0.0105, 0.0117)],
        effects=[effect("weights", 0.011), effect("activations int8", 0.0012), effect("kv int8", 0.0003)],
    )
    return replace(made, **changes)


def sensitivity() -> Sensitivity:
    """Of three matrices of four layers and of the embedding, the worst first, each in two formats."""
    entries = []
    for form, times in (("q4_0", 1.0), ("q8_0", 0.01)):
        head = SensitivityEntry(["token_embd.weight"], "token_embd", None, form, 0.02 * times, 0.018 * times, None)
        entries.append(replace(head, high=0.022 * times))
        for i, role in enumerate(("attn_q", "attn_v", "ffn_down")):
            for layer in range(4):
                kld = 0.001 * (1 + layer + 3 * i) * times
                tensors = [f"blk.{layer}.{role}.weight"]
                entries.append(SensitivityEntry(tensors, role, layer, form, kld, 0.9 * kld, 1.2 * kld))
    entries.sort(key=lambda entry: -entry.kld)
    return Sensitivity("exact", "0123456789abcdef" * 4, 5120, "tensor", 0.95, entries)
