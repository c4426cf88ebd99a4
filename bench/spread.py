"""Where independent pieces of work are done: here, one after the other, or by the workers of a dask scheduler."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import pickle
import socket
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from threadpoolctl import threadpool_limits

from ..runtime.errors import BezelError, InvalidRequest
from ..runtime.version import bezel_version
from .loss.state import code_hash

_ANSWER_SECONDS = 10
_BATCH = 100  # items sent at a time
_START = "dask worker ADDRESS --nthreads 1 --memory-limit 0"
_CLIENT_LOG = logging.getLogger("distributed.client")

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")
Result = TypeVar("Result")
_Taken = TypeVar("_Taken", contravariant=True)
_Given = TypeVar("_Given", covariant=True)


@dataclass(frozen=True)
class Recipe:
    """How another process makes the same work: `make(*args)`, `make` being a function of a module. It is sent: small.

    `files` are all that is read, by absolute path, with their bytes; `threads` are NumPy's, None takes all cores.
    """

    make: Callable[..., Work[Any, Any]]
    args: tuple[Any, ...]
    files: Mapping[str, int]
    threads: int | None = None


class Work(Protocol[_Taken, _Given]):
    """What is done with an item; its result does not depend on what was done before."""

    def __call__(self, item: _Taken, /) -> _Given: ...

    def recipe(self) -> Recipe: ...


class Spread(Protocol):
    """Does the work with all items; gives each one's key and result as soon as that is there, in any order."""

    def __call__(self, work: Work[Item, Result], items: Mapping[Key, Item], /) -> Iterator[tuple[Key, Result]]: ...


def here(work: Work[Item, Result], items: Mapping[Key, Item]) -> Iterator[tuple[Key, Result]]:
    """In this process and in order, each item when its result is asked for."""
    for key, item in items.items():
        yield key, work(item)


class Cluster:
    """A `Spread` over the workers of a dask scheduler, at an address or with its scheduler file; a context manager.

    What a lost worker had is done again by others; what is pending at the end is cancelled. `tell` is given what the
    user should know. Raises InvalidRequest without the package distributed or where no scheduler answers, and
    BezelError where a worker has another bezel, lacks a file, or fails.
    """

    def __init__(self, address: str, tell: Callable[[str], None]) -> None:
        try:
            from distributed import Client
        except ModuleNotFoundError as error:
            if error.name not in ("distributed", "dask"):
                raise
            raise InvalidRequest("--scheduler needs the package distributed: pip install 'bezel-lm[cluster]'") from None
        self._address, self._tell = address, tell
        try:
            found = json.loads(Path(address).read_text("utf-8"))["address"] if Path(address).is_file() else address
            # First: a client that finds nobody prints a traceback when it is collected.
            asyncio.run(asyncio.wait_for(_ask(found), _ANSWER_SECONDS))
            self._client = Client(found, timeout=_ANSWER_SECONDS, set_as_default=False)
        except (OSError, TimeoutError, ValueError, KeyError, TypeError) as error:
            why = str(error) or f"no answer in {_ANSWER_SECONDS} seconds"  # a TimeoutError has no words
            raise InvalidRequest(
                f"--scheduler {address}: no dask scheduler answers there, and it is no scheduler's file ({why}); "
                "start one with `dask scheduler`, which says its address"
            ) from None

    def __enter__(self) -> Cluster:
        _CLIENT_LOG.addFilter(_no_traceback)
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()
        _CLIENT_LOG.removeFilter(_no_traceback)

    def __call__(self, work: Work[Item, Result], items: Mapping[Key, Item]) -> Iterator[tuple[Key, Result]]:
        if not items:
            return
        from distributed import as_completed

        recipe, build = work.recipe(), _Build.here()
        self._meet(recipe, build)
        errands = [_Errand(recipe, build, pickle.dumps(item)) for item in items.values()]
        futures = self._client.map(_run, errands, pure=False, batch_size=_BATCH)
        keys = dict(zip(futures, items, strict=True))
        del futures, errands  # dask drops results, and cancels work, whose futures nobody holds
        for future in as_completed(list(keys), loop=self._client.loop):
            key = keys.pop(future)
            yield key, self._result(future)

    def _meet(self, recipe: Recipe, build: _Build) -> None:
        """Find out before hours of work what would fail on the workers that are there; later ones are asked, too."""
        answers = self._client.run(_introduce, recipe, build, on_error="return")
        if not answers:
            self._tell(f"the scheduler has no worker yet, and waits for one: {_START}")
        mine = _last_bits()
        for address, answer in answers.items():
            if isinstance(answer, OSError):  # it has left
                continue
            if isinstance(answer, Exception):
                raise _explained(answer, f"worker {address}")
            if answer != mine:
                self._tell(
                    f"warning: worker {address}: it rounds otherwise than this machine (its processor, its NumPy, or "
                    "how many threads that takes); the figures' last digits may differ from those of one machine"
                )

    def _result(self, future: Any) -> Any:
        from distributed import KilledWorker

        try:
            return pickle.loads(future.result())
        except KilledWorker as error:
            raise BezelError(
                f"--scheduler {self._address}: {error.allowed_failures + 1} workers died of the same piece of work, "
                f"the last {error.last_worker.address}: was there too little memory? Start workers with: {_START}"
            ) from None
        except (CancelledError, OSError) as error:
            raise BezelError(
                f"--scheduler {self._address}: the scheduler is gone, or has dropped the work "
                f"({str(error).partition(chr(10))[0]}); once it is there, the same command goes on from what came back"
            ) from None
        except (ImportError, AttributeError, RuntimeError) as error:  # the last from the scheduler
            raise _explained(error, "the scheduler or a worker") from None


def _no_traceback(record: logging.LogRecord) -> bool:
    """dask writes one where the scheduler is gone, which is told as an error here."""
    return not record.exc_info


async def _ask(address: str) -> None:
    """Raises OSError, ValueError or TypeError if no scheduler answers."""
    from distributed import Security, rpc

    async with rpc(address, connection_args=Security().get_connection_args("client")) as asked:
        kind = (await asked.identity())["type"]
    if kind != "Scheduler":
        raise ValueError(f"found a {kind}")


def _explained(error: Exception, who: str) -> BezelError:
    """What a worker said; one that does not find this module's functions has another bezel, or none."""
    if isinstance(error, BezelError):
        return error
    return BezelError(f"{who}: cannot load what it is to do ({error!r}); install the same bezel-lm[cluster] there")


@dataclass(frozen=True)
class _Build:
    """Which bezel: its version and a hash of its sources. Of what is compiled, each machine has its own."""

    version: str
    sources: str

    @staticmethod
    @cache
    def here() -> _Build:
        return _Build(bezel_version(), code_hash((".py",))[:8])

    def __str__(self) -> str:
        return f"bezel {self.version}, sources {self.sources}"


@dataclass(frozen=True)
class _Errand:
    """What goes to a worker: little. What dask does not look into: an array of its messages lies at any address."""

    recipe: Recipe
    build: _Build
    item: bytes  # pickled


class _Opened(NamedTuple):
    recipe: Recipe
    times: list[int]
    work: Work[Any, Any]


_opened: list[_Opened] = []  # by this worker: the last only, for models are large


def _run(errand: _Errand) -> bytes:
    """On a worker: do the work with one item; its result, pickled. Raises BezelError, which names the worker."""
    from distributed import get_worker

    worker = get_worker()
    try:
        _check(worker, errand.build)
        return pickle.dumps(_work(errand.recipe)(pickle.loads(errand.item)))
    except MemoryError:
        raise BezelError(f"{_name(worker)}: not enough memory") from None
    except (BezelError, OSError) as error:
        raise BezelError(f"{_name(worker)}: {error}") from None


def _introduce(recipe: Recipe, build: _Build, dask_worker: Any) -> str:
    """On a worker: its `_last_bits`, if it can do the work. Raises BezelError, which names the worker."""
    try:
        _check(dask_worker, build)
        _times(recipe)
    except BezelError as error:
        raise BezelError(f"{_name(dask_worker)}: {error}") from None
    _use_cores(recipe.threads)
    return _last_bits()


def _check(worker: Any, build: _Build) -> None:
    mine = _Build.here()
    if mine != build:
        raise BezelError(f"found {mine}, expected {build}, which asks; install the same on both")
    if worker.state.nthreads != 1:
        raise BezelError(
            f"found {worker.state.nthreads} tasks at a time, expected one, which takes all cores; start it with: "
            f"{_START}"
        )


def _work(recipe: Recipe) -> Work[Any, Any]:
    """The work, made once for all items in turn: again if another is asked for, or if a file was written anew."""
    times = _times(recipe)
    if not _opened or _opened[0][:2] != (recipe, times):
        _opened.clear()  # first: two may not fit
        _use_cores(recipe.threads)
        _opened.append(_Opened(recipe, times, recipe.make(*recipe.args)))
    return _opened[0].work


def _times(recipe: Recipe) -> list[int]:
    """When each file was written. Raises BezelError if one is not there or has another size."""
    times = []
    for path, size in recipe.files.items():
        try:
            found = os.stat(path)
        except OSError as error:
            raise BezelError(f"{path}: {error.strerror}; share its folder, or copy it to the same path") from None
        if found.st_size != size:
            raise BezelError(f"{path}: found {found.st_size} bytes, expected {size}; copy it anew")
        times.append(found.st_mtime_ns)
    return times


def _use_cores(threads: int | None) -> None:
    """NumPy's BLAS takes `threads`, or all that this process may: dask starts workers with one."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threadpool_limits(threads or usable, "blas")


def _last_bits() -> str:
    """A hash of what NumPy gives for sums and functions whose last bits depend on the processor, the library and its
    threads."""
    x = np.random.default_rng(0).standard_normal((64, 2048), np.float32)
    wide = np.abs(x.astype(np.float64))
    digest = hashlib.sha256()
    for found in (x @ x.T, x[:1] @ x.T, np.exp(-wide), np.log(wide), wide.sum(axis=1)):
        digest.update(found.tobytes())
    return digest.hexdigest()


def _name(worker: Any) -> str:
    return f"worker {worker.address} on {socket.gethostname()}"
