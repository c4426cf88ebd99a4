"""One sequence of tokens going through a model: fed, rewound, saved and restored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .arguments import ids_of, path_of, shown, whole
from .arrays import Arrays, Floats
from .engines.protocol import Backend, Engine
from .errors import BezelError, CacheError, ContextFull, InvalidRequest, InvalidSession
from .files.atomic import atomic
from .files.safetensors import read_arrays, read_labels, write_arrays
from .model.config import ModelConfig
from .text.tokenizer import Tokenizer
from .vision.eye import Eye, Picture, Piece, next_piece

MakeRoom = Callable[[list[int]], list[int]]
"""Given all ids of a session whose context is full, the shorter ones to go on with."""

_LABEL, _VERSION = "bezel_session", "3"
_NOTE, _PICTURE = "note", "picture."


class Runnable(Protocol):
    """What a session needs of a model; see `Model`."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def backend(self) -> Backend: ...
    @property
    def context(self) -> int: ...
    @property
    def kv(self) -> str: ...
    @property
    def stop_ids(self) -> frozenset[int]: ...
    @property
    def eye(self) -> Eye | None: ...
    @property
    def chunk(self) -> int: ...

    def identity(self) -> Mapping[str, str]:
        """What another model must have in common to go on with a session of this one."""


class Held(Protocol):
    """What holds a sequence's keys and values."""

    def first_unsound(self) -> int | None: ...


def unsound(logits: Floats, position: int, held: Held, kv: str) -> BezelError | None:
    """What to say of logits that are not finite after `position` tokens, where keys and values are kept as `kv`."""
    if np.isfinite(logits).all():
        return None
    layer = held.first_unsound()
    where = "seen behind the last layer" if layer is None else f"first seen in keys or values of layer {layer}"
    wider = "; or numbers are beyond float16's 65504, and --kv f32 helps" if layer is not None and kv == "f16" else ""
    return BezelError(
        f"after {position} tokens the model gives logits that are not finite, {where}: its file is damaged, or was "
        f"never sound (`bezel verify` compares it with its source){wider}"
    )


class Session:
    """One sequence of tokens going through a model; `ids` are the tokens that it holds, and below 0 rows of pictures.

    With `ring` False the local layers keep every position too: more memory, the same bits.
    """

    def __init__(self, model: Runnable, *, ring: bool = True) -> None:
        self.model, self._ring = model, ring
        self.ids: list[int] = []
        self.engine: Engine = self._new_engine()
        self._pictures: list[Picture] = []  # held, so that the model's eye forgets none of them

    def __repr__(self) -> str:
        return f"<Session of {self.model!r}: {self.position} tokens>"

    @property
    def position(self) -> int:
        """How many tokens the session holds."""
        return self.engine.position

    def prefill(self, ids: Sequence[int]) -> Floats:
        """Take one or more tokens; logits float32 (vocab,) after the last. Raises ContextFull, having taken none."""
        logits = self.feed(ids)
        assert logits is not None  # nothing cancels
        return logits

    def logits(self, ids: Sequence[int]) -> Floats:
        """`prefill` that gives the logits float32 (len(ids), vocab) after every one of the ids."""
        checked = self.check(ids)
        out = np.empty((len(checked), self.model.config.vocab_size), np.float32)
        done = 0
        while done < len(checked):
            piece = next_piece(self.model.eye, checked[done:], self.position, self.engine.chunk)
            part = slice(done, done := done + len(piece.ids))
            out[part] = self._take(piece, len(piece.ids))
            self._check_sound(out[part])
        return out

    def step(self, token: int) -> Floats:
        """Take one token; logits float32 (vocab,)."""
        return self.prefill([token])

    def feed(
        self, ids: Sequence[int], make_room: MakeRoom | None = None, cancel: Callable[[], bool] = lambda: False
    ) -> Floats | None:
        """`prefill` that asks `make_room` for shorter ids when the context is full, and that can be cancelled.

        `cancel` is asked before every chunk; None comes back if it stopped there. What was taken stays taken, also
        where the logits are not finite, which raises BezelError. Shorter ids take the place of what is held once all
        of them have gone through the model; until then nothing changes.
        """
        if make_room and self.position + len(ids) > self.model.context:
            shorter = Session(self.model, ring=self._ring)
            found = shorter.feed(make_room([*self.ids, *ids]), cancel=cancel)
            if found is not None:
                self._take_over(shorter)
            return found
        checked = self.check(ids)
        logits: Floats = np.empty((0, 0), np.float32)
        done = 0
        while done < len(checked):
            if cancel():
                return None
            piece = next_piece(self.model.eye, checked[done:], self.position, self.engine.chunk)
            done += len(piece.ids)
            logits = self._take(piece, int(done == len(checked)))
        last: Floats = logits[0]
        self._check_sound(last)
        return last

    def _take(self, piece: Piece, wanted: int) -> Floats:
        logits = self.engine.forward(piece.inputs, wanted, blocks=piece.blocks)
        self.ids += piece.ids.tolist()
        return logits

    def _check_sound(self, logits: Floats) -> None:
        if (error := unsound(logits, self.position, self.engine, self.model.kv)) is not None:
            raise error

    def check(self, ids: Sequence[int]) -> npt.NDArray[np.int64]:
        """The ids as an array. Raises InvalidRequest for none or foreign ones, ContextFull for too many."""
        try:
            array = np.asarray(ids)
        except ValueError:  # of lists of different lengths
            raise InvalidRequest(f"token ids: found {shown(ids)}, expected one or more integers") from None
        vocab_size = self.model.config.vocab_size
        if array.ndim != 1 or not len(array) or array.dtype.kind not in "iu":
            raise InvalidRequest(f"token ids: found {array.dtype} {array.shape}, expected one or more integers")
        least = array.min()
        if (least < 0 and self.model.eye is None) or array.max() >= vocab_size:
            raise InvalidRequest(f"token ids: found {least} to {array.max()}, expected 0 to {vocab_size - 1}")
        if least < 0 and self.model.eye is not None:
            self._pictures += self.model.eye.pictures(array)
        left = self.model.context - self.position
        if len(array) > left:
            what = "1 more token does" if len(array) == 1 else f"{len(array)} more tokens do"
            room = f"has {left} position{'s' * (left > 1)} left" if left else "is full"
            raise ContextFull(f"{what} not fit: the context of {self.model.context} {room}")
        return array.astype(np.int64)

    def rewind(self, n: int) -> None:
        """Forget the n newest tokens. Raises CacheError when a ring no longer holds what comes before them, and
        InvalidRequest where that would leave a part of a picture.
        """
        left = len(self.ids) - whole("rewind", n, "a number of tokens")
        if self.model.eye is not None and self.model.eye.cuts(np.array(self.ids, np.int64), left):
            raise InvalidRequest(f"rewind: {n} tokens back is inside of a picture, which is seen whole or not at all")
        self.engine.rewind(n)
        del self.ids[len(self.ids) - n :]

    def go_to(self, ids: Sequence[int]) -> None:
        """Hold these ids, reusing the common beginning as far as the caches allow."""
        ids = ids_of(ids)
        common = next((i for i, (a, b) in enumerate(zip(self.ids, ids, strict=False)) if a != b), None)
        common = min(len(self.ids), len(ids)) if common is None else common
        try:
            self.rewind(len(self.ids) - common)
        except CacheError:
            fresh = Session(self.model, ring=self._ring)
            if ids:
                fresh.prefill(ids)
            self._take_over(fresh)
            return
        if ids[common:]:
            self.prefill(ids[common:])

    def _take_over(self, other: Session) -> None:
        """Hold what another session of this model holds, in place of what is held."""
        self.engine, self.ids, self._pictures = other.engine, other.ids, other._pictures

    def reset(self) -> None:
        """Forget everything."""
        self.engine = self._new_engine()
        self.ids, self._pictures = [], []

    def save(self, path: str | Path, note: str = "") -> None:
        """Write the session to a file, with a text that `restore` gives back; whole or not at all.

        Raises InvalidRequest where the path is no file's, or that of a file which is no session, and OSError.
        """
        noted = {_NOTE: np.frombuffer(note.encode(), np.int8)} if note else {}
        seen = _seen(self.model, self.ids)
        write_session(path_of(path), self.model, self.ids, {**self.engine.snapshot(), **seen, **noted})

    def restore(self, path: str | Path) -> str:
        """Go on from a saved session, as if nothing had happened, and return the note that was saved with it.

        Raises InvalidSession, changing nothing.
        """
        path = path_of(path)
        ids, arrays = read_session(path, self.model)
        try:
            note: str = arrays.get(_NOTE, np.empty(0, np.int8)).tobytes().decode()
        except ValueError:
            raise InvalidSession(f"{path}: its note is no text") from None
        fresh = self._new_engine()
        try:
            fresh.restore({name: array for name, array in arrays.items() if name.startswith("layers.")})
            pictures = _pictures(self.model, ids, arrays)
        except InvalidSession as error:
            raise InvalidSession(f"{path}: {error}") from error
        if fresh.position != len(ids):
            raise InvalidSession(f"{path}: {len(ids)} ids, but the caches hold {fresh.position} positions")
        self.engine, self.ids, self._pictures = fresh, ids, pictures
        return note

    def _new_engine(self) -> Engine:
        model = self.model
        return model.backend.engine(model.context, model.kv, model.chunk, self._ring)


def _seen(model: Runnable, ids: Sequence[int]) -> Arrays:
    """The rows of the pictures in a sequence, to be saved with it, by their first ids."""
    if model.eye is None:
        return {}
    return {f"{_PICTURE}{picture.ids[0]}": picture.rows for picture in model.eye.pictures(np.array(ids, np.int64))}


def _pictures(model: Runnable, ids: Sequence[int], arrays: Arrays) -> list[Picture]:
    """The pictures of a saved sequence. Raises InvalidSession where they are not those of its ids."""
    if model.eye is None:
        return []
    rows = {int(name.removeprefix(_PICTURE)): array for name, array in arrays.items() if name.startswith(_PICTURE)}
    return model.eye.restored(np.array(ids, np.int64), rows)


def write_session(path: Path, model: Runnable, ids: Sequence[int], snapshot: Arrays) -> None:
    """Write ids and the snapshot of what holds them; see `Session.save`."""
    arrays = {**snapshot, "ids": np.array(ids, np.int64)}
    with atomic(path, lambda old: _LABEL in read_labels(old)) as file:
        write_arrays(file, arrays, {_LABEL: _VERSION, **model.identity()})


def read_session(path: Path, model: Runnable) -> tuple[list[int], Arrays]:
    """What `write_session` wrote for the same model. Raises InvalidSession."""
    labels, arrays = _read(path)
    _check_labels(path, labels, model)
    return _checked_ids(path, arrays.pop("ids", None), model), arrays


def session_ids(path: Path, model: Runnable) -> list[int]:
    """The ids in what `write_session` wrote, without reading the rest. Raises InvalidSession."""
    labels, arrays = _read(path, "ids")
    _check_labels(path, labels, model)
    return _checked_ids(path, arrays.get("ids"), model)


def _read(path: Path, only: str | None = None) -> tuple[dict[str, str], dict[str, Any]]:
    try:
        return read_arrays(path, only)
    except ValueError as error:
        raise InvalidSession(f"{path}: not a saved session: {error}") from error


def _check_labels(path: Path, labels: Mapping[str, str], model: Runnable) -> None:
    if (version := labels.get(_LABEL)) != _VERSION:
        raise InvalidSession(
            f"{path}: found {'no session' if version is None else f'a session of version {version}'}, expected one "
            f"of version {_VERSION}: another version of bezel cannot be gone on from, so begin a new one"
        )
    for key, want in model.identity().items():
        if labels.get(key) != want:
            raise InvalidSession(f"{path}: saved with {key} {labels.get(key)}, expected {want}")


def _checked_ids(path: Path, ids: npt.NDArray[Any] | None, model: Runnable) -> list[int]:
    ids = np.empty((0, 0)) if ids is None else ids
    vocab_size = model.config.vocab_size
    if ids.ndim != 1 or ids.dtype != np.int64 or len(ids) > model.context:
        raise InvalidSession(
            f"{path}: 'ids': found {ids.dtype} {ids.shape}, expected up to {model.context} int64: so many positions "
            "has this context, which --context makes larger"
        )
    if len(ids) and ids.min() < 0 and model.eye is None:
        raise InvalidSession(f"{path}: holds pictures, and this model sees none: its vision tower is missing")
    if len(ids) and ids.max() >= vocab_size:
        raise InvalidSession(f"{path}: 'ids' names a token outside the vocabulary of {vocab_size}")
    return [int(token) for token in ids]
