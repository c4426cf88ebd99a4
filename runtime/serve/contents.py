"""What messages hold: texts, and pictures as data URLs."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import InvalidRequest
from ..text import chat
from ..vision.image import Image, from_data_url
from .fields import BadRequest, Fields


def text_of(entry: Fields, name: str, optional: bool = False) -> str:
    """A text, or parts that are texts."""
    content = content_of(entry, name, optional)
    if not isinstance(content, str):
        raise BadRequest(f"{name}: found a picture, expected text: pictures go into a user's messages", name)
    return content


def content_of(entry: Fields, name: str, optional: bool = False) -> chat.Content:
    """A text, or parts that are texts and pictures."""
    value = entry.get(name)
    if isinstance(value, str):
        return value
    if value is None and optional:
        return ""
    if not isinstance(value, list):
        raise entry.fail(name, "a text or a list of parts")
    return content_from([_part(part) for part in entry.objects(name)])


def content_from(parts: Sequence[chat.Part]) -> chat.Content:
    """Parts as a message holds them: text alone as one."""
    texts = [part for part in parts if isinstance(part, str)]
    return "".join(texts) if len(texts) == len(parts) else parts


def _part(part: Fields) -> chat.Part:
    kind = part.text("type", "text")
    if kind in ("text", "input_text", "output_text"):
        return part.text("text", "") or ""
    if kind not in ("image_url", "input_image"):
        name = f"{part.path}.type"
        raise BadRequest(f"{name}: found {kind!r:.60}: this model reads texts and pictures", name)
    nested = part.get("image_url")
    holder, name = (part.object("image_url") or part, "url") if isinstance(nested, dict) else (part, "image_url")
    url = holder.text(name)
    if url is None:
        raise holder.fail(name, "a picture, data:image/…;base64,…")
    pan_and_scan = holder.text("detail") == "high"
    return picture_of(url, f"{holder.path}.{name}", pan_and_scan)


def picture_of(url: str, param: str, pan_and_scan: bool = False) -> Image:
    """A picture that a request holds, which is decoded only when it is known to fit. Raises BadRequest."""
    try:
        return from_data_url(url, param, pan_and_scan)
    except InvalidRequest as error:
        raise BadRequest(str(error), param) from None
