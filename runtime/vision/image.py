"""Pictures in: decoded, turned the right way up, on white where they are transparent, and brought to a tower's size.

Files are not trusted: only formats that Pillow decodes in memory of its own are opened, sizes are looked at before
anything is decoded, and what is cut off or damaged is refused.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import re
import stat
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..arguments import shown
from ..arrays import Floats
from ..errors import InvalidRequest

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MOST_PIXELS = 100_000_000  # decoded, three bytes each
MOST_BYTES = 256 << 20  # of a file
MOST_BYTES_IN_URL = 48 << 20
# Pan and scan, as Gemma 3's processor has it.
_FEWEST_PIXELS, _MOST_CROPS, _LEAST_RATIO = 256, 4, 1.2

_MAGICS = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*")

_STRIP = 256  # rows
_DECODING = threading.Lock()  # one at a time: the largest take 700 MB

_DATA_URL = re.compile(r"data:(?:image/[\w.+-]{1,40})?(?:;[\w=.+-]{1,80})*;base64,", re.IGNORECASE)


class Image:
    """A picture for a prompt: `Image("cat.jpg")`, or of the bytes of such a file, of a Pillow image, or of an array
    uint8 (height, width, 3).

    `name` is what messages call it. Of several frames the first is taken; transparency lies on white. With
    `pan_and_scan` Gemma 3 is shown parts of a long or tall picture, too, which it then sees larger. Raises
    InvalidRequest for what is no picture, is damaged, or has more than MOST_PIXELS.
    """

    def __init__(
        self, source: str | Path | bytes | PillowImage | NDArray[np.uint8], pan_and_scan: bool = False
    ) -> None:
        pillow = _pillow()
        self.pan_and_scan = pan_and_scan
        self.name = "picture"
        if isinstance(source, np.ndarray):
            if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or not source.size:
                raise InvalidRequest(f"picture: found {source.dtype} {source.shape}, expected uint8 (height, width, 3)")
            _check_size(self.name, (source.shape[1], source.shape[0]))
            self._source: PillowImage | bytes = pillow.fromarray(np.ascontiguousarray(source))
            return
        if isinstance(source, pillow.Image):
            _check_size(self.name, source.size)
            self._source = _plain(source.copy())
            return
        if isinstance(source, str) and re.match("https?:", source, re.IGNORECASE):
            raise InvalidRequest(f"{source[:200]}: nothing is fetched: save the picture, and give its file")
        if isinstance(source, (str, Path)):
            self.name = Path(source).name
            source = _read(Path(source))
        if not isinstance(source, bytes):
            raise InvalidRequest(f"picture: found {shown(source)}, expected a path, bytes, a picture or an array")
        self._source = source
        _ = self._image  # raises where it cannot be decoded

    @classmethod
    def unread(cls, name: str, raw: bytes, pan_and_scan: bool = False) -> Image:
        """A picture of which only the size is looked at: raises InvalidRequest for damage when it is seen."""
        found = cls.__new__(cls)
        found.name, found.pan_and_scan, found._source = name, pan_and_scan, raw
        with _opened(name, raw):
            return found

    @property
    def _image(self) -> PillowImage:
        """Decoded anew each time: a picture takes a hundred times the room of its file."""
        if not isinstance(self._source, bytes):
            return self._source
        with _DECODING, _opened(self.name, self._source) as image:
            image.load()
            return _plain(image)

    def __repr__(self) -> str:
        return f"<Image {self.name}: {self.size[0]} × {self.size[1]}>"

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self._image.size

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of the file that it was made of; of another source, of its pixels."""
        return hashlib.sha256(self._source if isinstance(self._source, bytes) else self._source.tobytes()).hexdigest()

    def fitted(self, size: int, resample: str = "bilinear") -> NDArray[np.uint8]:
        """uint8 (size, size, 3), whatever the shape was: as Gemma 3's and SigLIP's processors resize.

        `resample` is "bilinear" or "bicubic", both smoothed where pixels are put together.
        """
        how = getattr(_pillow().Resampling, resample.upper())
        return np.asarray(self._image.resize((size, size), how))

    def crops(self) -> list[Image]:
        """What pan and scan shows besides a long or tall picture: parts of it that are nearly square, up to four."""
        width, height = self.size
        long, short = max(width, height), min(width, height)
        if long / short < _LEAST_RATIO:
            return []
        n = min(_MOST_CROPS, max(2, min(long // _FEWEST_PIXELS, int(long / short + 0.5))))
        step = -(-long // n)
        if min(step, short) < _FEWEST_PIXELS:
            return []
        boxes = [(i * step, 0, min((i + 1) * step, width), height) for i in range(n)]
        if height > width:
            boxes = [(0, i * step, width, min((i + 1) * step, height)) for i in range(n)]
        return [Image(self._image.crop(box)) for box in boxes]


def from_data_url(url: str, name: str = "picture", pan_and_scan: bool = False) -> Image:
    """A picture, `Image.unread`, in a URL that holds it, `data:image/png;base64,…`. Nothing is ever fetched.

    Raises InvalidRequest.
    """
    found = _DATA_URL.match(url)
    if found is None:
        kind = re.match(r"[a-z][a-z+.-]{0,20}:", url, re.IGNORECASE)
        what = "an address" if kind and kind[0].lower() != "data:" else "something else"
        raise InvalidRequest(
            f"{name}: found {what}, {url[:60]!r}, expected data:image/…;base64,…: nothing is fetched from elsewhere; "
            "send the picture itself"
        )
    if len(url) * 3 // 4 > MOST_BYTES_IN_URL:
        raise InvalidRequest(f"{name}: {len(url) * 3 // 4} bytes, expected at most {MOST_BYTES_IN_URL}")
    try:
        raw = base64.b64decode(url[found.end() :], validate=True)
    except binascii.Error as error:
        raise InvalidRequest(f"{name}: is no base64: {error}") from None
    return Image.unread(name, raw, pan_and_scan)


def normalized(pixels: NDArray[np.uint8], mean: Sequence[float], std: Sequence[float]) -> Floats:
    """Pixels from 0 to 255 as a tower takes them: (pixel / 255 − mean) / std, float32, in transformers' roundings."""
    unit = (pixels.astype(np.float64) * (1 / 255)).astype(np.float32)
    normal: Any = (unit - np.array(mean, np.float32)) / np.array(std, np.float32)
    found: Floats = normal
    return found


def _pillow() -> Any:
    try:
        import PIL.Image
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "PIL":
            raise
        raise InvalidRequest("pictures need Pillow: pip install 'bezel-lm[vision]'") from None
    return PIL.Image


def _read(path: Path) -> bytes:
    """A file's content, once it is known to be a file of a size that a picture has."""
    try:
        found = os.stat(path)  # before it is opened: a pipe would be waited for
        if not stat.S_ISREG(found.st_mode):
            raise InvalidRequest(f"{path}: is no file, expected a picture")
        if found.st_size > MOST_BYTES:
            raise InvalidRequest(f"{path}: {found.st_size} bytes, expected a picture of at most {MOST_BYTES}")
        with path.open("rb") as file:
            return file.read(MOST_BYTES)
    except OSError as error:
        raise InvalidRequest(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # a NUL in the name
        raise InvalidRequest(f"{str(path)!r}: cannot be read: {error}") from None


@contextmanager
def _opened(name: str, raw: bytes) -> Iterator[PillowImage]:
    """A picture of which nothing but the header is read yet. Raises InvalidRequest for what is wrong with it."""
    pillow = _pillow()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of damaged metadata, which is not used
        try:
            image = pillow.open(io.BytesIO(raw), formats=FORMATS)
            _check_size(name, image.size)
            yield image
        except InvalidRequest:
            raise
        except pillow.UnidentifiedImageError:
            if raw.startswith(_MAGICS):
                raise InvalidRequest(f"{name}: is damaged") from None
            begins = f"begins with {raw[:8]!r}" if raw else "is empty"
            raise InvalidRequest(f"{name}: {begins}, expected one of {', '.join(FORMATS)}") from None
        except pillow.DecompressionBombError:
            raise InvalidRequest(f"{name}: has too many pixels, expected at most {MOST_PIXELS:,}") from None
        except MemoryError:
            raise InvalidRequest(f"{name}: there is no memory for this picture") from None
        except Exception as error:  # decoders raise whatever comes
            raise InvalidRequest(f"{name}: is damaged: {str(error)[:200] or type(error).__name__}") from None


def _check_size(name: str, size: tuple[int, int]) -> None:
    width, height = size
    if width < 1 or height < 1 or width * height > MOST_PIXELS:
        raise InvalidRequest(f"{name}: {width} × {height} pixels, expected 1 to {MOST_PIXELS:,} in all")


def _plain(image: Any) -> PillowImage:
    """Turned as its camera says, and RGB."""
    from PIL import ImageOps

    pillow = _pillow()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # deeper than 8 bits
        deep = image.mode.startswith("I") and max(np.asarray(part).max() for part in _strips(image)) > 255
        values = (np.asarray(part, np.float64) / (257 if deep else 1) for part in _strips(image))
        image = pillow.fromarray(np.concatenate([np.nan_to_num(x).clip(0, 255).astype(np.uint8) for x in values]))
    if not image.has_transparency_data:
        plain: PillowImage = image.convert("RGB")
        return plain
    plain = pillow.new("RGB", image.size)
    for i, part in enumerate(_strips(image)):
        white = pillow.new("RGBA", part.size, (255, 255, 255, 255))
        plain.paste(pillow.alpha_composite(white, part.convert("RGBA")).convert("RGB"), (0, i * _STRIP))
    return plain


def _strips(image: PillowImage) -> Iterator[PillowImage]:
    """All of it, some rows at a time: what is computed with takes many times the room."""
    for top in range(0, image.height, _STRIP):
        yield image.crop((0, top, image.width, min(top + _STRIP, image.height)))
