"""The process that holds one model in one program, and answers what it is told with lines of JSON.

`python -m bezel.bench.speed.child PROGRAM OPTIONS`; `worker.Worker` is the other end. `rings.mjs` is the same in Node.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any

from ...runtime.errors import BezelError
from .graphs import GRAPH_MODULES, GRAPH_RUNNERS
from .peers import MODULES, RUNNERS
from .runner import BezelRunner, Runner

_PROGRAMS: dict[str, Callable[..., Runner]] = {"bezel": BezelRunner, **RUNNERS, **GRAPH_RUNNERS}
_MODULES = {"bezel": "onnxruntime", **MODULES, **GRAPH_MODULES}


def process_memory() -> dict[str, int | None]:
    """Bytes that this process holds in memory.

    `peak_bytes` is the most that it ever held. Now: `private_bytes` nobody else can use; `file_bytes` are pages of
    mapped files, which the system shares between processes and takes back when it needs room. Only Linux tells the
    last two.
    """
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            fields = dict(line.split(":", 1) for line in file)
        kib = {key: int(fields[key].split()[0]) for key in ("VmHWM", "RssAnon", "RssFile", "RssShmem")}
    except (OSError, KeyError):
        return {"peak_bytes": _peak_bytes(), "private_bytes": None, "file_bytes": None}
    return {
        "peak_bytes": kib["VmHWM"] << 10,
        "private_bytes": (kib["RssAnon"] + kib["RssShmem"]) << 10,
        "file_bytes": kib["RssFile"] << 10,
    }


def _peak_bytes() -> int | None:
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def _answer(runner: Runner, what: str, n: int) -> dict[str, Any]:
    ids = [(2 + 7919 * i) % runner.vocab_size for i in range(n)]
    start = time.perf_counter()
    if what == "prefill":
        runner.prefill(ids)
    elif what == "decode":
        for token in ids:
            runner.step(token)
    elif what == "see":
        return {"positions": runner.see(n), "seconds": time.perf_counter() - start}
    elif what == "reset":
        runner.reset()
    elif what == "memory":
        return {**process_memory(), "kv_bytes": runner.kv_bytes()}
    elif what == "about":
        return {"version": runner.version, "kv": runner.kv}
    seconds = time.perf_counter() - start
    if what == "decode":
        runner.rewind(n)
    return {"seconds": seconds}


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business, and it kills this process
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not look like an answer
    program, options = sys.argv[1], json.loads(sys.argv[2])
    with suppress(ImportError):  # the runner says what is missing
        import_module(_MODULES[program])  # which is no part of opening the model
    runner: Runner | None = None
    for line in sys.stdin:
        what, n = line.split()
        try:
            start = time.perf_counter()
            if runner is None:
                runner = _PROGRAMS[program](**options)
            opened = {"seconds": time.perf_counter() - start}
            answer = opened if what == "open" else _answer(runner, what, int(n))
        except Exception as error:
            known = isinstance(error, BezelError)
            answer = {"error": str(error) if known else f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    _main()
