"""The operations of the forward pass in NumPy, float32, written to be read: the specification of the kernels."""

from __future__ import annotations

import numpy as np

from ..arrays import Floats, Ints


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


def split_heads(x: Floats, heads: int) -> Floats:
    """(n, heads · head_dim) → (n, heads, head_dim)."""
    return x.reshape(len(x), heads, x.shape[1] // heads)


def join_heads(x: Floats) -> Floats:
    """(n, heads, head_dim) → (n, heads · head_dim)."""
    return x.reshape(len(x), x.shape[1] * x.shape[2])


def feed_forward(x: Floats, gate: Floats, up: Floats, down: Floats) -> Floats:
    """GeGLU: down · (gelu(gate · x) ⊙ (up · x)). x (n, hidden), gate and up (intermediate, hidden)."""
    return linear(gated(x, gate, up), down)[0]


def gated(x: Floats, gate: Floats, up: Floats) -> Floats:
    """What a feed-forward's `down` takes, (n, intermediate)."""
    opened, upped = linear(x, gate, up)
    return gelu_tanh(opened) * upped


def gelu_tanh(x: Floats) -> Floats:
    """GELU by its tanh approximation (Hendrycks and Gimpel 2016, section 2)."""
    inner = np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x * x * x)
    out: Floats = np.float32(0.5) * x * (1 + np.tanh(inner))
    return out


def layer_norm(x: Floats, weight: Floats, bias: Floats, eps: float) -> Floats:
    """(x − mean) / sqrt(variance + eps) · weight + bias over the last axis (Ba et al. 2016)."""
    centered = x - np.mean(x, axis=-1, keepdims=True)
    variance = np.mean(np.square(centered), axis=-1, keepdims=True)
    normal: Floats = centered / np.sqrt(variance + np.float32(eps)) * weight + bias
    return normal


def bias_gelu(x: Floats, bias: Floats) -> Floats:
    """gelu_tanh(x + bias)."""
    return gelu_tanh(x + bias)


def mean_pool(x: Floats, side: int, by: int) -> Floats:
    """Means of squares of by · by rows, where x (side², dim) lies as the patches of a picture: ((side / by)², dim)."""
    few = side // by
    pooled: Floats = x.reshape(few, by, few, by, x.shape[1]).mean(axis=(1, 3)).reshape(few * few, x.shape[1])
    return pooled


def attend_all(q: Floats, k: Floats, v: Floats, scale: float) -> Floats:
    """Attention of q (n, heads, d) in which every row sees all keys and values, (n, heads, d). Same shape back."""
    out = np.empty_like(q)
    for head in range(q.shape[1]):  # one after the other: the scores of all would be large
        scores = q[:, head] @ k[:, head].T * np.float32(scale)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out[:, head] = weights / weights.sum(axis=-1, keepdims=True) @ v[:, head]
    return out


def softcap(x: Floats, cap: float) -> Floats:
    """cap · tanh(x / cap): the identity for small x, never beyond ±cap."""
    out: Floats = np.float32(cap) * np.tanh(x / np.float32(cap))
    return out


def rope(x: Floats, positions: Ints, base: float, factor: float) -> Floats:
    """Rotary position embedding of x (n, heads, head_dim); element i turns with element i + head_dim / 2.

    Su et al. 2021, in the pairing of the Hugging Face checkpoints; `factor` stretches positions (Chen et al. 2023).
    Angles are float32 products, as there.
    """
    half = x.shape[-1] // 2
    inverse_frequency = (base ** -(np.arange(half) / half)).astype(np.float32) / np.float32(factor)
    angle = positions.astype(np.float32)[:, None] * inverse_frequency  # (n, half)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
