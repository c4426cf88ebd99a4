"""The models that a server has by name; each is loaded when it is first asked for."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..api import Model, load
from ..cache.caches import bytes_for
from ..engines import bytes_for as stores_of
from ..engines.protocol import ModelBackend
from ..engines.tower import Tower
from ..errors import BezelError, InvalidRequest
from ..files.memory import available_memory
from ..text.grammar import Grammar, Grammars
from .fields import BadRequest
from .prefixes import make_folder
from .scheduler import Scheduler

_log = logging.getLogger("bezel.serve")


@dataclass(frozen=True)
class Setting:
    """How models are served: what `load` takes, answers at a time, bytes kept of sequences that ended, and where."""

    options: Mapping[str, Any]
    parallel: int
    cache_bytes: int
    cache_folder: Path | None = None


class Served:
    """A loaded model and its scheduler."""

    def __init__(self, name: str, model: Model, setting: Setting) -> None:
        self.name, self.model, self.loaded = name, model, int(time.time())
        self.scheduler = Scheduler(model, setting.parallel, setting.cache_bytes, setting.cache_folder)
        self._lock = threading.Lock()

    async def compiled(self, compile_: Callable[[Grammars], Grammar]) -> Grammar:
        """A grammar for this model, made beside what else is going on. Raises InvalidRequest."""

        def work() -> Grammar:
            with self._lock:  # it is made once
                grammars = self.model.grammars
            return compile_(grammars)

        return await asyncio.to_thread(work)

    def close(self) -> None:
        self.scheduler.close()
        self.model.close()


@dataclass(frozen=True)
class Facts:
    """What is told of a model, loaded or not: the tokens of its context and its vocabulary, how keys and values are
    kept, whether it has a chat template, and whether it sees pictures.
    """

    n_ctx: int
    n_vocab: int
    kv: str
    chat: bool
    sees: bool


class Models:
    """By name; the first is the one that is meant where none is named.

    Each file is opened at once, so that what cannot be served is known now. Raises InvalidRequest for what is no GGUF
    file, OSError where there can be no folder for what is kept, and what `load` raises.
    """

    def __init__(self, paths: Mapping[str, Path], setting: Setting) -> None:
        self.paths, self._setting = dict(paths), setting
        if setting.cache_folder is not None:
            make_folder(setting.cache_folder)
        self.facts = {name: self._facts(path) for name, path in self.paths.items()}
        self.loaded: dict[str, Served] = {}
        self._lock = asyncio.Lock()
        self._draining = False

    async def get(self, name: str | None) -> Served:
        """Raises BadRequest for a name that is none, or a model that does not fit or is there no more."""
        name = next(iter(self.paths)) if name is None else name
        if name not in self.paths:
            known = ", ".join(self.paths)
            raise BadRequest(f"model: found {name[:100]!r}, expected one of {known}", "model", 404, "model_not_found")
        async with self._lock:
            if name not in self.loaded:
                try:
                    self.loaded[name] = await asyncio.to_thread(self._load, name)
                except (BezelError, OSError) as error:  # which names files of this computer
                    _log.error("%s", error)
                    raise BadRequest(f"model {name} cannot be loaded any more", "model", 500) from None
                if self._draining:  # in the meantime
                    self.drain()
        return self.loaded[name]

    def _facts(self, path: Path) -> Facts:
        with load(path, **self._setting.options) as model:
            if not isinstance(model.backend, ModelBackend):
                raise InvalidRequest(f"{path}: only GGUF files can be served; this is {model.file.kind}")
            return Facts(model.context, model.config.vocab_size, model.kv, model.is_chat_model, model.eye is not None)

    def _load(self, name: str) -> Served:
        model = load(self.paths[name], **self._setting.options)
        try:
            need, free = memory(model, self._setting), available_memory()
            if self.loaded and free is not None and need > free:
                raise BadRequest(
                    f"model {name} may take {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free beside "
                    f"{', '.join(self.loaded)}",
                    "model",
                    503,
                )
            return Served(name, model, self._setting)
        except BaseException:
            model.close()
            raise

    def drain(self) -> int:
        """Begin no more answers. Returns how many are on their way."""
        self._draining = True
        for served in self.loaded.values():
            served.scheduler.drain()
        return sum(served.scheduler.load[0] for served in self.loaded.values())

    def stop(self) -> None:
        """End the answers that there are, too."""
        for served in self.loaded.values():
            served.scheduler.stop()

    def close(self) -> None:
        for served in self.loaded.values():
            served.close()
        self.loaded.clear()


def memory(model: Model, setting: Setting) -> int:
    """Bytes that a model takes at most: its file and its eye, full contexts for all answers, and what is kept."""
    store, chunk = stores_of("native"), model.chunk
    one = sum(bytes_for(x, model.context, model.kv, chunk, True, model.context, store) for x in model.config.layers)
    return model.file.file_bytes + _eye_bytes(model) + setting.parallel * one + setting.cache_bytes


def _eye_bytes(model: Model) -> int:
    """Of its eye, with the pictures that are kept; one is looked at at a time."""
    if model.eye is None:
        return 0
    assert isinstance(model.eye.tower, Tower)
    return model.eye.tower.most_bytes + model.eye.kept_bytes
