"""What a model writes when nothing is asked: texts of the kinds that it was trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .api import Model
from .arrays import Floats
from .cache.caches import Caches
from .engines.protocol import ModelBackend
from .engines.rows import Segment
from .errors import InvalidRequest

LONGEST = 480  # tokens of a text; another subject serves more than more of the same
_AT_ONCE = 16  # texts


@dataclass
class _Text:
    """One that is being written, into `ids`."""

    ids: list[int]
    caches: Caches
    random: np.random.Generator  # its own, so that no text depends on the others
    last: int


def unprompted(model: Model, tokens: int, seed: int, progress: Callable[[int, int], None] | None = None) -> list[str]:
    """Texts of `tokens` tokens in all, each from <bos> on as likely as the model finds it, and at most `LONGEST` long.

    The same seed gives the same texts. `progress` is called with (tokens done, in all). Raises InvalidRequest for a
    model that cannot write several at once.
    """
    backend, tokenizer, context = model.backend, model.tokenizer, min(LONGEST, model.context)
    if not isinstance(backend, ModelBackend):
        raise InvalidRequest(f"{model.file.path}: ONNX folders write one text at a time; give a GGUF file")
    never = sorted(tokenizer.special_ids - {tokenizer.eos_id})
    texts: list[list[int]] = []

    def begun() -> _Text:
        random = np.random.default_rng([seed, len(texts)])
        texts.append([])
        return _Text(texts[-1], backend.caches(context, model.kv, model.chunk), random, tokenizer.bos_id)

    running, done = [begun() for _ in range(min(_AT_ONCE, -(-tokens // context)))], 0
    while done < tokens:
        logits = backend.forward([Segment(text.caches, np.array([text.last], np.int64), 1) for text in running])
        logits[:, never] = -np.inf
        for i, text in enumerate(running):
            text.last = _drawn(logits[i], text.random)
            if text.last != tokenizer.eos_id:
                text.ids.append(text.last)
                done += 1
            if text.last == tokenizer.eos_id or len(text.ids) == context:
                running[i] = begun()
        if progress:
            progress(min(done, tokens), tokens)
    return [found for ids in texts if (found := tokenizer.decode(ids).strip())]


def _drawn(logits: Floats, random: np.random.Generator) -> int:
    """A token by its probability alone: `Sampler` would sort a whole vocabulary, which takes longer than the model."""
    reach = np.cumsum(np.exp(logits - logits.max()), dtype=np.float64)
    return int(np.searchsorted(reach, random.random() * reach[-1], side="right").clip(0, len(reach) - 1))
