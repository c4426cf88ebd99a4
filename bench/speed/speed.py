"""Speed and memory of one model file in bezel and in other programs, measured alternately."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Protocol

from ...runtime.cache.numpy_store import NumpyStore
from ...runtime.files.model_file import ModelFile
from ...runtime.model.config import ModelConfig
from ...runtime.model.tensors import tensor_specs
from .runner import NotMeasured

PREFILL = (128, 512, 4096, 7000, 16000, 29000)  # lengths of prompts
DECODE = (16, 128, 512, 2048, 4200, 7000, 16000, 29000)  # tokens held; 4200 is past Gemma 2's window
# Each walk fills an empty sequence and stops at these lengths to measure. The short ones are walked in every round,
# the long one once, because peers take minutes for it, with the turns of all rounds at each stop. Its stops are whole
# chunks as far as can be, so that what is taken in between costs what one long prompt costs.
SHORT_WALKS = ((16,), (128,), (512,))
LONG_WALK = (2048, 4096, 4200, 7000, 16000, 29000)
FIRST_TOKEN_PROMPT = 128
STEPS = 8  # tokens in a turn of decoding
TURNS = 3  # turns at each stop, a round
PAUSE = 0.1  # seconds before each: the threads of whoever was at work spin for a while before they sleep


class Target(Protocol):
    """What is measured; `worker.Worker` describes the methods."""

    def prefill(self, n: int) -> float: ...
    def decode(self, n: int) -> float: ...
    def reset(self) -> None: ...
    def about(self) -> dict[str, Any]: ...
    def memory(self) -> dict[str, int | None]: ...
    def close(self) -> None: ...


@dataclass
class Samples:
    """What one program took. Entry i of every program's lists was measured in the same turn."""

    prefill: dict[int, list[float]] = field(default_factory=dict)  # length of the prompt → seconds for all of it
    decode: dict[int, list[float]] = field(default_factory=dict)  # tokens held → seconds a token
    first_token: list[float] = field(default_factory=list)  # seconds from the start of the process
    memory: dict[str, int | None] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    failure: str | None = None  # why there is no more


class Race:
    """Measures what `starts` starts, by name, one after the other at every step; `run` does it all.

    Each holds up to `context` tokens; stops beyond it are left out. `probe` is called now and then while nobody
    is at work, `progress` with a line to show. A program that fails says why in its samples and is asked no more;
    if it is the first, `run` raises its NotMeasured.
    """

    def __init__(
        self,
        starts: Mapping[str, Callable[[], Target]],
        context: int,
        *,
        probe: Callable[[], None] = lambda: None,
        progress: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.samples = {name: Samples() for name in starts}
        self._starts, self._context = starts, context
        self._probe, self._progress, self._clock, self._sleep = probe, progress, clock, sleep
        self._targets: dict[str, Target] = {}
        self._position = 0

    def run(self, repeats: int) -> dict[str, Samples]:
        try:
            for i in range(repeats if self._context >= FIRST_TOKEN_PROMPT else 0):
                self._each(f"first token, {i + 1} of {repeats}", self._first_token)
            self._each("start", self._start)
            for i in range(repeats):
                for walk in SHORT_WALKS:
                    self._probe()
                    self._walk(walk, TURNS, f"round {i + 1} of {repeats}")
            self._probe()
            self._walk(LONG_WALK, TURNS * repeats, "long prompt")
            self._probe()
            self._each(f"filling the context of {self._context}", self._fill)
        finally:
            for target in self._targets.values():
                target.close()
        return self.samples

    def _each(self, what: str, use: Callable[[str], None]) -> None:
        for name, samples in self.samples.items():
            if samples.failure is None:
                self._progress(f"{name}: {what}")
                self._sleep(PAUSE)
                try:
                    use(name)
                except NotMeasured as error:
                    if name == next(iter(self.samples)):
                        raise
                    samples.failure = str(error)

    def _first_token(self, name: str) -> None:
        start = self._clock()
        target = self._starts[name]()
        try:
            target.prefill(FIRST_TOKEN_PROMPT)
            self.samples[name].first_token.append(self._clock() - start)
        finally:
            target.close()

    def _start(self, name: str) -> None:
        self._targets[name] = target = self._starts[name]()
        self.samples[name].about = target.about()
        target.prefill(STEPS)  # every weight is touched once before anything is timed
        target.decode(STEPS)

    def _walk(self, walk: Sequence[int], turns: int, what: str) -> None:
        stops = [stop for stop in walk if stop <= self._context]
        if not stops:
            return
        seconds = dict.fromkeys(self.samples, 0.0)
        self._each(what, lambda name: self._targets[name].reset())
        self._position = 0
        for stop in stops:
            more = stop - self._position

            def prefill(name: str, stop: int = stop, more: int = more) -> None:
                seconds[name] += self._targets[name].prefill(more)
                if stop in PREFILL:
                    self.samples[name].prefill.setdefault(stop, []).append(seconds[name])

            def decode(name: str, stop: int = stop) -> None:
                each = self._targets[name].decode(STEPS) / STEPS
                self.samples[name].decode.setdefault(stop, []).append(each)

            self._each(f"{what}, prompt up to {stop}", prefill)
            self._position = stop
            if stop in DECODE and stop + STEPS <= self._context:
                for _ in range(turns):
                    self._each(f"{what}, decoding at {stop}", decode)

    def _fill(self, name: str) -> None:
        if self._position < self._context:
            self._targets[name].prefill(self._context - self._position)
        self.samples[name].memory = self._targets[name].memory()


@dataclass(frozen=True)
class TokenCost:
    """What a token costs at least: what must be read for it, and what must be computed."""

    config: ModelConfig
    weight_bytes: int  # all that decoding a token reads
    matrix_weights: int  # that every token of a prompt is multiplied by

    @classmethod
    def of(cls, file: ModelFile) -> TokenCost:
        config = file.config()
        read = [info.nbytes for name, info in file.tensors.items() if config.tied_head or name != "token_embd.weight"]
        in_layers = [spec for spec in tensor_specs(config) if spec.layer is not None and spec.is_matrix]
        return cls(config, sum(read), sum(math.prod(spec.shape) for spec in in_layers))

    def decode_bytes(self, held: int, kv: str) -> int:
        """Bytes that one token reads with `held` tokens before it: the weights, and the keys and values it sees."""
        rows = (
            NumpyStore.bytes_for(layer.n_kv_heads, layer.head_dim, seen, kv, seen)
            for layer in self.config.layers
            for seen in [min(held, layer.window or held)]
        )
        return self.weight_bytes + sum(rows)

    def prefill_ops(self, tokens: int) -> int:
        """Integer operations, two a multiply-add; without the head, which only the last token needs."""
        return 2 * self.matrix_weights * tokens


def figures(samples: Samples, cost: TokenCost, bandwidth: float, int8_peak: float) -> dict[str, Any]:
    """Medians with their units in the names, ready for JSON; the shares are of `bandwidth` and of `int8_peak`."""
    if samples.failure is not None:
        return {"not_measured": samples.failure}
    prefill = {n: n / median(seconds) for n, seconds in samples.prefill.items()}
    decode = {n: 1 / median(seconds) for n, seconds in samples.decode.items()}
    kv = samples.about["kv"]
    return {
        **samples.about,
        "prefill_tokens_per_s": prefill,
        "prefill_share_of_int8_peak": {n: cost.prefill_ops(1) * speed / int8_peak for n, speed in prefill.items()},
        "decode_tokens_per_s": decode,
        "decode_share_of_bandwidth": {n: cost.decode_bytes(n, kv) * v / bandwidth for n, v in decode.items()},
        "first_token_s": median(samples.first_token) if samples.first_token else None,
        **samples.memory,
    }


@dataclass(frozen=True)
class TimesAsFast:
    """A peer at one point, in the faster of its settings: how many times as fast as that bezel is."""

    setting: str
    times_as_fast: float


def compare(ours: list[float], theirs: Mapping[str, list[float]]) -> TimesAsFast | None:
    """Seconds of bezel against those of a peer's settings: the median of the ratios, turn by turn.

    What slows the machine down for a while slows down both sides of a ratio. None where a side has no samples.
    """
    measured = {setting: seconds for setting, seconds in theirs.items() if seconds}
    if not ours or not measured:
        return None
    setting, seconds = min(measured.items(), key=lambda item: median(item[1]))
    return TimesAsFast(setting, median([b / a for a, b in zip(ours, seconds, strict=True)]))


def comparisons(ours: Samples, theirs: Mapping[str, Samples]) -> dict[str, Any]:
    """`compare` at every point as dictionaries: "prefill" and "decode" by length, and "first_token"."""
    usable = {setting: samples for setting, samples in theirs.items() if samples.failure is None}

    def at(seconds: Callable[[Samples], list[float]]) -> dict[str, Any] | None:
        found = compare(seconds(ours), {setting: seconds(samples) for setting, samples in usable.items()})
        return asdict(found) if found else None

    return {
        "prefill": {n: at(lambda samples, n=n: samples.prefill.get(n, [])) for n in ours.prefill},  # type: ignore[misc]
        "decode": {n: at(lambda samples, n=n: samples.decode.get(n, [])) for n in ours.decode},  # type: ignore[misc]
        "first_token": at(lambda samples: samples.first_token),
    }
