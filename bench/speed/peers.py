"""Other programs, measured as bezel is: on the same model, with as many threads."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime.files.models import eye_path
from .runner import NotMeasured, Runner, noise


class LlamaCpp(Runner):
    """llama.cpp's own C functions as llama-cpp-python has them, without what its Python class adds to each token.

    Keys and values are float16, its default and on processors its fastest.
    """

    kv = "f16"

    def __init__(self, model: str, context: int, threads: int, flash_attention: bool) -> None:
        try:
            import llama_cpp as lib
        except ImportError as error:
            raise NotMeasured(f"llama-cpp-python is not installed ({error}): pip install llama-cpp-python") from None
        lib.llama_backend_init()
        self._lib, self.version = lib, lib.__version__
        self._model = lib.llama_model_load_from_file(model.encode(), lib.llama_model_default_params())
        if not self._model:
            raise NotMeasured(f"llama.cpp {self.version} cannot load {model}")
        params = lib.llama_context_default_params()
        if not hasattr(params, "flash_attn_type"):
            raise NotMeasured(f"llama-cpp-python {self.version} is too old: pip install -U llama-cpp-python")
        params.n_ctx, params.n_batch = context, 512
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = int(flash_attention)
        self._context = lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise NotMeasured(f"llama.cpp {self.version} cannot make a context of {context} tokens")
        self._memory = lib.llama_get_memory(self._context)
        self.vocab_size: int = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))
        self._position, self._path, self._threads, self._eye = 0, Path(model), threads, None

    def prefill(self, ids: Sequence[int]) -> None:
        for start in range(0, len(ids), 512):
            part = ids[start : start + 512]
            tokens = (self._lib.llama_token * len(part))(*part)
            code = self._lib.llama_decode(self._context, self._lib.llama_batch_get_one(tokens, len(part)))
            if code != 0:
                raise NotMeasured(f"llama_decode returned {code} at position {self._position}")
            self._position += len(part)
        self._lib.llama_get_logits_ith(self._context, -1)  # waits until they are there

    def step(self, token: int) -> None:
        self.prefill([token])

    def rewind(self, n: int) -> None:
        self._position -= n
        if not self._lib.llama_memory_seq_rm(self._memory, 0, self._position, -1):
            raise NotMeasured(f"llama.cpp cannot rewind to position {self._position}")

    def reset(self) -> None:
        self._lib.llama_memory_clear(self._memory, True)
        self._position = 0

    def see(self, seed: int) -> int:
        import llama_cpp.mtmd_cpp as mtmd

        if self._eye is None:
            params = mtmd.mtmd_context_params_default()
            params.use_gpu, params.n_threads, params.print_timings, params.warmup = False, self._threads, False, False
            self._eye = mtmd.mtmd_init_from_file(str(eye_path(self._path)).encode(), self._model, params)
            if not self._eye:
                raise NotMeasured(f"llama.cpp {self.version} cannot load {eye_path(self._path)}")
        picture = noise(seed)
        raw = (ctypes.c_uint8 * picture.size).from_buffer_copy(picture)
        bitmap = mtmd.mtmd_bitmap_init(picture.shape[1], picture.shape[0], raw)
        said = b"<start_of_turn>user\n" + mtmd.mtmd_default_marker() + b"What is this?<end_of_turn>\n"
        asked, chunks = mtmd.mtmd_input_text(), mtmd.mtmd_input_chunks_init()
        asked.text = said + b"<start_of_turn>model\n"
        asked.text_len, asked.add_special, asked.parse_special = len(asked.text), True, True
        past, bitmaps = ctypes.c_int32(0), (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
        mtmd.mtmd_tokenize(self._eye, chunks, ctypes.byref(asked), bitmaps, 1)
        arguments = (self._eye, self._context, chunks, 0, 0, 512, True, ctypes.byref(past))
        code = mtmd.mtmd_helper_eval_chunks(*arguments)
        mtmd.mtmd_input_chunks_free(chunks)
        mtmd.mtmd_bitmap_free(bitmap)
        if code:
            raise NotMeasured(f"mtmd_helper_eval_chunks returned {code}")
        self._position = past.value
        self._lib.llama_get_logits_ith(self._context, -1)
        return self._position

    def kv_bytes(self) -> int | None:
        return None


class OnnxruntimeGenai(Runner):
    """onnxruntime-genai on a folder that its own builder made: `python -m onnxruntime_genai.models.builder`.

    The builder's graphs for processors keep keys and values in float32. A prompt goes in by 512 tokens: in one piece,
    as the library takes it by itself, logits of every position need 1 MB each. Tokens are given, not sampled, because
    sampling is not what is measured. Once its window is full it takes no token back: those of decoding then stay,
    in up to `_SPARE` more positions than asked for; where the model has none to spare, as many of the next prompt are
    left out. A context smaller than the window it refuses.
    """

    kv = "f32"
    _CHUNK, _SPARE = 512, 256

    def __init__(self, model: str, context: int, threads: int) -> None:
        try:
            import onnxruntime_genai as lib
        except ImportError as error:
            raise NotMeasured(f"onnxruntime-genai is not installed ({error}): pip install onnxruntime-genai") from None
        self._lib, self.version = lib, lib.__version__
        try:
            raw = json.loads((Path(model) / "genai_config.json").read_text(encoding="utf-8"))["model"]
            self.vocab_size: int = raw["vocab_size"]
            window: int = raw["decoder"].get("sliding_window", {}).get("window_size", 0)
            longest: int = raw["context_length"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise NotMeasured(f"{model}: not a folder that onnxruntime-genai's builder made: {error}") from None
        config = lib.Config(model)
        options = {"intra_op_num_threads": threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model = lib.Model(config)
        self._max_length = min(max(context + self._SPARE, window), longest)
        self.reset()

    def prefill(self, ids: Sequence[int]) -> None:
        room = self._max_length - self._generator.token_count()
        if len(ids) > room + self._SPARE:
            raise NotMeasured(f"onnxruntime-genai has room for {room} more tokens, not for {len(ids)}")
        ids = ids[:room]
        for start in range(0, len(ids), self._CHUNK):
            self._generator.append_tokens(np.array(ids[start : start + self._CHUNK], np.int32))
        self._generator.get_logits()

    def step(self, token: int) -> None:
        self.prefill([token])

    def rewind(self, n: int) -> None:
        try:
            self._generator.rewind_to(self._generator.token_count() - n)
        except RuntimeError as error:
            if "Cannot rewind" not in str(error):
                raise

    def reset(self) -> None:
        params = self._lib.GeneratorParams(self._model)
        params.set_search_options(max_length=self._max_length)
        self._generator = self._lib.Generator(self._model, params)

    def kv_bytes(self) -> int | None:
        return None


RUNNERS: dict[str, Callable[..., Runner]] = {"llama.cpp": LlamaCpp, "onnxruntime-genai": OnnxruntimeGenai}

# Peer → the settings that it is measured with; at each point the faster one counts.
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "llama.cpp": {"flash attention on": {"flash_attention": True}, "flash attention off": {"flash_attention": False}},
    "onnxruntime-genai": {"its own export": {}},
}
# What each is imported as.
MODULES = {"llama.cpp": "llama_cpp", "onnxruntime-genai": "onnxruntime_genai"}
# Peers that read another kind of file than bezel's, so that --peer-model must name it.
OWN_FILE = ("onnxruntime-genai",)
