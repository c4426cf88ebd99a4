"""The Python interface: load a file, generate text, or go token by token in a session that can be saved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .arrays import Floats
from .cache.caches import default_chunk
from .cache.store import KV_TYPES
from .engines.protocol import Backend, Engine
from .errors import CacheError, ContextFull, InvalidModelFile, InvalidRequest, InvalidSession
from .files.atomic import replacing
from .files.gguf import GGUFFile
from .files.model_file import ModelFile, open_model
from .files.onnx_folder import KV_STORAGE, OnnxFolder
from .model.config import ModelConfig
from .text import chat
from .text.generation import Generation, MakeRoom
from .text.sampling import Sampling
from .text.tokenizer import Tokenizer

ENGINES = ("native", "ort", "reference")
ACTIVATIONS = ("int8", "f32")


def load(
    path: str | Path,
    engine: str | None = None,
    context: int | None = None,
    kv: str | None = None,
    threads: int | None = None,
    activations: str = "int8",
) -> Model:
    """Open a Gemma model: a GGUF file, or a folder that `bezel export --format onnx` wrote.

    `engine` "native" computes on the C++ kernels and "ort" on onnxruntime, each the default for its kind of file;
    "reference" runs both on NumPy in float32. `context` is the most tokens that a session may hold (default: all that
    the model was made for); memory grows only as a session fills. `kv` is how keys and values are stored: "f32", "f16"
    (the default) or "int8"; for "ort" that was settled at the export. `threads` None takes the performance cores, for
    "reference" all. `activations` "int8" rounds what is multiplied with quantized weights to 8 bits, as is fast; "f32"
    does not, for measuring (the reference engine never does). Raises InvalidModelFile, InvalidConfig or InvalidRequest.
    """
    choices = (
        ("engine", engine, (None, *ENGINES)),
        ("activations", activations, ACTIVATIONS),
    )
    for name, value, known in choices:
        if value not in known:
            raise InvalidRequest(f"{name}: found {value!r}, expected one of {', '.join(filter(None, known))}")
    if threads is not None and threads < 1:
        raise InvalidRequest(f"threads: found {threads}, expected at least 1")
    file = open_model(path)
    if engine is not None and engine not in file.engines:
        raise InvalidRequest(f"engine: found {engine!r}, expected {' or '.join(file.engines)}: {path} is {file.kind}")
    engine = engine or file.engines[0]
    own = default_kv(file, engine)
    if engine == "ort":
        if kv is not None and KV_STORAGE.get(kv, kv) != own:
            raise InvalidRequest(f"kv: found {kv!r}, expected {own!r}, which {path} was exported with")
        kv = own
    elif kv not in (None, *KV_TYPES):
        raise InvalidRequest(f"kv: found {kv!r}, expected one of {', '.join(KV_TYPES)}")
    return Model(file, engine, context, kv or own, threads, activations == "f32")


def default_kv(file: ModelFile, engine: str) -> str:
    """How an engine stores keys and values unless it is told otherwise: an ONNX graph has its own way."""
    return file.kv if engine == "ort" and isinstance(file, OnnxFolder) else "f16"


class Model:
    """A loaded model; its weights are shared by any number of sessions. Made by `load`."""

    def __init__(
        self, file: GGUFFile | OnnxFolder, engine: str, context: int | None, kv: str, threads: int | None, exact: bool
    ) -> None:
        self.file: ModelFile = file
        self.kv = kv
        self.engine = f"{engine} with float32 activations" if exact else engine
        self.config = file.config()
        file.check_tensors(self.config)
        self.context = self.config.context_length if context is None else context
        if not 1 <= self.context <= self.config.context_length:
            raise InvalidRequest(
                f"context: found {context}, expected 1 to {self.config.context_length}, what {file.path} was made for"
            )
        self.tokenizer = Tokenizer(file.vocabulary(), str(file.path))
        if self.tokenizer.vocab_size != self.config.vocab_size:
            raise InvalidModelFile(
                file.path,
                f"{self.tokenizer.vocab_size} tokens, but {self.config.vocab_size} rows in 'token_embd.weight'",
            )
        self.stop_ids = self.tokenizer.stop_ids | _stored_stop_ids(file, self.config.vocab_size)
        self.backend = _backend(engine, file, self.config, threads, exact)

    @property
    def name(self) -> str:
        """What the file calls itself, or its file name."""
        name = self.file.metadata.get("general.name")
        return name if isinstance(name, str) and name else self.file.path.stem

    @property
    def default_sampling(self) -> Sampling:
        """Sampling as the file's generation config has it; bezel's defaults for the rest."""
        keys = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
        stored = {name: self.file.metadata.get(f"general.sampling.{key}") for name, key in keys.items()}
        usable: dict[str, Any] = {name: value for name, value in stored.items() if isinstance(value, (int, float))}
        return Sampling(**usable)

    @property
    def chat_template(self) -> str | None:
        """The template that the file carries. bezel never runs it; see `chat.template_is_known`."""
        template = self.file.metadata.get("tokenizer.chat_template")
        return template if isinstance(template, str) else None

    @property
    def is_chat_model(self) -> bool:
        """Whether the file has a chat template and its vocabulary the turn markers that Gemma's chats need."""
        return self.chat_template is not None and None not in (
            self.tokenizer.start_of_turn_id,
            self.tokenizer.end_of_turn_id,
        )

    def session(self) -> Session:
        """A new, empty sequence."""
        return Session(self)

    def logits(self, ids: Sequence[int]) -> Floats:
        """Logits float32 (len(ids), vocab) of every position of a fresh sequence."""
        return self.session().logits(ids)

    def prompt_ids(self, prompt: str | Sequence[int] | Sequence[chat.Message], raw: bool | None = None) -> list[int]:
        """What the model sees of a prompt: ids as they are, messages as a chat, text as one turn of a chat.

        `raw` text is continued instead, after <bos>; None means raw only where the file is no chat model.
        """
        if isinstance(prompt, str):
            if raw or (raw is None and not self.is_chat_model):
                return self.tokenizer.encode(prompt, bos=True)
            prompt = [chat.Message("user", prompt)]
        messages = [m for m in prompt if isinstance(m, chat.Message)]
        if messages:
            return chat.render(self.tokenizer, messages)
        return [int(i) for i in prompt if not isinstance(i, chat.Message)]

    def generate(
        self,
        prompt: str | Sequence[int] | Sequence[chat.Message],
        *,
        max_tokens: int | None = None,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        raw: bool | None = None,
        cancel: Callable[[], bool] = lambda: False,
    ) -> Generation:
        """Text after a prompt (see `prompt_ids`), as an iterable of pieces in a session of its own.

        Ends at a stop token, a `stop` string (left out of the text), after `max_tokens`, or when `cancel` returns
        True. Raises ContextFull, while iterating, when no position is left.
        """
        ids = self.prompt_ids(prompt, raw)
        return Generation(self.session(), ids, sampling or Sampling(), max_tokens=max_tokens, stop=stop, cancel=cancel)


class Session:
    """One sequence of tokens going through a model; `ids` are the tokens that it holds.

    With `ring` False the local layers keep every position too: more memory, the same bits.
    """

    def __init__(self, model: Model, *, ring: bool = True) -> None:
        self.model, self._ring = model, ring
        self.ids: list[int] = []
        self.engine: Engine = self._new_engine()

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
        for start, part in self.chunks(checked):
            out[start : start + len(part)] = self.engine.forward(part, len(part))
            self.ids += part.tolist()
        return out

    def step(self, token: int) -> Floats:
        """Take one token; logits float32 (vocab,)."""
        return self.prefill([token])

    def feed(
        self, ids: Sequence[int], make_room: MakeRoom | None = None, cancel: Callable[[], bool] = lambda: False
    ) -> Floats | None:
        """`prefill` that asks `make_room` for shorter ids when the context is full, and that can be cancelled.

        `cancel` is asked before every chunk; None comes back if it stopped there. What was taken stays taken.
        """
        if make_room and self.position + len(ids) > self.model.context:
            ids = make_room([*self.ids, *ids])
            self.reset()
        checked = self.check(ids)
        logits: Floats = np.empty((0, 0), np.float32)
        for start, part in self.chunks(checked):
            if cancel():
                return None
            logits = self.engine.forward(part, int(start + len(part) == len(checked)))
            self.ids += part.tolist()
        last: Floats = logits[0]
        return last

    def check(self, ids: Sequence[int]) -> npt.NDArray[np.int64]:
        """The ids as an array. Raises InvalidRequest for none or foreign ones, ContextFull for too many."""
        array = np.asarray(ids)
        vocab_size = self.model.config.vocab_size
        if array.ndim != 1 or not len(array) or array.dtype.kind not in "iu":
            raise InvalidRequest(f"token ids: found {array.dtype} {array.shape}, expected one or more integers")
        if array.min() < 0 or array.max() >= vocab_size:
            raise InvalidRequest(f"token ids: found {array.min()} to {array.max()}, expected 0 to {vocab_size - 1}")
        left = self.model.context - self.position
        if len(array) > left:
            raise ContextFull(
                f"{len(array)} more tokens do not fit: the context of {self.model.context} has {left} positions left"
            )
        return array.astype(np.int64)

    def chunks(self, ids: npt.NDArray[np.int64]) -> Iterable[tuple[int, npt.NDArray[np.int64]]]:
        """The ids in pieces that the engine takes at once, each with its index."""
        return ((i, ids[i : i + self.engine.chunk]) for i in range(0, len(ids), self.engine.chunk))

    def rewind(self, n: int) -> None:
        """Forget the n newest tokens. Raises CacheError when a ring no longer holds what comes before them."""
        self.engine.rewind(n)
        del self.ids[len(self.ids) - n :]

    def go_to(self, ids: Sequence[int]) -> None:
        """Hold these ids, reusing the common beginning as far as the caches allow."""
        common = next((i for i, (a, b) in enumerate(zip(self.ids, ids, strict=False)) if a != b), None)
        common = min(len(self.ids), len(ids)) if common is None else common
        try:
            self.rewind(len(self.ids) - common)
        except CacheError:
            self.reset()
            common = 0
        if ids[common:]:
            self.prefill(ids[common:])

    def reset(self) -> None:
        """Forget everything."""
        self.engine = self._new_engine()
        self.ids = []

    def save(self, path: str | Path) -> None:
        """Write the session to a file; whole or not at all."""
        from safetensors.numpy import save_file

        arrays = {**self.engine.snapshot(), "ids": np.array(self.ids, np.int64)}
        with replacing(Path(path)) as part:
            save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, part, self._identity())

    def restore(self, path: str | Path) -> None:
        """Go on from a saved session, as if nothing had happened. Raises InvalidSession, changing nothing."""
        identity, arrays = _read_session(Path(path))
        for key, want in self._identity().items():
            if identity.get(key) != want:
                raise InvalidSession(f"{path}: saved with {key} {identity.get(key)}, expected {want}")
        ids = arrays.pop("ids", np.empty((0, 0)))
        vocab_size = self.model.config.vocab_size
        if ids.ndim != 1 or ids.dtype != np.int64 or len(ids) > self.model.context:
            raise InvalidSession(
                f"{path}: 'ids': found {ids.dtype} {ids.shape}, expected up to {self.model.context} int64"
            )
        if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
            raise InvalidSession(f"{path}: 'ids' names a token outside the vocabulary of {vocab_size}")
        fresh = self._new_engine()
        try:
            fresh.restore(arrays)
        except InvalidSession as error:
            raise InvalidSession(f"{path}: {error}") from error
        if fresh.position != len(ids):
            raise InvalidSession(f"{path}: {len(ids)} ids, but the caches hold {fresh.position} positions")
        self.engine, self.ids = fresh, ids.tolist()

    def _new_engine(self) -> Engine:
        model = self.model
        return model.backend.engine(model.context, model.kv, default_chunk(model.config.layers), self._ring)

    def _identity(self) -> dict[str, str]:
        model = self.model
        return {
            "bezel_session": "2",
            "model": model.file.fingerprint(),
            "engine": model.engine,  # another one would go on with other bits
            "kv": model.kv,
        }


def _backend(
    engine: str, file: GGUFFile | OnnxFolder, config: ModelConfig, threads: int | None, exact: bool
) -> Backend:
    if isinstance(file, OnnxFolder) and engine == "ort":
        try:
            from .engines.ort import OrtBackend
        except ModuleNotFoundError as error:
            if error.name != "onnxruntime":
                raise
            raise InvalidRequest("the engine 'ort' needs onnxruntime: pip install 'bezel-lm[onnx]'") from None
        return OrtBackend(file, config, threads, exact)
    if isinstance(file, GGUFFile) and engine == "native":
        from .engines.native import NativeBackend

        return NativeBackend(file, config, threads, exact)
    from .engines.reference import ReferenceBackend

    return ReferenceBackend(file, config, threads)


def _read_session(path: Path) -> tuple[dict[str, str], dict[str, npt.NDArray[Any]]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, TypeError, AttributeError, ValueError) as error:
        raise InvalidSession(f"{path}: not a saved session: {error}") from error


def _stored_stop_ids(file: ModelFile, vocab_size: int) -> frozenset[int]:
    """The stop tokens of the checkpoint's generation config, and llama.cpp's end of turn, where the file has them."""
    stored = file.metadata.get("bezel.generation.stop_token_ids", [])
    ids = [*stored, file.metadata.get("tokenizer.ggml.eot_token_id")] if hasattr(stored, "__iter__") else []
    return frozenset(int(i) for i in ids if isinstance(i, (int, np.integer)) and 0 <= i < vocab_size)
