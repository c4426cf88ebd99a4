"""The worst case by search: a few tokens changed, chosen so that a rounded model leaves the exact one most.

Greedy, a token at a time. The gradient of the divergence with respect to what is embedded says, to first order, what
each other token would do in each place (the step of FGM, Goodfellow et al. 2015, taken to tokens that there are, as
HotFlip, Ebrahimi et al. 2018, does); those that promise most for their distance are tried. How far a text has moved is
the word mover's distance (Kusner et al. 2015) on the reference's own embedding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ...export.sources.checkpoint import Checkpoint
from ...export.sources.opening import open_checkpoint
from ...export.tuning.targets import exact_weights
from ...export.tuning.torch_model import TorchOps, hidden_of, in_memory
from ...runtime.errors import InvalidRequest
from ...runtime.files.memory import available_memory
from ...runtime.model.forward import Weights, head_of, logits
from ...runtime.text.tokenizer import Tokenizer
from ...runtime.text.vocabulary import NORMAL, SPACE
from ...runtime.version import bezel_version
from ..loss.intervals import FEW_UNITS, Bootstrap, Interval
from ..loss.metrics import same_top
from ..loss.passages import Passage, Text, cut, read_texts, sequence_length
from ..loss.result import MeasuredText
from ..loss.scoring import Subjects, compute
from ..loss.state import Arrays, KeptResults, number_of
from ..loss.subjects import Opener, Spec, calibration_warnings, key_of
from ..progress import Progress, silent
from ..spread import Spread, here
from .result import FoundPassage, Search, SearchLoss, Toll
from .stress import DISTANCE, SEARCH_CHUNK, SEARCH_PASSAGES

DRAWS = 16  # of random tokens as far away, which a search must beat
_TRIED, _IN_A_PLACE = 24, 3  # changes that the gradient promises most of are tried, and so many of one place
_NEAR = 64  # tokens about as far away, of which a random one is drawn
_ATTEMPTS = 20  # at a token that leaves the text one that is read as it was written

Ids = npt.NDArray[np.int64]


def search(
    candidates: Sequence[Spec],
    reference: Spec,
    texts: Sequence[Path],
    *,
    distance: float = DISTANCE,
    chunk: int | None = None,
    limit: int = SEARCH_PASSAGES,
    confidence: float = 0.95,
    threads: int | None = None,
    states: Path,
    progress: Progress = silent,
    spread: Spread = here,
) -> Search:
    """Change the first half of passages so that on their second half a candidate leaves the reference, for each.

    The texts are cut into passages of `chunk` tokens, at most `limit` of each; none moves by more than `distance`, in
    units of the mean distance between two of its tokens: 0.05 are at most 5 % of the tokens by unrelated ones, or more
    by nearer ones. Every candidate is then measured on all that was found. What has been computed is kept in `states`.
    Raises InvalidRequest, and what opening the models raises.
    """
    if not 0 < distance <= 1:
        raise InvalidRequest(f"--distance: found {distance:g}, expected above 0 and at most 1")
    for spec in (reference, *candidates):
        if not (spec.is_checkpoint or spec.is_gguf):
            raise InvalidRequest(f"{spec.path}: a search takes GGUF files and checkpoints, whose weights it can read")
    if threads:
        torch.set_num_threads(threads)
    work = Subjects(candidates, reference, False, Opener(threads))
    exact, names = work.subjects[0], [subject.name for subject in work.candidates]
    context = min(subject.config.context_length for subject in work.subjects)
    chunk = sequence_length(min(SEARCH_CHUNK, context) if chunk is None else chunk, "chunks", context)
    read = read_texts(texts, exact.tokenizer)
    passages = _passages(exact.tokenizer, read, chunk, limit)
    key = {"search": 1, "texts": [text.sha256 for text in read], "chunk": chunk}
    changed = [
        _changed(reference, spec, exact.tokenizer, passages, distance, states, key, progress) for spec in candidates
    ]
    reads: dict[int, Passage] = {}
    for passage, *of_each in zip(passages, *changed, strict=True):
        for ids in (passage.ids, *(ids for found in of_each for ids in (found["ids"], *found["random"]))):
            reads[_number(ids)] = Passage(passage.text, passage.start, ids, passage.first)
    records = [
        dict(zip(reads, (arrays["records"] for arrays in of_one), strict=True))
        for of_one in compute(work, reads, key, states, progress, spread)
    ]
    pieces, measured = exact.tokenizer.piece, range(len(names))
    found = {
        name: [
            FoundPassage(
                text=str(read[passage.text].path),
                start=passage.start,
                read=passage.first + 1,
                before=[pieces(int(i)) for i in passage.ids],
                places=(places := np.flatnonzero(got["ids"] != passage.ids)).tolist(),
                after=[pieces(int(i)) for i in got["ids"][places]],
                distance=float(got["distance"]),
                losses=[_loss(records[i], passage.ids, got) for i in measured],
            )
            for passage, got in zip(passages, of_one, strict=True)
        ]
        for name, of_one in zip(names, changed, strict=True)
    }
    bootstrap = Bootstrap(len(passages), confidence)
    return Search(
        time=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        tool=f"bezel {bezel_version()}",
        texts=[MeasuredText(str(text.path), text.sha256, len(text.ids)) for text in read],
        chunk=chunk,
        distance=distance,
        draws=DRAWS,
        confidence=confidence,
        warnings=[*_warnings(found), *calibration_warnings(work.candidates, read)],
        reference=exact.facts,
        candidates=[subject.facts for subject in work.candidates],
        found=found,
        tolls=[_toll(a, b, i, found[a], bootstrap) for a in names for i, b in enumerate(names)],
    )


def _warnings(found: Mapping[str, Sequence[FoundPassage]]) -> Iterator[str]:
    for name, passages in found.items():
        still = sum(not passage.places for passage in passages)
        if still:
            yield f"{name}: in {still} of {len(passages)} passages no change that helps was found so near"
    if len(passages) < FEW_UNITS:
        yield f"only {len(passages)} passages: the intervals are too narrow, or missing"


def _passages(tokenizer: Tokenizer, texts: Sequence[Text], chunk: int, limit: int) -> list[Passage]:
    """Those of `cut` whose text is read back as their ids, more or less a token."""
    found = []
    for passage in cut(texts, "chunks", chunk, limit):
        ids = np.array(tokenizer.encode(tokenizer.decode(passage.ids[1:].tolist()), bos=True))
        if _reads_back(tokenizer, ids):
            found.append(Passage(passage.text, passage.start, ids, len(ids) // 2))
    return found


def _reads_back(tokenizer: Tokenizer, ids: Ids) -> bool:
    again = tokenizer.encode(tokenizer.decode(ids[1:].tolist()), bos=True)
    return np.array_equal(again, ids)


def _number(ids: Ids) -> int:
    """What a passage is kept as."""
    return number_of(ids.tobytes())


def _changed(
    reference: Spec,
    candidate: Spec,
    tokenizer: Tokenizer,
    passages: Sequence[Passage],
    distance: float,
    states: Path,
    key: dict[str, object],
    progress: Progress,
) -> list[Arrays]:
    """For each passage its changed `ids`, as many with `random` changes (draws, n), and its `distance`."""
    kept = KeptResults(
        states, {**key, "distance": distance, "reference": key_of(reference), "candidate": key_of(candidate)}
    )
    out: list[Arrays] = []
    hunt: _Hunt | None = None
    for i, passage in enumerate(passages):
        progress(i, len(passages), f"searching for {candidate.path.name}")
        number = _number(passage.ids)
        known = kept.load(number)
        if known is None:
            hunt = hunt or _Hunt(_Model(reference), _Model(candidate), tokenizer)
            kept.save(number, known := dict(hunt(passage, distance)))
        out.append(known)
    return out


class _Model:
    """A model's weights as tensors, which quantized ones come to as well."""

    def __init__(self, spec: Spec) -> None:
        with open_checkpoint(spec.path, quantized=True) as checkpoint:
            _check_memory(checkpoint)
            self.config, weights = checkpoint.config, exact_weights(checkpoint)
            self.weights = Weights(in_memory(weights.shared), [in_memory(layer) for layer in weights.layers])
        self.embedding: Tensor = self.weights.shared["token_embd"]

    def embed(self, ids: Tensor) -> Tensor:
        """(n, length, hidden) of (n, length)."""
        rows: Tensor = self.embedding[ids] * self.config.embedding_scale
        return rows

    def log_p(self, embedded: Tensor, first: int) -> Tensor:
        """(n, scored, vocab): of what follows the positions from `first` to the last but one."""
        h = hidden_of(self.config, self.weights, embedded)
        scored = h.unflatten(0, embedded.shape[:2])[:, first:-1]
        found: Tensor = logits(self.config, TorchOps(), head_of(self.config, self.weights), scored)
        return found.log_softmax(-1)


def _check_memory(checkpoint: Checkpoint) -> None:
    need, free = 4 * sum(math.prod(spec.shape) for spec in checkpoint.specs) + 1_000_000_000, available_memory()
    if free is not None and need > free:
        raise InvalidRequest(
            f"{checkpoint.path}: a search takes about {need / 1e9:.1f} GB of memory for it, and "
            f"{free / 1e9:.1f} GB are free"
        )


class _Hunt:
    """Finds the changes of a passage that make `rounded` leave `exact`."""

    def __init__(self, exact: _Model, rounded: _Model, tokenizer: Tokenizer) -> None:
        self._exact, self._rounded, self._tokenizer = exact, rounded, tokenizer
        self._squares = exact.embedding.square().sum(1)
        kinds = [(tokenizer.kind(i), tokenizer.piece(i)) for i in range(tokenizer.vocab_size)]
        # A word stays a word, and what continues one continues one.
        self._begins = torch.tensor([piece.startswith((SPACE, " ")) for _, piece in kinds])
        self._usable = torch.tensor(
            [kind == NORMAL and piece.strip(SPACE + " ").isprintable() for kind, piece in kinds]
        )

    def __call__(self, passage: Passage, distance: float) -> Arrays:
        ids, first = passage.ids, passage.first
        unit = self._unit(ids)
        found, left = ids.copy(), distance * len(ids) * unit
        loss = float(self._divergence(torch.from_numpy(found)[None], first)[0])
        while step := self._step(found, ids, first, loss, left):
            found, far, loss = step
            left -= far
        draws = self._as_far(ids, found, np.random.default_rng(_number(ids)))
        moved = self._moved(ids, found) / unit if unit else 0.0
        return {"ids": found, "random": draws, "distance": np.array(moved)}

    def _divergence(self, ids: Tensor, first: int) -> Tensor:
        with torch.no_grad():
            return self._kld(*(model.log_p(model.embed(ids), first) for model in (self._exact, self._rounded)))

    def _kld(self, p: Tensor, q: Tensor) -> Tensor:
        return (p.exp() * (p - q)).sum(-1).mean(-1)

    def _step(self, found: Ids, ids: Ids, first: int, loss: float, left: float) -> tuple[Ids, float, float] | None:
        """The text with one more token changed, how far that is, and its divergence; None if nothing helps."""
        embedded = [
            model.embed(torch.from_numpy(found)[None]).requires_grad_() for model in (self._exact, self._rounded)
        ]
        p, q = (model.log_p(rows, first) for model, rows in zip((self._exact, self._rounded), embedded, strict=True))
        gradients = torch.autograd.grad(self._kld(p, q).sum(), embedded)
        promising: list[tuple[float, int, int, float]] = []
        for place in range(1, first + 1):
            if found[place] != ids[place]:
                continue
            far = self._far(int(ids[place]))
            gain = sum(
                (model.embedding @ g[0, place] - model.embedding[ids[place]] @ g[0, place])
                * model.config.embedding_scale
                for model, g in zip((self._exact, self._rounded), gradients, strict=True)
            )
            rate = torch.where(far <= left, gain / far, -torch.inf)
            best, tokens = rate.topk(_IN_A_PLACE)
            promising += [(float(r), place, int(t), float(far[t])) for r, t in zip(best, tokens, strict=True) if r > 0]
        tried = list(self._usable_changes(found, sorted(promising, reverse=True)))
        if not tried:
            return None
        losses = self._divergence(torch.from_numpy(np.stack([text for text, _ in tried])), first)
        rates = (losses - loss) / torch.tensor([far for _, far in tried])
        best_of_all = int(rates.argmax())
        if rates[best_of_all] <= 0:
            return None
        return *tried[best_of_all], float(losses[best_of_all])

    def _usable_changes(
        self, found: Ids, promising: Sequence[tuple[float, int, int, float]]
    ) -> Iterator[tuple[Ids, float]]:
        """The first few that leave a text that is read as it is written, and how far each is."""
        n = 0
        for _, place, token, far in promising:
            text = found.copy()
            text[place] = token
            if _reads_back(self._tokenizer, text):
                yield text, far
                n += 1
            if n == _TRIED:
                return

    def _as_far(self, ids: Ids, found: Ids, random: np.random.Generator) -> Ids:
        """The passage with random tokens where others were found, each as far from what was there: (draws, n)."""
        near = {}
        for place in np.flatnonzero(found != ids):
            fars = self._far(int(ids[place]))
            near[place] = (fars - fars[found[place]]).abs().topk(_NEAR, largest=False).indices.numpy()
        draws = np.repeat(ids[None], DRAWS, axis=0)
        for draw in draws:
            for place, tokens in near.items():
                for token in random.permutation(tokens)[:_ATTEMPTS]:
                    draw[place] = token
                    if _reads_back(self._tokenizer, draw):
                        break
                else:
                    draw[place] = ids[place]
        return draws

    def _far(self, token: int) -> Tensor:
        """How far every token is from one, (vocab,); infinitely what cannot stand in its place."""
        embedding = self._exact.embedding
        squares = (self._squares - 2 * (embedding @ embedding[token])) + embedding[token].square().sum()
        fits = self._usable & (self._begins == self._begins[token])
        fits[token] = False
        return torch.where(fits, squares.clamp_min(1e-12).sqrt(), torch.inf)

    def _unit(self, ids: Ids) -> float:
        """The mean distance between two different tokens of a text."""
        rows = self._exact.embedding[torch.from_numpy(np.unique(ids[1:]))]
        n = len(rows)
        return float(torch.cdist(rows, rows).sum()) / max(1, n * (n - 1))

    def _moved(self, a: Ids, b: Ids) -> float:
        """The word mover's distance of two texts with as many tokens, each of the same weight."""
        rows = (self._exact.embedding[torch.from_numpy(ids)] for ids in (a, b))
        cost = torch.cdist(*rows, compute_mode="donot_use_mm_for_euclid_dist").numpy()  # equal rows are 0 apart
        return float(cost[linear_sum_assignment(cost)].mean())


def _loss(records: dict[int, npt.NDArray[np.void]], ids: Ids, found: Arrays) -> SearchLoss:
    plain, changed = records[_number(ids)], records[_number(found["ids"])]
    draws = [records[_number(one)] for one in found["random"]]
    klds = [float(draw["kld"].mean()) for draw in draws]
    return SearchLoss(
        plain=float(plain["kld"].mean()),
        found=float(changed["kld"].mean()),
        random=float(np.mean(klds)),
        random_worst=max(klds),
        plain_flips=float(np.mean(~same_top(plain))),
        found_flips=float(np.mean(~same_top(changed))),
        random_flips=float(np.mean([~same_top(draw) for draw in draws])),
    )


def _toll(searched: str, measured: str, place: int, found: Sequence[FoundPassage], bootstrap: Bootstrap) -> Toll:
    def mean(name: str) -> Interval:
        values = np.array([getattr(passage.losses[place], name) for passage in found])
        return bootstrap.mean(values, np.arange(len(values)), 0)

    figures = (mean(name) for name in ("plain", "random", "random_worst", "found", "found_flips"))
    return Toll(searched, measured, *figures)
