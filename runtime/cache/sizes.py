"""How much memory keys and values will take."""

from __future__ import annotations

from collections.abc import Sequence

from .caches import CachedLayer, bytes_for, default_chunk
from .store import BytesFor


def cache_sizes(
    layers: Sequence[CachedLayer], context: int, kv: str, largest_chunk: int, store: BytesFor
) -> dict[str, int]:
    """Bytes of keys and values once `context` tokens are held, by layer kind; `full` is the total without rings.

    `largest_chunk` is the most tokens that the engine takes at once, `store` what its stores allocate.
    """
    chunk = default_chunk(layers, largest_chunk)

    def total(ring: bool, local: bool) -> int:
        some = (layer for layer in layers if (layer.window is not None) == local)
        return sum(bytes_for(layer, context, kv, chunk, ring, context, store) for layer in some)

    local, global_ = total(True, True), total(True, False)
    return {
        "context": context,
        "local": local,
        "global": global_,
        "total": local + global_,
        "full": total(False, True) + total(False, False),
    }
