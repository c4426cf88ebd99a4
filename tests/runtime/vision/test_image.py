"""Pictures in: as transformers prepares them, in every form that people have, and files that mean harm."""

from __future__ import annotations

import base64
import io
import os
import subprocess
import sys
import threading
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from bezel.runtime.errors import InvalidRequest
from bezel.runtime.vision.image import FORMATS, MOST_PIXELS, Image, from_data_url, normalized
from seeing import drawn

SIZES = [(60, 45), (301, 77), (20, 20), (1, 9), (9, 1), (1, 3000), (900, 300), (300, 1000)]
HALF = (0.5, 0.5, 0.5)


def encoded(image: PIL.Image.Image | np.ndarray, form: str = "PNG", **options: Any) -> bytes:
    image = PIL.Image.fromarray(image) if isinstance(image, np.ndarray) else image
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def pixels(image: Image) -> np.ndarray:
    return np.asarray(image._image)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["gemma3", "siglip"])
def test_as_transformers_prepares_them(kind: str, size: tuple[int, int]) -> None:
    models = pytest.importorskip("transformers.models")
    drawn_ = drawn(1, *size)
    if kind == "gemma3":
        processor = models.gemma3.image_processing_pil_gemma3.Gemma3ImageProcessorPil
        options: dict[str, Any] = {}
    else:
        processor = models.siglip.image_processing_pil_siglip.SiglipImageProcessorPil
        options = {"resample": 3}
    theirs = processor(size={"height": 56, "width": 56}, image_mean=HALF, image_std=HALF, **options)
    want = theirs(PIL.Image.fromarray(drawn_), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    found = normalized(Image(drawn_).fitted(56, "bicubic" if kind == "siglip" else "bilinear"), HALF, HALF)
    assert found.dtype == np.float32
    assert np.array_equal(found, want)


def test_strips_are_not_seen() -> None:
    """What takes much room is computed some rows at a time: the same as all at once."""
    random = np.random.default_rng(0)
    deep = random.integers(0, 65536, (700, 30)).astype(np.uint16)
    found = pixels(Image(encoded(PIL.Image.fromarray(deep))))
    assert np.array_equal(found[:, :, 0], (deep / 257).clip(0, 255).astype(np.uint8))
    clear = random.integers(0, 256, (700, 30, 4)).astype(np.uint8)
    image = PIL.Image.fromarray(clear)
    white = PIL.Image.new("RGBA", image.size, (255, 255, 255, 255))
    assert np.array_equal(
        pixels(Image(encoded(image))), np.asarray(PIL.Image.alpha_composite(white, image).convert("RGB"))
    )


def test_what_is_decoded_is_not_kept() -> None:
    raw = encoded(PIL.Image.new("1", (9000, 9000)))
    tracemalloc.start()
    try:
        images = [Image(raw) for _ in range(3)]
        assert tracemalloc.get_traced_memory()[0] < 1 << 20
    finally:
        tracemalloc.stop()
    assert all(image._source is raw for image in images)


def test_a_cut_gif_is_damaged() -> None:
    with pytest.raises(InvalidRequest, match="is damaged"):
        Image(encoded(drawn(0, 300, 300), "GIF")[:9])


def test_nothing_is_fetched() -> None:
    with pytest.raises(InvalidRequest, match=r"http://x/y\.png: nothing is fetched"):
        Image("http://x/y.png")


@pytest.mark.parametrize("size", [*SIZES, (5000, 600), (310, 256), (700, 600), (512, 255)])
def test_pan_and_scan_as_transformers(size: tuple[int, int]) -> None:
    pytest.importorskip("transformers")
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    picture = drawn(2, *size)
    want = Gemma3ImageProcessorPil().pan_and_scan(picture.transpose(2, 0, 1), 256, 4, 1.2)
    found = Image(picture).crops()
    assert len(found) == len(want)
    for one, other in zip(found, want, strict=True):
        assert np.array_equal(pixels(one), other.transpose(1, 2, 0))


def test_every_source_gives_the_same(tmp_path: Path) -> None:
    picture = drawn(3)
    raw = encoded(picture)
    (tmp_path / "cat.png").write_bytes(raw)
    url = f"data:image/png;base64,{base64.b64encode(raw).decode()}"
    sources = [tmp_path / "cat.png", str(tmp_path / "cat.png"), raw, PIL.Image.fromarray(picture), picture]
    for image in (*map(Image, sources), from_data_url(url)):
        assert np.array_equal(pixels(image), picture)
        assert image.size == (60, 45)
    assert Image(tmp_path / "cat.png").name == "cat.png"
    assert repr(Image(raw)) == "<Image picture: 60 × 45>"


@pytest.mark.parametrize("form", FORMATS)
def test_formats(form: str) -> None:
    image = Image(encoded(np.full((20, 30, 3), (200, 60, 10), np.uint8), form))
    assert np.abs(pixels(image).astype(int) - (200, 60, 10)).max() <= 8


def test_the_right_way_up() -> None:
    picture = drawn(4)
    for orientation, turned in ((3, np.rot90(picture, 2)), (6, np.rot90(picture, 3)), (8, np.rot90(picture))):
        exif = PIL.Image.Exif()
        exif[0x0112] = orientation
        assert np.array_equal(pixels(Image(encoded(picture, exif=exif))), turned)


def test_what_is_transparent_lies_on_white() -> None:
    rgba = np.dstack([drawn(5), np.zeros((45, 60), np.uint8)])
    rgba[:, :30, 3] = 255
    found = pixels(Image(encoded(rgba)))
    assert np.array_equal(found[:, :30], drawn(5)[:, :30])
    assert (found[:, 30:] == 255).all()
    palette = PIL.Image.fromarray(drawn(5)).quantize(16)
    assert (pixels(Image(encoded(palette, "PNG", transparency=bytes(16)))) == 255).all()


def test_grey_deep_and_printed() -> None:
    grey = drawn(6)[:, :, 0]
    same = np.repeat(grey[:, :, None], 3, axis=2)
    assert np.array_equal(pixels(Image(encoded(grey))), same)
    assert np.array_equal(pixels(Image(encoded(grey.astype(np.uint16) * 257))), same)
    bits = PIL.Image.fromarray((grey > 127).astype(np.uint8) * 255).convert("1")
    assert set(np.unique(pixels(Image(encoded(bits))))) == {0, 255}
    printed = PIL.Image.fromarray(drawn(6)).convert("CMYK")
    assert np.array_equal(pixels(Image(encoded(printed, "TIFF"))), np.asarray(printed.convert("RGB")))


def test_the_first_of_several_frames() -> None:
    frames = [PIL.Image.fromarray(np.full((8, 8, 3), shade, np.uint8)) for shade in (10, 200)]
    moving = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (pixels(Image(moving)) == 10).all()


def huge_png(width: int, height: int) -> bytes:
    """A sound PNG that says it has so many pixels, and holds almost none."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def eps(_: Path) -> bytes:
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n"


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nothing": (lambda _: b"", "is empty"),
    "a text": (lambda _: b"Dear reader,", r"begins with b'Dear rea', expected one of PNG"),
    "a program for printers": (eps, "begins with b'%!PS-Ado'"),
    "cut": (lambda _: encoded(drawn(0, 300, 300), "JPEG")[:4000], "is damaged"),
    "cut png": (lambda _: encoded(drawn(0, 300, 300))[:4000], "is damaged"),
    "a bomb": (lambda _: huge_png(40000, 40000), rf"too many pixels, expected at most {MOST_PIXELS:,}"),
    "not quite a bomb": (lambda _: huge_png(10001, 10000), rf"10001 × 10000 pixels, expected 1 to {MOST_PIXELS:,}"),
    "a billion pixels": (lambda _: huge_png(1 << 30, 1), "too many pixels"),
    "missing": (lambda folder: folder / "no.png", r"no\.png: cannot be read: No such file"),
    "a folder": (lambda folder: folder, "is no file"),
    "a NUL": (lambda _: "a\0b.png", "cannot be read"),
    "another array": (lambda _: np.zeros((4, 4), np.uint8), r"found uint8 \(4, 4\)"),
    "no pixels": (lambda _: np.zeros((0, 4, 3), np.uint8), r"found uint8 \(0, 4, 3\)"),
    "something": (lambda _: 3.5, "expected a path, bytes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path) -> None:
    make, words = REFUSED[name]
    with pytest.raises(InvalidRequest, match=words):
        Image(make(tmp_path))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a named pipe")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    done = threading.Event()

    def look() -> None:
        with pytest.raises(InvalidRequest, match="is no file"):
            Image(tmp_path / "pipe.png")
        done.set()

    threading.Thread(target=look, daemon=True).start()
    assert done.wait(30)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://example.com/cat.png", r"found an address, .* nothing is fetched"),
        ("file:///etc/passwd", "found an address"),
        ("cat.png", "found something else"),
        ("data:image/png,abc", "found something else"),
        ("data:image/png;base64,%%%", "is no base64"),
        ("data:text/html;base64,AAAA", "found something else"),
        ("data:image/png;base64,AAAA", "begins with"),
    ],
)
def test_urls_that_are_refused(url: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        from_data_url(url)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_damage_of_any_kind(form: str) -> None:
    """Damaged files are refused, or are pictures; nothing else is raised, and nothing warned of."""
    random = np.random.default_rng(list(form.encode()))
    raw = encoded(drawn(7, 40, 30), form)
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(300):
            damaged = bytearray(raw)
            for _ in range(1 + i % 4):
                at = int(random.integers(len(damaged) if i % 2 else min(64, len(damaged))))
                damaged[at] = int(random.integers(256))
            if i % 5 == 0:
                del damaged[int(random.integers(len(damaged))) :]
            try:
                assert min(Image(bytes(damaged)).size) >= 1
            except InvalidRequest:
                refused += 1
    assert refused > 20


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_large_claims_take_no_memory(tmp_path: Path) -> None:
    """Within 300 MiB more: bombs of every kind are refused before they are decoded."""
    bombs = [huge_png(40000, 40000), huge_png(1 << 16, 1 << 15)]
    gif = bytearray(encoded(drawn(0), "GIF"))
    gif[6:10] = b"\xff\xff\xff\xff"
    bombs.append(bytes(gif))
    tiff = encoded(drawn(0), "TIFF")
    bombs.append(tiff.replace((60).to_bytes(4, "little"), (1 << 24).to_bytes(4, "little")))
    for i, bomb in enumerate(bombs):
        (tmp_path / f"{i}.bin").write_bytes(bomb)
    program = (
        "import resource, sys\n"
        "from bezel.runtime.errors import InvalidRequest\n"
        "from bezel.runtime.vision.image import Image\n"
        "Image(__import__('numpy').zeros((2, 2, 3), 'uint8'))\n"
        "used = int(open('/proc/self/statm').read().split()[5]) * 4096\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (used + (300 << 20),) * 2)\n"
        "for path in sys.argv[1:]:\n"
        "    try:\n"
        "        Image(path); print('a picture')\n"
        "    except InvalidRequest as error:\n"
        "        print(error)\n"
    )
    paths = [str(path) for path in sorted(tmp_path.iterdir())]
    child = subprocess.run([sys.executable, "-c", program, *paths], capture_output=True, text=True, timeout=120)
    assert child.returncode == 0, child.stderr
    assert child.stdout.count("pixels") == len(bombs), child.stdout
    assert "memory" not in child.stdout


def test_without_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(InvalidRequest, match=r"pip install 'bezel-lm\[vision\]'"):
        Image(b"")
