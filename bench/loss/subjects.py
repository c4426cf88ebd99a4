"""What can be measured: a GGUF file, an ONNX folder or a checkpoint, with the engine and the settings it runs with."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from ...export.metadata import CALIBRATION_TEXT
from ...export.sources.checkpoint import Checkpoint
from ...export.sources.opening import open_checkpoint
from ...runtime.api import ACTIVATIONS, load
from ...runtime.arrays import Floats, Ints
from ...runtime.cache.caches import default_chunk
from ...runtime.cache.numpy_store import NumpyStore
from ...runtime.cache.store import KV_TYPES
from ...runtime.engines.protocol import Backend, Engine, ModelBackend
from ...runtime.engines.tower import Tower, VisionTensors, float_matrix
from ...runtime.errors import InvalidRequest
from ...runtime.files.model_file import open_model
from ...runtime.files.models import find_model
from ...runtime.files.vision_file import VisionFile, vision_beside
from ...runtime.model import ops
from ...runtime.model.config import ModelConfig
from ...runtime.model.forward import Weights
from ...runtime.session import Session
from ...runtime.text.tokenizer import Tokenizer
from ...runtime.vision.eye import Eye, next_piece
from ...runtime.vision.image import Image
from .passages import Passage, Text
from .result import MeasuredModel

_OPTION = r"(?:engine|kv|activations|ring|name|vision)=[^,=]+"


@dataclass(frozen=True)
class Spec:
    """A model and how to run it. `ring` False keeps every position in the local layers too; `vision` is the file of
    the eye that it sees with, or the folder of a model that has its own inside.
    """

    path: Path
    engine: str | None = None
    kv: str = "f16"
    activations: str = "int8"
    ring: bool = True
    name: str | None = None
    vision: Path | None = None

    @property
    def is_checkpoint(self) -> bool:
        return _is_checkpoint(self.path)

    @property
    def is_gguf(self) -> bool:
        return not self.path.is_dir()


def parse_spec(text: str, default: Spec) -> Spec:
    """`PATH` or `PATH@key=value,…` with the keys engine, kv, activations, ring (on, off), name and vision.

    What is not said is as in `default`, but ort's keys and values are as the folder has them. Raises InvalidRequest.
    """
    match = re.fullmatch(rf"(.+?)@({_OPTION}(?:,{_OPTION})*)", text)
    path = match[1] if match else text
    options: dict[str, Any] = dict(pair.split("=") for pair in match[2].split(",")) if match else {}
    for key, known in (("kv", KV_TYPES), ("activations", ACTIVATIONS), ("ring", ("on", "off"))):
        if key in options and options[key] not in known:
            raise InvalidRequest(f"{text}: {key}: found {options[key]!r}, expected one of {', '.join(known)}")
    ring = options.pop("ring", None)
    if "vision" in options:
        options["vision"] = Path(options["vision"])
    spec = replace(default, path=find_model(path), **options)
    spec = spec if ring is None else replace(spec, ring=ring == "on")
    if not spec.path.exists():
        raise InvalidRequest(
            f"{path}: no such file or folder; expected a GGUF file, an ONNX folder or a checkpoint folder, perhaps "
            "with settings: model.gguf@kv=int8,activations=f32"
        )
    if spec.is_checkpoint:
        if spec.engine not in (None, "reference"):
            raise InvalidRequest(f"{path}: engine: found {spec.engine!r}: a checkpoint runs on 'reference' only")
        return replace(spec, engine="reference", activations="f32")
    engine = spec.engine or ("native" if spec.is_gguf else "ort")
    if engine == "ort" and "kv" not in options:
        with open_model(spec.path) as file:
            spec = replace(spec, kv=file.kv_types(engine)[0])
    return replace(spec, engine=engine, activations="f32" if engine == "reference" else spec.activations)


def _is_checkpoint(path: Path) -> bool:
    return path.is_dir() and any(path.glob("*.safetensors*"))


def seeing(spec: Spec) -> Spec:
    """The same with its eye named: that in a folder, or beside a file. Raises InvalidRequest for a file without."""
    if spec.vision is not None:
        return spec
    try:
        return replace(spec, vision=vision_beside(spec.path) if spec.is_gguf else spec.path)
    except InvalidRequest as error:
        raise InvalidRequest(f"{spec.path}: {error}; here say {spec.path.name}@vision=FILE") from None


def absolute(spec: Spec) -> Spec:
    """The same for a process in another folder."""
    eye = None if spec.vision is None else spec.vision.absolute()
    return replace(spec, path=spec.path.absolute(), vision=eye)


class FloatBackend(ModelBackend):
    """A checkpoint's own weights for NumPy, float32, all in memory."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        shared: dict[str, Floats] = {}
        layers: list[dict[str, Floats]] = [{} for _ in checkpoint.config.layers]
        for spec in checkpoint.specs:
            home = shared if spec.layer is None else layers[spec.layer]
            home[spec.role] = checkpoint.tensor(spec)
        super().__init__(checkpoint.config, ops, Weights(shared, layers), NumpyStore)

    def tower(self, file: VisionTensors) -> Tower:
        return Tower(file, ops, float_matrix)


class _CheckpointEye:
    """What a checkpoint sees with, as the tower reads it. Raises InvalidRequest where it has nothing of the kind."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        if checkpoint.vision is None:
            raise InvalidRequest(f"{checkpoint.path}: has no vision tower, and there are pictures")
        self._eye, self.config, self.path = checkpoint.vision, checkpoint.vision.config, checkpoint.path
        self._specs = {spec.gguf: spec for spec in checkpoint.vision.specs}

    def tensor(self, name: str) -> Floats:
        return self._eye.tensor(self._specs[name])

    def fingerprint(self) -> str:
        return f"the eye of {self._eye.path}"


@dataclass(frozen=True)
class _Runnable:
    """What a session needs of its model: one whose sessions nobody saves, and that stops at no token by itself."""

    config: ModelConfig
    tokenizer: Tokenizer
    backend: Backend
    kv: str
    context: int
    eye: Eye | None
    stop_ids: frozenset[int] = frozenset()

    @property
    def chunk(self) -> int:
        return _chunk(self.config, self.eye)

    def identity(self) -> dict[str, str]:
        raise NotImplementedError("a measured sequence is not saved")


def _chunk(config: ModelConfig, eye: Eye | None) -> int:
    """The most rows that go through a model at once."""
    usual = default_chunk(config.layers)
    return usual if eye is None else eye.chunk(usual)


@dataclass(frozen=True)
class _Opened:
    """What subjects of the same weights share."""

    config: ModelConfig
    tokenizer: Tokenizer
    chat_template: str | None
    backend: Callable[[], Backend]
    eye: Callable[[], Eye | None]
    file_bytes: int
    bits_per_weight: float
    formats: dict[str, int]
    calibrated_on: object = None  # the sha256 of a text, as the file says


class Subject:
    """An opened model: `start` gives a fresh sequence. `facts` goes into the result."""

    def __init__(self, spec: Spec, name: str, opened: _Opened) -> None:
        self.spec, self.name = spec, name
        self.config, self.tokenizer, self._backend = opened.config, opened.tokenizer, opened.backend
        self._eye = opened.eye
        self.chat_template, self.calibrated_on = opened.chat_template, opened.calibrated_on
        self.facts = MeasuredModel(
            name=name,
            path=str(spec.path),
            engine=str(spec.engine),
            kv=spec.kv,
            activations=spec.activations,
            file_bytes=opened.file_bytes,
            bits_per_weight=opened.bits_per_weight,
            formats=opened.formats,
            vision=None if spec.vision is None else str(spec.vision),
        )

    @property
    def eye(self) -> Eye | None:
        """What sees pictures, where `spec` says with what."""
        return self._eye() if self.spec.vision is not None else None

    def ids_of(self, passage: Passage) -> Ints:
        """A passage as this model takes it: a picture's ids are its eye's own."""
        if passage.picture is None:
            return passage.ids
        assert self.eye is not None
        ids = passage.ids.copy()
        ids[ids < 0] = self.eye.look(Image(passage.picture)).ids
        return ids

    def start(self, context: int) -> Engine:
        """An empty sequence for up to `context` tokens."""
        return self._backend().engine(context, self.spec.kv, _chunk(self.config, self.eye), self.spec.ring)

    def session(self) -> Session:
        """An empty sequence that can be rewound; it cannot be saved."""
        backend, context = self._backend(), self.config.context_length
        runnable = _Runnable(self.config, self.tokenizer, backend, self.spec.kv, context, self.eye)
        return Session(runnable, ring=self.spec.ring)


def forward(
    engine: Engine, ids: Ints, wanted: int, streams: list[Floats] | None = None, eye: Eye | None = None
) -> Floats:
    """`engine.forward` in steps that it takes, each with its last `wanted` rows; the last step's logits."""
    done = 0
    while done < len(ids):
        piece = next_piece(eye, ids[done:], engine.position, engine.chunk)
        logits = engine.forward(piece.inputs, wanted, streams, blocks=piece.blocks)
        done += len(piece.ids)
    return logits


class Opener:
    """Opens subjects; those that differ only in their caches share their weights."""

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads
        self._opened: dict[tuple[Path, str | None, str, Path | None], _Opened] = {}

    def open(self, spec: Spec, name: str = "") -> Subject:
        """Raises what `runtime.load` and `open_checkpoint` raise."""
        key = (spec.path, spec.engine, spec.activations, spec.vision)
        if key not in self._opened:
            self._opened[key] = self._open_checkpoint(spec) if spec.is_checkpoint else self._open_model(spec)
        return Subject(spec, name or spec.name or _stem(spec.path), self._opened[key])

    def _open_model(self, spec: Spec) -> _Opened:
        setting: dict[str, Any] = {"kv": spec.kv, "activations": spec.activations, "threads": self.threads}
        model = load(spec.path, spec.engine, vision=None if spec.vision == spec.path else spec.vision, **setting)
        if spec.vision is not None and model.eye is None:
            raise InvalidRequest(f"{spec.path}: has no vision tower, and there are pictures")
        tensors = model.file.tensors.values()
        return _Opened(
            config=model.config,
            tokenizer=model.tokenizer,
            chat_template=model.chat_template,
            backend=lambda: model.backend,
            eye=lambda: model.eye,
            file_bytes=sum(file.stat().st_size for file in _files(spec.path)),
            bits_per_weight=8 * sum(t.nbytes for t in tensors) / sum(math.prod(t.shape) for t in tensors),
            formats=dict(Counter(t.format.name for t in tensors)),
            calibrated_on=model.file.metadata.get(CALIBRATION_TEXT),
        )

    def _open_checkpoint(self, spec: Spec) -> _Opened:
        checkpoint = open_checkpoint(spec.path)
        tokenizer = Tokenizer(checkpoint.vocabulary(), str(spec.path))

        @cache
        def backend() -> FloatBackend:  # only when something is to be computed
            return FloatBackend(checkpoint)

        @cache
        def eye() -> Eye | None:
            if spec.vision is None:
                return None
            of = spec.vision
            file = _CheckpointEye(checkpoint) if _is_checkpoint(of) else VisionFile(of, checkpoint.config.hidden_size)
            tower = backend().tower(file)
            return Eye(tower, 2 * checkpoint.config.context_length, backend().embed, tokenizer.end_of_line_id)

        bits = sum(math.prod(s.shape) * 8 * checkpoint.format(s).block_bytes for s in checkpoint.specs)
        return _Opened(
            config=checkpoint.config,
            tokenizer=tokenizer,
            chat_template=checkpoint.chat_template,
            backend=backend,
            eye=eye,
            file_bytes=sum(file.stat().st_size for file in checkpoint.files),
            bits_per_weight=bits / sum(math.prod(s.shape) for s in checkpoint.specs),
            formats=dict(Counter(checkpoint.format(s).name for s in checkpoint.specs)),
        )


def calibration_warnings(candidates: Sequence[Subject], read: Sequence[Text]) -> list[str]:
    """Of candidates that were calibrated on a text, by its content, that they are looked at on."""
    return [
        f"{subject.name} was calibrated on {text.path}: on text that it was not made for it loses more"
        for subject in candidates
        for text in read
        if text.sha256 == subject.calibrated_on
    ]


def key_of(spec: Spec) -> dict[str, Any]:
    """Which files, as they are now, and how they are run: models with equal keys give equal logits."""
    stats = [(str(f.relative_to(spec.path.parent)), (s := f.stat()).st_size, s.st_mtime_ns) for f in _files(spec.path)]
    setting = {name: getattr(spec, name) for name in ("engine", "kv", "activations", "ring")}
    eye = {} if spec.vision in (None, spec.path) else {"eye": key_of(Spec(spec.vision))}
    return {"path": str(spec.path.resolve()), "files": stats, **setting, **eye}


def _stem(path: Path) -> str:
    """A file's name without its kind; a folder's name may have dots of its own."""
    return path.name if path.is_dir() else path.stem


def unique_names(specs: Sequence[Spec]) -> list[str]:
    """A name for each: the file's, with its folder or the settings where that alone would not tell them apart.

    What is the same in everything, or was given the same name, is numbered.
    """
    names: list[str] = []
    for spec in specs:
        alike = [other for other in specs if not other.name and _stem(other.path) == _stem(spec.path)]
        telling = (way for way in _NAMES if len({way(other) for other in alike}) == len(alike))
        name = spec.name or next(telling, _NAMES[-1])(spec)
        again = sum(other == name or other.startswith(f"{name} (no. ") for other in names)
        names.append(f"{name} (no. {again + 1})" if again else name)
    return names


def _in_folder(path: Path) -> str:
    return f"{path.absolute().parent.name}/{_stem(path)}"


def _setting(spec: Spec) -> str:
    ring = "" if spec.ring else ", no ring"
    eye = "" if spec.vision is None else f", seeing with {spec.vision.name}"
    return f"({spec.engine}, {spec.activations} activations, {spec.kv} KV{ring}{eye})"


_NAMES: tuple[Callable[[Spec], str], ...] = (
    lambda spec: _stem(spec.path),
    lambda spec: _in_folder(spec.path),
    lambda spec: f"{_stem(spec.path)} {_setting(spec)}",
    lambda spec: f"{_in_folder(spec.path)} {_setting(spec)}",
    lambda spec: f"{spec.path} {_setting(spec)}",
)
"""Ways to name a model, the shortest first."""


def sizes_of(paths: Iterable[Path]) -> dict[str, int]:
    """The bytes of every file of some models, by absolute path."""
    return {str(file.absolute()): file.stat().st_size for path in paths for file in _files(path)}


def _files(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
