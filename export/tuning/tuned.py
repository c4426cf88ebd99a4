"""Blocks for the writer that were rounded for a text, then tuned on more of it: Adam on the divergence, end to end."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...quant import lattice
from ...quant.formats import Format
from ...runtime.arrays import Arrays
from ...runtime.errors import InvalidRequest
from ...runtime.files.memory import available_memory, give_back_at_once
from ...runtime.model.tensors import TensorSpec
from ..calibration.moments import CalibrationText
from ..calibration.noting import site_of
from ..calibration.sweep import Sweep
from ..gguf.writer import Calibrated
from ..kept import KeptWork
from ..metadata import TUNED
from ..sources.checkpoint import Checkpoint
from .student import Student, can_move
from .targets import LIKELIEST, TOGETHER, Targets, exact_weights, passing_to_targets
from .torch_model import quick_precision

BATCH = 6  # sequences in a step
RATES = {"place": 0.003, "factors": 0.003, "norm": 0.003}  # of codes, scales and norms, where the schedule is highest
# Each scale and norm moves many weights at once, so that in a larger model all of them together go too far: with more
# weights in the layers than these, their rates fall as the root of the number does.
_SMALL, _SCALED = 3.2e6, ("factors", "norm")
_BETAS = 0.9, 0.999
_TINY = 1e-12  # gradients of one code are small, and their size says nothing
_WARM_UP = 0.05  # of the steps
_PASSES = 3  # through the layers in a step: forwards, and twice as long backwards
# Of the work of the steps, that the exact model may take at most: fresh text serves better than text read again.
_TARGET_SHARE = 1 / 2
_STREAM_NUMBERS = 1 << 27  # of residual streams that are in memory while the exact model answers
_KEEP_SECONDS = 300.0  # between states that an interrupted run goes on from
# Bytes of memory for each weight in blocks, and of an exact embedding that is read; of the layers, where codes move and
# where they do not; and of the matrix at hand. Of activations and scores how many copies there are.
_BLOCKS_BYTES, _READ_BYTES, _CODES_BYTES, _SCALES_BYTES, _MATRIX_BYTES = 0.6, 4.8, 18, 1.1, 24
_COPIES, _OTHER_BYTES = 6, 500_000_000
_STATE = 1 << 20  # its number among what is kept, where the targets have those of layers


class Tuned:
    """What `begun` rounded, tuned in so many steps on sequences of `text`, which takes torch.

    A state is kept every few minutes. With as many threads an interrupted tuning comes to the same blocks as one that
    was not.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        begun: Calibrated,
        text: CalibrationText,
        formats: Mapping[str, type[Format]],
        kept: KeptWork,
        steps: int,
        codes: bool,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """`codes` are tuned as well as scales and norms. `progress` is called with (done, in all), in products of a
        weight and a token.
        """
        self._checkpoint, self._begun, self._text, self._formats = checkpoint, begun, text, formats
        self._kept, self._steps, self._codes, self._progress = kept, steps, codes, progress
        self.method = f"{begun.method}, then {steps} {TUNED}" + ("" if codes else " scales and norms")
        self.text_sha256, self.tokens = text.sha256, max(begun.tokens, text.tokens)
        self._found: dict[str, NDArray[np.uint8]] | None = None
        self.divergence = math.nan, math.nan  # before and after, on one step's sequences
        self._hold = memory_for(checkpoint, text, codes, hold=True) <= (available_memory() or 0)
        if not self._hold:
            give_back_at_once()  # also in the calibration, which runs when its blocks are asked for

    @staticmethod
    def key(
        checkpoint: Checkpoint, begun: Mapping[str, object], steps: int, codes: bool, text: CalibrationText
    ) -> dict[str, object]:
        """All that the blocks depend on, where those before depend on `begun`."""
        own = {"steps": steps, "codes": codes, "tuning_tokens": text.tokens, "rates": rates_for(checkpoint)}
        return {**begun, "tuning": 8, **own, "batch": BATCH}

    @staticmethod
    def tokens_for(checkpoint: Checkpoint, steps: int, length: int) -> int:
        """How many of a text so many steps can make use of."""
        layers, everything = _weights(checkpoint)
        taken, held = steps * BATCH * length, _STREAM_NUMBERS // checkpoint.config.hidden_size
        return min(taken, held, max(BATCH * length, int(taken * _TARGET_SHARE * _PASSES * layers / everything)))

    @staticmethod
    def products(checkpoint: Checkpoint, text: CalibrationText, steps: int) -> int:
        """Of a weight and a token, in so many steps and before them."""
        layers, everything = _weights(checkpoint)
        return text.tokens * everything + steps * BATCH * len(text.sequences[0]) * _PASSES * layers

    def blocks(self, spec: TensorSpec) -> NDArray[np.uint8] | None:
        if self._found is None:
            self._found = self._tune()
        return self._found[spec.gguf]

    def _rounded(self, spec: TensorSpec) -> NDArray[np.uint8]:
        blocks, form = self._begun.blocks(spec), self._formats[spec.gguf]
        return self._checkpoint.blocks(spec, 0, math.prod(spec.shape[:-1]), form) if blocks is None else blocks

    def _tune(self) -> dict[str, NDArray[np.uint8]]:
        rounded = {spec.gguf: self._rounded(spec) for spec in self._checkpoint.specs}
        ids = torch.from_numpy(np.stack(self._text.sequences))
        layers, _ = _weights(self._checkpoint)
        done, total = 0, self.products(self._checkpoint, self._text, self._steps)

        def tell(more: int) -> None:
            nonlocal done
            done += more
            if self._progress:
                self._progress(done, total)

        wanted = self._targets(ids, tell)
        student = Student(
            self._checkpoint.config,
            self._checkpoint.tensor,
            lambda spec: (self._formats[spec.gguf], rounded[spec.gguf]),
            quick_precision(),
            self._codes,
            self._hold,
        )
        descent = Descent(student, self._steps, rates_for(self._checkpoint))
        state = self._kept.load(_STATE)
        if state is not None:
            descent.restore(state)
        saved, one = time.monotonic(), BATCH * ids.shape[1] * _PASSES * layers
        total -= one * descent.step
        try:
            for chosen in islice(_order(len(ids), self._steps), descent.step, None):
                descent.take(ids[chosen], wanted[chosen])
                tell(one)
                if time.monotonic() - saved > _KEEP_SECONDS:
                    self._kept.save(_STATE, descent.state())
                    saved = time.monotonic()
        except (KeyboardInterrupt, SystemExit):  # SIGTERM, a terminal that is closed
            if descent.step and descent.whole:
                self._kept.save(_STATE, descent.state())
            raise
        first = next(_order(len(ids), 1))
        self.divergence = descent.before, student.divergence(ids[first], wanted[first])
        if self.divergence[1] < self.divergence[0]:
            rounded |= {name: weight.blocks() for name, weight in student.moving.items()}
        return rounded

    def _targets(self, ids: Tensor, progress: Callable[[int], None]) -> Targets:
        """`progress` is called with the products of each layer, and of the head."""
        config = self._checkpoint.config
        passing = partial(passing_to_targets, config, exact_weights(self._checkpoint), ids)
        sweep, (layers, everything) = Sweep(self._kept, passing, config.n_layers), _weights(self._checkpoint)
        for i in range(config.n_layers):
            found = sweep.layer(i)
            progress(ids.numel() * layers // config.n_layers)
        progress(ids.numel() * everything - ids.numel() * layers // config.n_layers * config.n_layers)
        return Targets.restored(found)


class Descent:
    """Adam on a student's divergence, with rates that rise for a while and then fall to nothing along a cosine."""

    def __init__(self, student: Student, steps: int, rates: Mapping[str, float] = RATES) -> None:
        self._student, self._steps, self._rates, self.step = student, steps, rates, 0
        self.before = math.nan  # the divergence that the first step found
        self.whole = True  # no step is half done
        self._groups = {kind: list(student.parameters(kind)) for kind in rates}
        groups = [{"params": found, "lr": 0.0} for found in self._groups.values()]
        self._adam = torch.optim.Adam(groups, betas=_BETAS, eps=_TINY)

    def take(self, ids: Tensor, wanted: Targets) -> float:
        """A step on sequences (n, length), from what the divergence was, which comes back."""
        for group, rate in zip(self._adam.param_groups, self._rates.values(), strict=True):
            group["lr"] = rate * self._height()
        self._adam.zero_grad(set_to_none=True)
        divergence = self._student.divergence(ids, wanted)
        self.whole = False
        self._adam.step()
        if not self.step:
            self.before = divergence
        self.step += 1
        self.whole = True
        return divergence

    def _height(self) -> float:
        warm_up = max(1, round(_WARM_UP * self._steps))
        if self.step < warm_up:
            return (self.step + 1) / warm_up
        return 0.5 * (1 + math.cos(math.pi * (self.step - warm_up) / max(1, self._steps - warm_up)))

    def state(self) -> Arrays:
        found = {"step": np.array(self.step), "before": np.array(self.before)}
        for i, (p, kept) in enumerate(self._numbers()):
            found |= {f"{i}.{name}": tensor.detach().numpy() for name, tensor in {"value": p, **kept}.items()}
        return found

    def restore(self, state: Arrays) -> None:
        self.step, self.before = int(state["step"]), float(state["before"])
        for i, (p, kept) in enumerate(self._numbers()):
            p.detach().copy_(torch.from_numpy(state[f"{i}.value"]))
            kept |= {name: torch.from_numpy(state[f"{i}.{name}"]) for name in ("step", "exp_avg", "exp_avg_sq")}

    def _numbers(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Each parameter, and what Adam knows of it."""
        for found in self._groups.values():
            yield from ((p, self._adam.state[p]) for p in found)


def _order(n: int, steps: int) -> Iterator[list[int]]:
    """Which of n sequences each step takes: all before any again."""
    random, left = np.random.default_rng(0), list[int]()
    for _ in range(steps):
        while len(left) < BATCH:
            left += random.permutation(n).tolist()
        yield left[:BATCH]
        left = left[BATCH:]


def rates_for(checkpoint: Checkpoint) -> dict[str, float]:
    """`RATES`, lower where the layers have more weights."""
    less = min(1.0, math.sqrt(_SMALL / _weights(checkpoint)[0]))
    return {kind: rate * less if kind in _SCALED else rate for kind, rate in RATES.items()}


def _weights(checkpoint: Checkpoint) -> tuple[int, int]:
    """How many weights the matrices of the layers have, and how many all have that a token is multiplied with."""
    sizes = [(spec, math.prod(spec.shape)) for spec in checkpoint.specs if site_of(spec, checkpoint.config)]
    return sum(n for spec, n in sizes if spec.layer is not None), sum(n for _, n in sizes)


def check_tunable(
    checkpoint: Checkpoint, formats: Mapping[str, type[Format]], text: CalibrationText, codes: bool
) -> None:
    """Raises InvalidRequest where nothing would move, and where tuning takes more memory than there is."""
    moving = [(spec, formats[spec.gguf]) for spec in checkpoint.specs if can_move(spec, formats[spec.gguf])]
    if not moving:
        raise InvalidRequest(
            f"{checkpoint.path}: no matrix is to be in blocks: nothing is to be tuned; leave --tune out"
        )
    need, free = memory_for(checkpoint, text, codes), available_memory()
    if free is not None and need > free:
        less = "" if not codes else f"--tune-scales takes {memory_for(checkpoint, text, False) / 1e9:.1f} GB, or "
        raise InvalidRequest(
            f"{checkpoint.path}: tuning takes about {need / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free; "
            f"{less}leave --tune out"
        )
    if all(lattice.quantized(form, checkpoint.tensor(spec)) is not None for spec, form in moving):
        raise InvalidRequest(
            f"{checkpoint.path}: every matrix is kept exactly: nothing is to be tuned; leave --tune out"
        )


def memory_for(checkpoint: Checkpoint, text: CalibrationText, codes: bool, hold: bool = False) -> int:
    """Bytes that tuning takes, about, where codes move or do not, and all layers' work is held or one's."""
    config, length = checkpoint.config, len(text.sequences[0])
    layers, shared, matrices = defaultdict[int, int](int), 0, [0]
    for spec in checkpoint.specs:
        if spec.layer is None:
            shared += math.prod(spec.shape)
        else:
            layers[spec.layer] += math.prod(spec.shape)
            matrices.append(math.prod(spec.shape))
    largest, widest = max(layers.values()), max(x.intermediate_size + length * x.n_heads for x in config.layers)
    stream, active = 4 * config.hidden_size, 4 * _COPIES * widest * length  # bytes a token, and of a sequence
    weights = sum(layers.values())
    answers = _BLOCKS_BYTES * weights + _READ_BYTES * shared + 4 * largest
    answers += stream * text.tokens + TOGETHER * active // 3
    at_once = (8 * largest + BATCH * active) * config.n_layers if hold else 8 * largest + TOGETHER * active
    steps = (_CODES_BYTES if codes else _SCALES_BYTES) * weights + at_once
    steps += stream * BATCH * length * config.n_layers + _MATRIX_BYTES * max(matrices)
    both = _OTHER_BYTES + _BLOCKS_BYTES * shared + 8 * LIKELIEST * text.tokens
    return int(both + max(answers, steps))
