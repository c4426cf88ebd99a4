"""A process that holds one model in one program, from outside.

Every program is measured in processes of its own: none counts another's memory, and when one crashes, the others go on.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from .runner import NotMeasured


def in_python(python: str) -> list[str]:
    """What starts a child in an environment that has bezel, by the path of its Python."""
    return [python, "-m", f"{__package__}.child"]


class Worker:
    """A process with a runner for `program` ("bezel" or another), made with `options`.

    `command` starts one; by default the module `child` in this Python. Every method raises NotMeasured when the process
    failed. Times are seconds, taken inside the process.
    """

    def __init__(self, program: str, command: Sequence[str] = (), /, **options: Any) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self._process = subprocess.Popen(
            [*(command or in_python(sys.executable)), program, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def open(self) -> float:
        """Open the model, which otherwise the first method does that needs it; without the imports before."""
        return float(self._ask("open")["seconds"])

    def prefill(self, n: int) -> float:
        """Take n more tokens."""
        return float(self._ask("prefill", n)["seconds"])

    def decode(self, n: int) -> float:
        """Take n tokens one by one, and forget them again; the time of the steps only."""
        return float(self._ask("decode", n)["seconds"])

    def see(self, seed: int) -> tuple[float, int]:
        """Take a picture up to the first token behind it, and forget it again; how many positions it took, too."""
        found = self._ask("see", seed)
        self._ask("reset")
        return float(found["seconds"]), int(found["positions"])

    def reset(self) -> None:
        self._ask("reset")

    def about(self) -> dict[str, Any]:
        """The program's version, and how it stores keys and values."""
        return self._ask("about")

    def memory(self) -> dict[str, int | None]:
        """`child.process_memory` of the process, and `kv_bytes`."""
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
