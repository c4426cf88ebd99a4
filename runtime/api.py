"""The Python interface: load a file, generate text, or go token by token in a session that can be saved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import NoneType, TracebackType
from typing import Any

import numpy as np

from .arguments import is_whole, path_of, shown, whole
from .arrays import Floats
from .cache.caches import default_chunk
from .engines import ENGINES, new_backend
from .engines.protocol import ModelBackend
from .errors import BezelError, InvalidModelFile, InvalidRequest
from .files.model_file import ModelFile, open_model
from .files.onnx_eye import OnnxEye
from .files.vision_file import VisionFile, vision_beside
from .session import Session
from .text import chat
from .text.conversation import Conversation
from .text.generation import Generation
from .text.grammar import Grammar, Grammars
from .text.sampling import Sampling, read_sampling
from .text.tokenizer import Tokenizer
from .vision.eye import Eye

Messages = Sequence[chat.Message] | Sequence[Mapping[str, Any]]
Prompt = chat.Content | Sequence[int] | Messages

ACTIVATIONS = ("int8", "f32")
MAX_THREADS = 1024


def load(
    path: str | Path,
    engine: str | None = None,
    context: int | None = None,
    kv: str | None = None,
    threads: int | None = None,
    activations: str = "int8",
    vision: str | Path | None = None,
) -> Model:
    """Open a Gemma model: a GGUF file, a folder that `bezel export --format onnx` wrote, or one by name (`bezel list`).

    `engine` "native" computes on the C++ kernels and "ort" on onnxruntime, each the default for its kind of file;
    "reference" runs both on NumPy in float32. `context` is the most tokens that a session may hold (default: all that
    the model was made for); memory grows only as a session fills. `kv` is how keys and values are stored: "f32", "f16"
    (the default) or "int8"; for "ort" that was settled at the export. `threads` None takes the performance cores, for
    "reference" all. `activations` "int8" rounds what is multiplied with quantized weights to 8 bits, as is fast; "f32"
    does not, for measuring (the reference engine never does). `vision` is the file of the model's eye, which is
    otherwise looked for beside it, `mmproj-NAME.gguf`, or in the folder. Raises InvalidModelFile, InvalidConfig or
    InvalidRequest.
    """
    choices = (
        ("engine", engine, (None, *ENGINES)),
        ("activations", activations, ACTIVATIONS),
    )
    for name, value, known in choices:
        if not isinstance(value, (str, NoneType)) or value not in known:
            raise InvalidRequest(f"{name}: found {value!r}, expected one of {', '.join(filter(None, known))}")
    if threads is not None and not 1 <= whole("threads", threads) <= MAX_THREADS:
        raise InvalidRequest(f"threads: found {threads}, expected 1 to {MAX_THREADS}")
    if context is not None:
        whole("context", context)
    file = open_model(path_of(path))
    try:
        if engine not in (None, *file.engines):
            fitting = " or ".join(file.engines)
            raise InvalidRequest(f"engine: found {engine!r}, expected {fitting}: {path} is {file.kind}")
        engine = engine or file.engines[0]
        eye = None if vision is None else path_of(vision)
        return Model(file, engine, context, _storage(file, engine, kv), threads, activations == "f32", eye)
    except BaseException:
        file.close()
        raise


def _storage(file: ModelFile, engine: str, kv: str | None) -> str:
    """How keys and values are stored where `kv` is asked for: "int8" means any way of int8 that the engine has."""
    types = file.kv_types(engine)
    if not isinstance(kv, (str, NoneType)):
        raise InvalidRequest(f"kv: found {shown(kv)}, expected one of {', '.join(types)}")
    for name in types:
        if kv is None or name == kv or name.startswith(f"{kv}-"):
            return name
    known = " or ".join(map(repr, types))
    raise InvalidRequest(f"kv: found {kv!r}, expected {known}, with which {engine} runs {file.path}")


class Model:
    """A loaded model; its weights are shared by any number of sessions. Made by `load`.

    `runs_on` says how its logits are computed, for people. `with` closes the file at the end.
    """

    def __init__(
        self,
        file: ModelFile,
        engine: str,
        context: int | None,
        kv: str,
        threads: int | None,
        exact: bool,
        vision: Path | None = None,
    ) -> None:
        self.file, self.kv = file, kv
        # The reference engine never rounds them.
        self.runs_on = f"{engine} with float32 activations" if exact and engine != "reference" else engine
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
        self.backend = new_backend(engine, file, self.config, threads, exact)
        self._vision_file: VisionFile | None = None
        if vision is not None:
            self._sight = self._opened_eye(vision)

    def __repr__(self) -> str:
        config = self.config
        return (
            f"<Model {self.name}: {config.family}, {config.n_layers} layers, context {self.context}, {self.runs_on}, "
            f"{self.kv} keys and values>"
        )

    @property
    def name(self) -> str:
        """What the file calls itself, or its file name."""
        name = self.file.metadata.get("general.name")
        return name if isinstance(name, str) and name else self.file.path.stem

    @property
    def eye(self) -> Eye | None:
        """What sees pictures, where the file has it in itself, or one that fits beside it; `eye_for` says why not."""
        return self._sight if isinstance(self._sight, Eye) else None

    def eye_for(self, messages: Iterable[chat.Message]) -> Eye | None:
        """The eye for these messages. Raises InvalidRequest where they hold pictures and there is none."""
        pictures = [part for message in messages for part in message.parts if not isinstance(part, str)]
        if pictures and isinstance(self._sight, BezelError):
            raise InvalidRequest(f"{pictures[0].name}: this model sees no pictures: {self._sight}")
        return self.eye

    @cached_property
    def _sight(self) -> Eye | BezelError:
        """The eye, or why there is none, which matters only where a picture is to be seen."""
        try:
            return self._opened_eye(None)
        except BezelError as error:
            return error

    def _opened_eye(self, path: Path | None) -> Eye:
        """The eye in a file; or in the model's own, or in the one beside that. Raises as `load` does."""
        if path is None and (inside := self.file.vision) is not None:
            return self._eye_of(inside)
        if not isinstance(self.backend, ModelBackend):
            raise InvalidRequest(
                "there is no vision tower, vision.onnx, in its folder (`bezel export` writes it where the checkpoint "
                "has one)"
                if path is None
                else f"vision: {path}: {self.file.kind} that sees has its vision tower in itself"
            )
        self._vision_file = VisionFile(path or vision_beside(self.file.path), self.config.hidden_size)
        return self._eye_of(self._vision_file)

    def _eye_of(self, file: VisionFile | OnnxEye) -> Eye:
        most_rows = 2 * self.context  # what two full sessions can hold
        return Eye(self.backend.tower(file), most_rows, self.backend.embed, self.tokenizer.end_of_line_id)

    @property
    def chunk(self) -> int:
        """The most rows that go through the model at once."""
        usual = default_chunk(self.config.layers)
        return usual if self.eye is None else self.eye.chunk(usual)

    @property
    def default_sampling(self) -> Sampling:
        """Sampling as the file recommends it; bezel's defaults for the rest, and for what makes no sense."""
        return Sampling(**read_sampling(self.file.metadata)[0])

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

    @cached_property
    def grammars(self) -> Grammars:
        """What makes grammars that answers follow: JSON by a schema, regular expressions, Lark.

        Raises InvalidRequest where llguidance is not installed.
        """
        return Grammars(self.tokenizer, self.stop_ids)

    def identity(self) -> dict[str, str]:
        """What a saved session asks of the model that goes on with it: with another engine it would get other bits."""
        return {"model": self.file.fingerprint(), "engine": self.runs_on, "kv": self.kv}

    def close(self) -> None:
        """Let go of the file; sessions are not to be fed any more."""
        self.file.close()
        if self._vision_file is not None:
            self._vision_file.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def session(self) -> Session:
        """A new, empty sequence."""
        return Session(self)

    def conversation(
        self, system: str | None = None, *, slide: bool = False, announce: Callable[[str], None] = lambda _: None
    ) -> Conversation:
        """A chat whose turns follow each other; a full context raises ContextFull, or drops the oldest with `slide`."""
        if not self.is_chat_model:
            raise InvalidRequest(f"{self.file.path}: has no chat template: it continues texts, and cannot chat")
        return Conversation(self, system, slide, announce)

    def logits(self, ids: Sequence[int]) -> Floats:
        """Logits float32 (len(ids), vocab) of every position of a fresh sequence."""
        return self.session().logits(ids)

    def prompt_ids(self, prompt: Prompt, raw: bool | None = None) -> list[int]:
        """What the model sees of a prompt: ids as they are, messages as a chat, text as one turn of a chat.

        A message may be a mapping, too, {"role": …, "content": …}. `raw` text is continued instead, after <bos>; None
        means raw only where the file is no chat model. Text may be a list of texts and pictures, here and in messages.
        """
        if raw is not None and not isinstance(raw, bool):
            raise InvalidRequest(f"raw: found {shown(raw)}, expected True, False or None")
        if isinstance(prompt, (bytes, bytearray)):
            raise InvalidRequest("prompt: found bytes, expected text, ids or messages; decode them first")
        if isinstance(prompt, str) or chat.is_content(prompt):
            if raw or (raw is None and not self.is_chat_model):
                return chat.continued(self.tokenizer, prompt, self.eye_for([chat.Message("user", prompt)]))
            prompt = [chat.Message("user", prompt)]
        parts = list(prompt) if isinstance(prompt, Iterable) else [prompt]
        messages = [_message(part) for part in parts if isinstance(part, (chat.Message, Mapping))]
        ids = [int(part) for part in parts if is_whole(part)]
        if not parts or len(parts) not in (len(messages), len(ids)):
            kinds = ", ".join(sorted({type(part).__name__ for part in parts})) or "nothing"
            raise InvalidRequest(f"prompt: found {kinds}, expected text, ids or messages, and of one kind")
        return chat.render(self.tokenizer, messages, eye=self.eye_for(messages)) if messages else ids

    def generate(
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None = None,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        raw: bool | None = None,
        grammar: Grammar | None = None,
        cancel: Callable[[], bool] = lambda: False,
    ) -> Generation:
        """Text after a prompt (see `prompt_ids`), as an iterable of pieces in a session of its own.

        Without `sampling`, `default_sampling`. Ends at a stop token, a `stop` string (left out of the text), after
        `max_tokens`, or when `cancel` returns True. It follows a `grammar`, which `grammars` makes. Raises ContextFull,
        while iterating, when no position is left.
        """
        ids = self.prompt_ids(prompt, raw)
        if sampling is not None and not isinstance(sampling, Sampling):
            raise InvalidRequest(f"sampling: found {shown(sampling)}, expected a Sampling")
        sampling = self.default_sampling if sampling is None else sampling
        constraint = None if grammar is None else grammar.constraint()
        return Generation(
            self.session(), ids, sampling, max_tokens=max_tokens, stop=stop, cancel=cancel, constraint=constraint
        )


def _message(part: chat.Message | Mapping[str, Any]) -> chat.Message:
    if isinstance(part, chat.Message):
        return part
    if set(part) != {"role", "content"}:
        raise InvalidRequest(f"message: found {', '.join(map(repr, part))}, expected 'role' and 'content'")
    return chat.Message(part["role"], part["content"])


def _stored_stop_ids(file: ModelFile, vocab_size: int) -> frozenset[int]:
    """The stop tokens of the checkpoint's generation config, and llama.cpp's end of turn, where the file has them."""
    stored = file.metadata.get("bezel.generation.stop_token_ids", [])
    listed = stored if isinstance(stored, (list, np.ndarray)) else [stored]
    ids = [*listed, file.metadata.get("tokenizer.ggml.eot_token_id")]
    return frozenset(int(i) for i in ids if isinstance(i, (int, np.integer)) and 0 <= i < vocab_size)
