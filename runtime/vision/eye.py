"""What a model makes of pictures: ids that stand for their rows, and the rows when the model comes to them.

In a sequence each row of a picture has an id below 0, made from what the picture shows. So the same picture has the
same ids, and what a sequence has in common with another, a saved one too, is told by comparing ids, as with text.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple
from weakref import WeakValueDictionary

import numpy as np

from ..arrays import Floats, Ints
from ..cache.caches import LARGEST_CHUNK
from ..errors import InvalidRequest, InvalidSession
from ..model.vision import Seeing, VisionConfig
from .image import Image, normalized


class Picture:
    """A picture as a model sees it: `ids` stand for its `rows` (n_rows, hidden), computed when first asked for.

    `saved` are rows that come from a saved session, and are as trustworthy as that; then nothing is computed.
    """

    def __init__(
        self, name: str, ids: Sequence[int], compute: Callable[[], Floats] | None = None, saved: Floats | None = None
    ) -> None:
        self.name, self.ids, self.is_saved = name, tuple(ids), saved is not None
        self._array: Ints = np.array(self.ids, np.int64)
        self._compute, self._rows = compute, saved
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<Picture {self.name}: {len(self.ids)} rows>"

    @property
    def is_seen(self) -> bool:
        """Whether the rows are computed."""
        return self._rows is not None

    @property
    def rows(self) -> Floats:
        with self._lock:
            if self._rows is None:
                assert self._compute is not None
                self._rows, self._compute = self._compute(), None
            return self._rows

    def see(self) -> None:
        """Compute the rows now."""
        _ = self.rows

    def begins(self, ids: Ints) -> bool:
        """Whether ids begin with all of this picture."""
        return np.array_equal(ids[: len(self._array)], self._array)


class Scanned(NamedTuple):
    """A picture and the parts of it that are shown besides."""

    whole: Image | Picture
    crops: tuple[Image | Picture, ...]

    @property
    def name(self) -> str:
        return self.whole.name


class Piece(NamedTuple):
    """What of a sequence goes through a model at once: `ids`, what they enter it as, and what they see (`Segment`)."""

    ids: Ints
    inputs: Ints | Floats
    blocks: Ints | None = None


class Eye:
    """A model's eye. It keeps pictures that somebody holds, and of the others the newest, up to `most_rows` rows.

    `embed` gives the rows (n, hidden) of text ids, as they enter the first layer. `end_of_line` is the id of a newline.
    """

    def __init__(self, tower: Seeing, most_rows: int, embed: Callable[[Ints], Floats], end_of_line: int | None) -> None:
        self.config: VisionConfig = tower.config
        self.tower, self._most = tower, most_rows
        self._embed, self._end_of_line = embed, end_of_line
        self._largest = self.config.n_rows + (LARGEST_CHUNK if self.config.reads_prefix else 0)
        self._known = WeakValueDictionary[int, Picture]()  # by first id
        self._newest = OrderedDict[int, Picture]()
        self._lock = threading.Lock()

    @property
    def kept_bytes(self) -> int:
        """Bytes of the rows of the most pictures that it keeps."""
        return 4 * self.config.text_size * self._most

    def chunk(self, usual: int) -> int:
        """The most rows that go through the model at once, for text `usual` ones: a picture must fit whole."""
        return max(usual, self._largest)

    def look(self, image: Image | Picture) -> Picture:
        """A picture for this model's sequences. Its rows are not computed yet."""
        if isinstance(image, Picture):
            return self._kept(image)
        config = self.config
        pixels = image.fitted(config.image_size, config.resample)
        content = b"%d " % config.image_size + self.tower.fingerprint.encode() + pixels.tobytes()
        digest = np.frombuffer(hashlib.shake_256(content).digest(8 * config.n_rows), np.uint64)
        ids = [-1 - int(part >> np.uint64(2)) for part in digest]

        def compute() -> Floats:
            return self.tower.rows(normalized(pixels, config.mean, config.std))

        with self._lock:
            known = self._known.get(ids[0])
            if known is not None and known.is_saved:
                del self._known[ids[0]]
                known = None
        return self._kept(known or Picture(image.name, ids, compute))

    def find(self, ids: Ints) -> Picture | None:
        """The picture that ids begin with, all of it."""
        with self._lock:
            found = self._known.get(int(ids[0]))
        return self._kept(found) if found is not None and found.begins(ids) else None

    def pictures(self, ids: Ints) -> list[Picture]:
        """All pictures in a sequence, once each. Raises InvalidRequest for ids below 0 that are no whole picture."""
        return list(dict.fromkeys(self._picture_at(ids, at) for at in self._starts(ids)))

    def restored(self, ids: Ints, rows: Mapping[int, Floats]) -> list[Picture]:
        """The pictures of a saved sequence, whose rows were saved by their first ids. Raises InvalidSession."""
        found, n = [], self.config.n_rows
        for at in self._starts(ids):
            part, saved = ids[at : at + n], rows.get(int(ids[at]))
            want = (n, self.config.text_size)
            if len(part) < n or (part >= 0).any() or saved is None or saved.shape != want or saved.dtype != np.float32:
                raise InvalidSession(f"the saved picture at {at}: expected {n} ids and float32 rows {want} of it")
            found.append(self._kept(Picture("a saved picture", part.tolist(), saved=saved)))
        return found

    def piece(self, ids: Ints, position: int, most: int) -> Piece:
        """What of ids goes through the model next, from `position` on, and up to `most` of them where that is text."""
        if ids[0] >= 0:
            below = np.flatnonzero(ids[:most] < 0)
            text = ids[: int(below[0])] if len(below) else ids[:most]
            return Piece(text, text)
        if not self.config.reads_prefix:
            whole = len(self._picture_at(ids, 0).ids)
        elif position:
            raise InvalidRequest(f"a picture at {position}: this model takes pictures only at the very beginning")
        else:
            whole = self._prefix(ids)
        if whole > self._largest:
            raise InvalidRequest(
                f"{whole} rows of pictures and text must be seen at once, and {self._largest} is the most"
            )
        part = ids[:whole]
        blocks = np.full((whole, 2), position + whole)
        # Gemma 3's window stays a window within a picture; PaliGemma's begins before it.
        blocks[:, 0] = position if self.config.reads_prefix else np.arange(position, position + whole)
        return Piece(part, self._inputs(part), blocks)

    def cuts(self, ids: Ints, at: int) -> bool:
        """Whether a picture would be cut into two at an index."""
        return any(start < at < start + self.config.n_rows for start in self._starts(ids))

    def _starts(self, ids: Ints) -> Iterator[int]:
        """Where pictures begin."""
        end = 0
        for at in np.flatnonzero(ids < 0).tolist():
            if at >= end:
                yield at
                end = at + self.config.n_rows

    def _picture_at(self, ids: Ints, at: int) -> Picture:
        """The picture that begins at an id. Raises InvalidRequest where that is none."""
        picture = self.find(ids[at:])
        if picture is None:
            raise InvalidRequest(
                f"token ids: {ids[at]} at {at} begins no picture that is known here: pictures come as messages, "
                "or from a session that holds them, and whole"
            )
        return picture

    def _prefix(self, ids: Ints) -> int:
        """How many ids are pictures and what is asked about them: up to the first end of a line."""
        ends = np.flatnonzero(ids == self._end_of_line)
        return int(ends[0]) + 1 if len(ends) else len(ids)

    def _inputs(self, ids: Ints) -> Floats:
        """The rows of pictures and text, (n, hidden)."""
        rows: list[Floats] = []
        end = 0
        for at in self._starts(ids):
            if at > end:
                rows.append(self._embed(ids[end:at]))
            rows.append(self._picture_at(ids, at).rows)
            end = at + len(rows[-1])
        if end < len(ids):
            rows.append(self._embed(ids[end:]))
        return rows[0] if len(rows) == 1 else np.concatenate(rows)

    def _kept(self, picture: Picture) -> Picture:
        """The picture, known from now on and the newest of all."""
        with self._lock:
            picture = self._known.setdefault(picture.ids[0], picture)
            self._newest[picture.ids[0]] = picture
            self._newest.move_to_end(picture.ids[0])
            while len(self._newest) > 1 and sum(len(other.ids) for other in self._newest.values()) > self._most:
                self._newest.popitem(last=False)
            return picture


def next_piece(eye: Eye | None, ids: Ints, position: int, most: int) -> Piece:
    """`Eye.piece`, also for a model without an eye."""
    return Piece(ids[:most], ids[:most]) if eye is None else eye.piece(ids, position, most)
