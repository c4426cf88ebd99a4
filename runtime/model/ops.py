"""The operations of the forward pass in NumPy, float32, written to be read: the specification of the kernels."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float32]
Ints: TypeAlias = npt.NDArray[np.int64]


def rms_norm(x: Floats, weight: Floats, eps: float) -> Floats:
    """x / rms(x) · weight over the last axis. `weight` is the whole factor: for Gemma the checkpoint's plus 1."""
    mean_square = np.mean(np.square(x), axis=-1, keepdims=True)
    normal: Floats = x / np.sqrt(mean_square + np.float32(eps)) * weight
    return normal


def add_norm(
    x: Floats, h: Floats, post_weight: Floats | None, next_weight: Floats, eps: float
) -> tuple[Floats, Floats]:
    """Between two sub-layers: x + h, h normed first if there is a `post_weight`, and that sum normed for the next."""
    x = x + (h if post_weight is None else rms_norm(h, post_weight, eps))
    return x, rms_norm(x, next_weight, eps)


def embed(weight: Floats, ids: Ints, scale: float) -> Floats:
    """Rows of the embedding (vocab, hidden) for ids (n,), times `scale`: (n, hidden)."""
    return weight[ids] * np.float32(scale)


def linear(x: Floats, *weights: Floats) -> list[Floats]:
    """x (n, inputs) · each weight (outputs, inputs) → (n, outputs) each."""
    return [x @ weight.T for weight in weights]


def feed_forward(x: Floats, gate: Floats, up: Floats, down: Floats) -> Floats:
    """GeGLU: down · (gelu(gate · x) ⊙ (up · x)). x (n, hidden), gate and up (intermediate, hidden)."""
    gated, upped = linear(x, gate, up)
    return linear(gelu_tanh(gated) * upped, down)[0]


def gelu_tanh(x: Floats) -> Floats:
    """GELU by its tanh approximation (Hendrycks and Gimpel 2016, section 2)."""
    inner = np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x * x * x)
    out: Floats = np.float32(0.5) * x * (1 + np.tanh(inner))
    return out


def softcap(x: Floats, cap: float) -> Floats:
    """cap · tanh(x / cap): the identity for small x, never beyond ±cap."""
    out: Floats = np.float32(cap) * np.tanh(x / np.float32(cap))
    return out


def rope(x: Floats, first_position: int, base: float) -> Floats:
    """Rotary position embedding of x (n, heads, head_dim); element i turns with element i + head_dim / 2.

    Su et al. 2021, in the pairing of the Hugging Face checkpoints. Angles are float32 products, as there.
    """
    half = x.shape[-1] // 2
    inverse_frequency = (base ** -(np.arange(half) / half)).astype(np.float32)
    positions = np.arange(first_position, first_position + len(x), dtype=np.float32)
    angle = positions[:, None] * inverse_frequency  # (n, half)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attention(
    queries: Floats,
    keys: Floats,
    values: Floats,
    query_positions: Ints,
    key_positions: Ints,
    window: int | None,
    scale: float,
    cap: float | None,
) -> Floats:
    """Causal grouped-query attention of queries (n, heads, d) over keys and values (m, kv_heads, d).

    A query at position p sees the keys at p − window + 1 … p, or at 0 … p without a window. Returns (n, heads, d).
    """
    n, heads, d = queries.shape
    kv_heads = keys.shape[1]
    grouped = queries.reshape(n, kv_heads, heads // kv_heads, d).transpose(1, 2, 0, 3)  # (kv, group, n, d)
    scores = grouped @ keys.transpose(1, 2, 0)[:, None] * np.float32(scale)  # (kv, group, n, m)
    if cap is not None:
        scores = softcap(scores, cap)
    behind = query_positions[:, None] - key_positions
    visible = behind >= 0 if window is None else (behind >= 0) & (behind < window)
    scores = np.where(visible, scores, np.float32(-np.inf))
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    mixed: Floats = weights @ values.transpose(1, 0, 2)[:, None]  # (kv, group, n, d)
    return mixed.transpose(2, 0, 1, 3).reshape(n, heads, d)
