"""Log-likelihoods of texts under a model, tokenized as lm-evaluation-harness does it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ...runtime.errors import ContextFull
from ...runtime.session import Session

_AT_ONCE = 64  # positions whose logits are held at a time: 64 MiB at Gemma's vocabulary


def encode_pair(encode: Callable[[str], list[int]], context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of a context and of what continues it; `encode` gives a text's ids after <bos>.

    Both are encoded together and split where the context alone would end, because a tokenizer may see a word that
    crosses the boundary. White space that ends the context goes to the continuation, to which its token belongs.
    Where the two fuse into one token, nothing is left for the continuation.
    """
    kept = context.rstrip()
    continuation = context[len(kept) :] + continuation
    ids = encode(kept)
    return ids, encode(kept + continuation)[len(ids) :]


class Scorer:
    """Log-likelihoods in `session`. What two questions in a row have in common is computed once."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def encode(self, text: str) -> list[int]:
        """The text's ids, after <bos>."""
        return self._session.model.tokenizer.encode(text, bos=True)

    def score(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        """log P(continuation | context) in nats, and whether greedy decoding would write the continuation.

        Neither may be empty. Raises InvalidRequest and ContextFull.
        """
        if not context or not continuation:
            raise ValueError("nothing to score")
        taken, room = len(context) + len(continuation) - 1, self._session.model.context
        if taken > room:
            raise ContextFull(f"found {taken} tokens with what comes before, expected at most the context's {room}")
        # The logits for the first token of the continuation come from the context's last.
        self._session.go_to(list(context[:-1]))
        inputs, targets = [context[-1], *continuation[:-1]], np.asarray(continuation)
        total, greedy = 0.0, True
        for start in range(0, len(inputs), _AT_ONCE):
            logits = self._session.logits(inputs[start : start + _AT_ONCE]).astype(np.float64)
            wanted = targets[start : start + _AT_ONCE]
            largest = logits.max(axis=1, keepdims=True)
            rows = np.arange(len(wanted))
            normalizer = largest[:, 0] + np.log(np.exp(logits - largest).sum(axis=1))
            total += float((logits[rows, wanted] - normalizer).sum())
            greedy &= bool((logits.argmax(axis=1) == wanted).all())
        return total, greedy
