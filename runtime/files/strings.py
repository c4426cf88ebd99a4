"""Many strings in one piece of memory: a vocabulary of 262,144 is read and checked without a Python object for each."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, pairwise
from typing import overload

import numpy as np
from numpy.typing import NDArray

from .. import _native


class Strings(Sequence[str]):
    """Strings that are decoded when asked for: string i is `text`[`ends`[i − 1]] up to `text`[`ends`[i]], in UTF-8."""

    def __init__(self, text: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, strings: Iterable[str]) -> Strings:
        """These strings; Strings stay as they are. Raises UnicodeEncodeError for a lone surrogate."""
        if isinstance(strings, Strings):
            return strings
        encoded = [string.encode() for string in strings]
        ends = np.cumsum([len(string) for string in encoded], dtype=np.int64)
        return Strings(np.frombuffer(b"".join(encoded), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        start = self.ends[i - 1] if i else 0
        return self._decode(self.text[start : self.ends[i]].tobytes(), i)

    def __iter__(self) -> Iterator[str]:
        text = self.text.tobytes()  # one copy is cheaper than a view for each
        for i, (start, end) in enumerate(pairwise(chain((0,), self.ends.data))):
            yield self._decode(text[start:end], i)

    def __contains__(self, string: object) -> bool:
        return isinstance(string, str) and self.find(string) is not None

    def index(self, string: str, start: int = 0, stop: int | None = None) -> int:
        found = self.find(string)
        if found is None or not start <= found < (len(self) if stop is None else stop):
            raise ValueError(f"{string!r} is not among the strings")
        return found

    def __repr__(self) -> str:
        return f"<{len(self)} strings>"

    def sizes(self) -> NDArray[np.int64]:
        """The bytes of each."""
        return np.diff(self.ends, prepend=0)

    def are_text(self) -> bool:
        """Whether each is UTF-8."""
        sizes = self.sizes()
        starts = (self.ends - sizes)[sizes > 0]
        try:
            self.text.tobytes().decode()
        except UnicodeDecodeError:
            return False
        return not ((self.text[starts] & 0xC0) == 0x80).any()  # a character that is cut in two

    def are_distinct(self) -> bool:
        """Whether no two are equal."""
        seed = int.from_bytes(os.urandom(8), "little")  # so that nobody can write strings with equal hashes
        hashes = np.sort(_native.string_hashes(self.text, self.ends, seed))
        return bool((hashes[1:] != hashes[:-1]).all()) or len(set(self)) == len(self)

    def replaced(self, changes: Mapping[int, str]) -> Strings:
        """With other strings in some places."""
        text, parts, done = self.text.tobytes(), [], 0
        sizes = self.sizes()
        for i, string in sorted(changes.items()):
            parts += [text[done : self.ends[i] - sizes[i]], new := string.encode()]
            done, sizes[i] = int(self.ends[i]), len(new)
        return Strings(np.frombuffer(b"".join([*parts, text[done:]]), np.uint8), np.cumsum(sizes))

    def find(self, string: str) -> int | None:
        """The first that is equal to `string`."""
        wanted = np.frombuffer(string.encode(errors="surrogatepass"), np.uint8)
        same = np.flatnonzero(self.sizes() == wanted.size)
        texts = self.text[(self.ends[same] - wanted.size)[:, None] + np.arange(wanted.size)]
        found = same[(texts == wanted).all(axis=1)]
        return int(found[0]) if len(found) else None

    def _decode(self, value: bytes, i: int) -> str:  # noqa: ARG002
        return value.decode()
