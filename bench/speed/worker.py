"""A process that holds one model in one program, and does what it is told by lines of JSON.

Every program is measured in processes of its own: none counts another's memory, and when one crashes, the others go on.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Protocol

from ...runtime.errors import BezelError


class NotMeasured(BezelError):
    """A program that is not installed, refused the model, or crashed."""


class Runner(Protocol):
    """One sequence in some program. `vocab_size` bounds the ids; `kv` is how keys and values are stored."""

    vocab_size: int
    kv: str
    version: str

    def prefill(self, ids: Sequence[int]) -> None: ...

    def step(self, token: int) -> None: ...

    def rewind(self, n: int) -> None: ...

    def reset(self) -> None: ...

    def kv_bytes(self) -> int | None:
        """Bytes allocated for keys and values now, if the program tells."""


class BezelRunner:
    """bezel, through its Python interface."""

    def __init__(self, model: str, context: int, threads: int, engine: str, kv: str) -> None:
        from ...runtime import load
        from .machine import bezel_version

        self._session = load(model, engine=engine, context=context, kv=kv, threads=threads).session()
        self.vocab_size, self.kv, self.version = self._session.model.config.vocab_size, kv, bezel_version()

    def prefill(self, ids: Sequence[int]) -> None:
        self._session.prefill(ids)

    def step(self, token: int) -> None:
        self._session.step(token)

    def rewind(self, n: int) -> None:
        self._session.rewind(n)

    def reset(self) -> None:
        self._session.reset()

    def kv_bytes(self) -> int:
        return self._session.engine.cache_bytes


class Worker:
    """The other end: a process with a runner for `program` ("bezel" or a peer), made with `options`.

    Every method raises NotMeasured when the process failed. Times are seconds, taken inside the process.
    """

    def __init__(self, program: str, **options: Any) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, program, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def prefill(self, n: int) -> float:
        """Take n more tokens."""
        return float(self._ask("prefill", n)["seconds"])

    def decode(self, n: int) -> float:
        """Take n tokens one by one, and forget them again; the time of the steps only."""
        return float(self._ask("decode", n)["seconds"])

    def reset(self) -> None:
        self._ask("reset")

    def about(self) -> dict[str, Any]:
        """The program's version, and how it stores keys and values."""
        return self._ask("about")

    def memory(self) -> dict[str, int | None]:
        """`process_memory` of the process, and `kv_bytes`."""
        return self._ask("memory")

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, what: str, n: int = 0) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None  # both are pipes
        assert stdout is not None
        try:
            stdin.write(f"{what} {n}\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise NotMeasured(f"the process {self._how_it_ended()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise NotMeasured(answer["error"])
        return answer

    def _how_it_ended(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        last = self._errors.read().decode(errors="replace").strip().rpartition("\n")[2]
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        return f"{how}: {last}" if last else how


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


def _make(program: str, options: dict[str, Any]) -> Runner:
    if program == "bezel":
        return BezelRunner(**options)
    from .peers import RUNNERS

    return RUNNERS[program](**options)


def _answer(runner: Runner, what: str, n: int) -> dict[str, Any]:
    ids = [(2 + 7919 * i) % runner.vocab_size for i in range(n)]
    start = time.perf_counter()
    if what == "prefill":
        runner.prefill(ids)
    elif what == "decode":
        for token in ids:
            runner.step(token)
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
    runner: Runner | None = None
    for line in sys.stdin:
        what, n = line.split()
        try:
            if runner is None:
                runner = _make(sys.argv[1], json.loads(sys.argv[2]))
            answer = _answer(runner, what, int(n))
        except Exception as error:
            known = isinstance(error, BezelError)
            answer = {"error": str(error) if known else f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    _main()
