"""SHA-256 of files, while something else goes on."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def background_hashes(files: Sequence[Path]) -> Iterator[Callable[[], list[str]]]:
    """SHA-256 of each file, computed by a thread of its own; what is yielded waits for them."""
    stop = threading.Event()

    def sha256(path: Path) -> str:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while not stop.is_set() and (block := file.read(1 << 20)):
                digest.update(block)
        return digest.hexdigest()

    pool = ThreadPoolExecutor(1)
    futures = [pool.submit(sha256, file) for file in files]
    try:
        yield lambda: [future.result() for future in futures]
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
