"""llama.cpp sees with the eyes that bezel writes, and a text model says the same of it. Needs the `bench` extra."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from bezel.bench.pictures.draw import draw, scene
from bezel.runtime import Message, load
from bezel.runtime.vision.image import Image

llama_cpp = pytest.importorskip("llama_cpp")
mtmd = pytest.importorskip("llama_cpp.mtmd_cpp")

# Keys and values are float16 there, activations of quantized weights int8; see test_llama_cpp. The eye's layers count
# as the decoder's, and its rows are as large as their spread.
SPREAD, STEP = 4.0, {"f32": 2.0**-11, "q8_0": 2.0**-11 + 0.5 / 127}


class Seeing:
    """llama.cpp on a pair of files, for one chat."""

    def __init__(self, stack: ExitStack, path: Path) -> None:
        self._stack = stack
        self._llama = llama_cpp.Llama(str(path), n_ctx=512, n_batch=512, n_ubatch=512, verbose=False, n_threads=1)
        params = mtmd.mtmd_context_params_default()
        params.use_gpu, params.n_threads, params.print_timings, params.warmup = False, 1, False, False
        file = str(path.with_name(f"mmproj-{path.name}")).encode()
        self._eye = mtmd.mtmd_init_from_file(file, self._llama.model, params)
        assert self._eye is not None
        stack.callback(mtmd.mtmd_free, self._eye)

    def chunks(self, text: str, pictures: Sequence[np.ndarray]) -> ctypes.c_void_p:
        bitmaps = []
        for picture in pictures:
            raw = (ctypes.c_uint8 * picture.size).from_buffer_copy(np.ascontiguousarray(picture))
            bitmaps.append(mtmd.mtmd_bitmap_init(picture.shape[1], picture.shape[0], raw))
            self._stack.callback(mtmd.mtmd_bitmap_free, bitmaps[-1])
        asked = mtmd.mtmd_input_text()
        asked.text, asked.text_len, asked.add_special, asked.parse_special = (
            text.encode(),
            len(text.encode()),
            True,
            True,
        )
        found = mtmd.mtmd_input_chunks_init()
        self._stack.callback(mtmd.mtmd_input_chunks_free, found)
        array = (mtmd.mtmd_bitmap_p_ctypes * len(bitmaps))(*bitmaps)
        assert mtmd.mtmd_tokenize(self._eye, found, ctypes.byref(asked), array, len(bitmaps)) == 0
        return found

    def rows(self, picture: np.ndarray, n: int, size: int) -> np.ndarray:
        """What the eye makes of a picture, (n, size)."""
        found = self.chunks(MARKER, [picture])
        for i in range(mtmd.mtmd_input_chunks_size(found)):
            chunk = mtmd.mtmd_input_chunks_get(found, i)
            if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE:
                assert mtmd.mtmd_encode_chunk(self._eye, chunk) == 0
                return np.ctypeslib.as_array(mtmd.mtmd_get_output_embd(self._eye), (n, size)).copy()
        raise AssertionError("no picture in it")

    def logits(self, text: str, pictures: Sequence[np.ndarray], vocab_size: int) -> np.ndarray:
        """After the last token."""
        past, found = ctypes.c_int32(0), self.chunks(text, pictures)
        context = self._llama.ctx
        assert mtmd.mtmd_helper_eval_chunks(self._eye, context, found, 0, 0, 512, True, ctypes.byref(past)) == 0
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), (vocab_size,)).copy()


MARKER = mtmd.mtmd_default_marker().decode()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("preset", ["f32", "q8_0"])
def test_the_same_pair_sees_the_same(preset: str, shapes_of: Callable[..., Path], stack: ExitStack) -> None:
    path = shapes_of(preset)
    model = load(path, engine="reference", kv="f32")
    eye = model.eye
    assert eye is not None
    random = np.random.default_rng(1)
    pictures = [draw(scene(random, n), random) for n in (1, 3, 4)]
    theirs = Seeing(stack, path)
    bound = 5 * np.sqrt(2 * (model.config.n_layers + 4)) * STEP[preset] * SPREAD
    for picture in pictures:
        rows = eye.look(Image(picture)).rows
        found = theirs.rows(picture, *rows.shape)
        print(f"{preset}: rows differ by {np.abs(found - rows).max():.2g}, bound {bound:.2g}")
        assert np.abs(found - rows).max() < bound
    one = f"<start_of_turn>user\n\n\n{MARKER}\n\nWhat colour is the circle?<end_of_turn>\n<start_of_turn>model\n"
    turn = f"<start_of_turn>user\n\n\n{MARKER}\n\n<end_of_turn>\n<start_of_turn>model\n"
    few = f"{turn}red<end_of_turn>\n{turn}red<end_of_turn>\n{turn}"
    asked = [Message("user", [Image(pictures[0]), "What colour is the circle?"])]
    shown = [turn for p in pictures[:2] for turn in (Message("user", [Image(p)]), Message("model", "red"))]
    for text, used, messages in (
        (one, pictures[:1], asked),
        (few, pictures, [*shown, Message("user", [Image(pictures[2])])]),
    ):
        want = model.session().prefill(model.prompt_ids(messages))
        found = Seeing(stack, path).logits(text, used, model.config.vocab_size)
        print(f"{preset}: logits differ by {np.abs(found - want).max():.2g}, bound {bound:.2g}")
        assert np.abs(found - want).max() < bound
        assert found.argmax() == want.argmax()
