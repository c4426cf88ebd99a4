"""Measures what quantization cost: candidates and their reference read the same texts side by side."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from ...runtime.errors import InvalidRequest
from ...runtime.text.chat import template_is_known
from ...runtime.version import bezel_version
from ...runtime.vision.image import Image
from ..progress import Progress, silent
from ..spread import Spread, here
from .passages import WRITTEN, begun_chats, check_room, cut, first_of_each, read_texts, sequence_length
from .result import Effect, MeasuredPicture, MeasuredText, Measurement, Reference
from .scoring import Subjects, compute
from .state import KeptResults
from .subjects import Opener, Spec, Subject, calibration_warnings, key_of, seeing
from .summary import Pooled, describe, pairs
from .writing import with_answers


def measure(
    candidates: Sequence[Spec],
    reference: Spec,
    texts: Sequence[Path],
    *,
    pictures: Sequence[Path] = (),
    protocol: str = "chunks",
    chunk: int | None = None,
    limit: int | None = None,
    effects: bool = False,
    confidence: float = 0.95,
    threads: int | None = None,
    states: Path,
    progress: Progress = silent,
    spread: Spread = here,
) -> Measurement:
    """Compare every candidate, of which there is at least one, with the reference over the texts.

    `protocol` is one of PROTOCOLS, `chunk` the tokens in a sequence (default: 512, or for "long" as many as every model
    takes) and `limit` the most sequences of each text. In a chat each line is said of each of the `pictures`. `effects`
    also measures weights, activations, keys and values, and the eye apart. What has been computed is kept in the folder
    `states`, and not computed again; `spread` says where the passages are computed.
    Raises InvalidRequest, and what opening the models raises.
    """
    if pictures:
        if protocol != "chat":
            raise InvalidRequest(f"--image: found pictures with --protocol {protocol}, expected chat: lines about them")
        candidates, reference = [seeing(spec) for spec in candidates], seeing(reference)
    work = Subjects(candidates, reference, effects, Opener(threads))
    exact = work.subjects[0]
    chunk = sequence_length(chunk, protocol, min(subject.config.context_length for subject in work.subjects))
    read, shown = read_texts(texts, exact.tokenizer), [(path.absolute(), Image(path)) for path in pictures]
    if protocol == "chat":
        passages = begun_chats(read, exact.tokenizer, exact.eye, shown)
    else:
        passages = cut(read, protocol, chunk)
    seen = [MeasuredPicture(str(path), image.sha256) for path, (_, image) in zip(pictures, shown, strict=True)]
    key = {
        "texts": [text.sha256 for text in read],
        "protocol": protocol,
        "chunk": chunk,
        "passages": [(passage.text, passage.start, passage.line, len(passage.ids)) for passage in passages],
        **({"pictures": [picture.sha256 for picture in seen]} if seen else {}),
    }
    chosen = first_of_each(passages, limit)
    if protocol == "chat":
        check_room(chosen.values(), read, chunk)
    if protocol in WRITTEN:
        kept = KeptResults(states, {**key, "writer": key_of(reference)})
        chosen = with_answers(exact, chosen, chunk, kept, progress)
    found, passages = compute(work, chosen, key, states, progress, spread), list(chosen.values())
    pooled = [Pooled(arrays, passages, protocol, confidence) for arrays in found]
    compared = list(zip(work.comparisons, pooled, strict=True))
    # The result takes its candidates in the order of the command line.
    main = [(work.subjects[c.candidate], p) for c, p in compared if c.effect is None]
    return Measurement(
        time=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        tool=f"bezel {bezel_version()}",
        protocol=protocol,
        chunk=chunk,
        texts=[MeasuredText(str(text.path), text.sha256, len(text.ids)) for text in read],
        pictures=seen,
        chunks=len(passages),
        scored=sum(passage.scored for passage in passages),
        confidence=confidence,
        warnings=[
            *pooled[0].warnings(),
            *(_template_warnings(exact) if protocol == "chat" else ()),
            *calibration_warnings(work.candidates, read),
        ],
        reference=Reference(**vars(exact.facts), perplexity=pooled[0].reference_perplexity()),
        candidates=[describe(s.facts, p, passages, read, exact.tokenizer, protocol, chunk) for s, p in main],
        pairs=pairs([(subject.name, p) for subject, p in main]),
        effects=[Effect(c.of, c.effect, p.metrics()) for c, p in compared if c.effect is not None],
    )


def _template_warnings(reference: Subject) -> list[str]:
    if template_is_known(reference.chat_template):
        return []
    has = "no chat template" if reference.chat_template is None else "a chat template that is not one of Gemma's"
    return [f"{reference.name} has {has}: it was asked in Gemma's own, which it may never have seen"]
