"""What is read and what of it is scored: texts cut into sequences by a protocol."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ...runtime.arrays import Ints
from ...runtime.errors import InvalidRequest
from ...runtime.files.text_file import read_text_file
from ...runtime.text.chat import Message, render
from ...runtime.text.tokenizer import Tokenizer
from ...runtime.vision.eye import Eye
from ...runtime.vision.image import Image

PROTOCOLS = ("chunks", "long", "written", "chat")
WRITTEN = ("written", "chat")
"""Those in which what is scored was written by the reference."""
CHUNK = 512  # tokens in a chunk, unless something else is asked for
BLOCK = 128  # scored positions of a long sequence that are drawn together in the bootstrap


@dataclass(frozen=True)
class Text:
    path: Path
    sha256: str
    content: str
    ids: Ints  # <bos> and the whole text


@dataclass(frozen=True)
class Passage:
    """One sequence: `ids` (n,) begin with <bos>, in place of the token `start` of its text; or a chat that a `line` of
    its text begins, where `start` is 0, about a `picture`, whose ids are below 0.

    Scored are the logits of the positions `first` … n − 2 by the tokens that follow them.
    """

    text: int
    start: int
    ids: Ints
    first: int
    line: int | None = None
    picture: Path | None = None

    @property
    def place(self) -> str:
        """Where it lies in its text, in words."""
        about = "" if self.picture is None else f" about {self.picture.name}"
        return f"the sequence at token {self.start}" if self.line is None else f"the chat of line {self.line}{about}"

    @property
    def scored(self) -> int:
        return len(self.ids) - 1 - self.first

    def units(self, protocol: str) -> npt.NDArray[np.int64]:
        """Which of the passage's own bootstrap units each scored position belongs to."""
        scored = np.arange(self.scored)
        return scored // BLOCK if protocol == "long" else np.zeros_like(scored)


def read_texts(paths: Sequence[Path], tokenizer: Tokenizer) -> list[Text]:
    """Raises InvalidRequest for a file that is not UTF-8, and for a text given twice, which would count twice."""
    texts: list[Text] = []
    for path in paths:
        content, sha256 = read_text_file(path)
        for other in texts:
            if other.sha256 == sha256:
                raise InvalidRequest(
                    f"--text: {path}: found the text of {other.path} again, expected each text once; leave one out"
                )
        texts.append(Text(path, sha256, content, np.array(tokenizer.encode(content, bos=True), np.int64)))
    return texts


def sequence_length(asked: int | None, protocol: str, context: int) -> int:
    """Tokens in a sequence: what was asked for, or CHUNK, or for "long" the whole `context` of the models.

    Raises InvalidRequest for what no model was made for.
    """
    chunk = (context if protocol == "long" else min(CHUNK, context)) if asked is None else asked
    if not 4 <= chunk <= context:
        raise InvalidRequest(f"--chunk: found {chunk}, expected 4 to {context}, what all of the models were made for")
    return chunk


def cut(texts: Sequence[Text], protocol: str, chunk: int, limit: int | None = None) -> list[Passage]:
    """The passages of the texts, at most `limit` of each.

    "chunks", as llama.cpp's perplexity tool: whole chunks of `chunk` tokens, the first token of each replaced by
    <bos>, of which chunk/2 … chunk−2 are scored; "written" the same. "long": sequences of up to `chunk` tokens, scored
    from the first.
    Raises InvalidRequest for texts that are too short.
    """
    passages: list[Passage] = []
    for index, text in enumerate(texts):
        before = len(passages)
        for start in range(0, len(text.ids), chunk):
            ids = text.ids[start : start + chunk].copy()
            ids[0] = text.ids[0]
            if protocol == "long" and (len(ids) > BLOCK or (start == 0 and len(ids) > 1)):
                passages.append(Passage(index, start, ids, 0))
            elif protocol in ("chunks", "written") and len(ids) == chunk:
                passages.append(Passage(index, start, ids, chunk // 2))
        if len(passages) == before:
            raise InvalidRequest(
                f"{text.path}: found {len(text.ids)} tokens, expected at least {chunk}; give more text or a smaller "
                "--chunk"
            )
    return list(first_of_each(passages, limit).values())


def begun_chats(
    texts: Sequence[Text], tokenizer: Tokenizer, eye: Eye | None = None, pictures: Sequence[tuple[Path, Image]] = ()
) -> list[Passage]:
    """Chats that await their answer: every line of the texts is what a user says, in Gemma's template, of each of the
    `pictures`, where there are any.

    Raises InvalidRequest where there is none, and for a vocabulary without turns.
    """
    shown: Sequence[tuple[Path | None, Image | None]] = pictures or [(None, None)]
    found = []
    for index, text in enumerate(texts):
        for number, line in enumerate(text.content.split("\n"), 1):
            if not line.strip():
                continue
            for path, image in shown:
                message = Message("user", line if image is None else [image, line])
                ids = np.array(render(tokenizer, [message], eye=eye), np.int64)
                found.append(Passage(index, 0, ids, len(ids) - 1, line=number, picture=path))
    if not found:
        raise InvalidRequest(f"{texts[0].path}: found no line, expected a user's message on each")
    return found


def check_room(chats: Iterable[Passage], texts: Sequence[Text], chunk: int) -> None:
    """Raises InvalidRequest for a line that leaves no room for an answer in `chunk` tokens."""
    for chat in chats:
        if len(chat.ids) >= chunk:
            raise InvalidRequest(
                f"{texts[chat.text].path}: line {chat.line}: found {len(chat.ids)} tokens with "
                f"{'the template' if chat.picture is None else 'the template and the picture'}, "
                f"expected fewer than the {chunk} of --chunk; take a larger one, or the line out"
            )


def first_of_each(passages: Sequence[Passage], limit: int | None) -> dict[int, Passage]:
    """At most `limit` passages of each text, by their place among all."""
    seen = Counter[int]()
    chosen = {}
    for number, passage in enumerate(passages):
        if limit is None or seen[passage.text] < limit:
            chosen[number] = passage
        seen[passage.text] += 1
    return chosen
