"""`bezel stress --search`: that the search sees the models' own divergence, keeps its distance, and beats chance."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bezel.bench.loss.metrics import compare
from bezel.bench.loss.subjects import Opener, Spec
from bezel.bench.stress.result import Search
from bezel.export.gguf.writer import export_gguf
from bezel.export.sources.opening import open_checkpoint
from bezel.runtime.commands.main import main
from bezel.runtime.errors import InvalidRequest
from click.testing import CliRunner
from tiny import TEXT, checkpoint_folder

torch = pytest.importorskip("torch")
pytest.importorskip("scipy")
from bezel.bench.stress import search as module  # noqa: E402

CHUNK, DISTANCE = 32, 0.08


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Spec]:
    folder = tmp_path_factory.mktemp("models")
    exact = checkpoint_folder("gemma2-gqa", folder)
    with open_checkpoint(exact) as source:
        for name in ("q4_0", "q8_0"):
            export_gguf(source, folder / f"{name}.gguf", name)
    rounded = {name: Spec(folder / f"{name}.gguf", "reference", "f32", "f32") for name in ("q4_0", "q8_0")}
    return {"exact": Spec(exact, "reference", "f32", "f32"), **rounded}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "tale.txt"
    path.write_text(TEXT.read_text("utf-8")[:6000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Spec], text: Path) -> Callable[..., Search]:
    states = tmp_path_factory.mktemp("states")

    def call(*names: str, **options: Any) -> Search:
        asked = {"chunk": CHUNK, "limit": 6, "distance": DISTANCE, "states": states} | options
        return module.search([models[name] for name in names], models["exact"], [text], **asked)

    return call


@pytest.fixture(scope="module")
def hunt(models: dict[str, Spec]) -> module._Hunt:
    tokenizer = Opener().open(models["exact"]).tokenizer
    return module._Hunt(module._Model(models["exact"]), module._Model(models["q4_0"]), tokenizer)


def test_its_divergence_is_what_the_engines_have(hunt: module._Hunt, models: dict[str, Spec]) -> None:
    ids = np.random.default_rng(3).integers(4, 1000, (2, 40))
    found = hunt._divergence(torch.from_numpy(ids), 10)
    for row, value in zip(ids, found.tolist(), strict=True):
        specs = [replace(models[name], ring=False) for name in ("exact", "q4_0")]
        logits = [Opener().open(spec).start(40).forward(row[:-1], 39)[10:] for spec in specs]
        (records,) = compare(logits, [(0, 1)], 10, row[11:])
        assert value == pytest.approx(records["kld"].mean(), rel=2e-4)


def test_gradients(hunt: module._Hunt) -> None:
    """Of the divergence with respect to what each model embeds, against a small step along them."""
    ids = torch.from_numpy(np.random.default_rng(3).integers(4, 1000, (1, 24)))
    models = hunt._exact, hunt._rounded
    embedded = [model.embed(ids).requires_grad_() for model in models]

    def divergence() -> Any:
        return hunt._kld(*(model.log_p(rows, 8) for model, rows in zip(models, embedded, strict=True))).sum()

    gradients = torch.autograd.grad(divergence(), embedded)
    length = float(sum(gradient.square().sum() for gradient in gradients))
    values, step = [], 0.02 / length**0.5
    with torch.no_grad():
        for sign in (1, -2):
            for rows, gradient in zip(embedded, gradients, strict=True):
                rows += sign * step * gradient
            values.append(float(divergence()))
    assert values[0] - values[1] == pytest.approx(2 * step * length, rel=0.05)


def test_the_distance(hunt: module._Hunt) -> None:
    ids = np.random.default_rng(3).choice(np.arange(300, 1000), 12, replace=False)
    other = ids.copy()
    other[5] = 1100
    embedding = hunt._exact.embedding.numpy()
    far = np.linalg.norm(embedding[other[5]] - embedding[ids[5]])
    assert hunt._moved(ids, ids) == hunt._moved(ids, ids[::-1].copy()) == 0
    assert hunt._moved(ids, other) == pytest.approx(far / 12, rel=1e-5)
    pairs = [np.linalg.norm(embedding[a] - embedding[b]) for a in ids[1:] for b in ids[1:] if a != b]
    assert hunt._unit(ids) == pytest.approx(np.mean(pairs), rel=1e-4)


def test_what_it_finds(run: Callable[..., Search]) -> None:
    found = run("q4_0", "q8_0")
    tokenizer = Opener().open(Spec(Path(found.reference.path), "reference", "f32", "f32")).tokenizer
    pieces = {tokenizer.piece(i): i for i in range(tokenizer.vocab_size)}
    for name, passages in found.found.items():
        place = ["q4_0", "q8_0"].index(name)
        assert any(passage.places for passage in passages)
        for passage in passages:
            assert all(0 < at < passage.read for at in passage.places)
            assert passage.distance <= DISTANCE
            assert passage.losses[place].found >= passage.losses[place].plain
            tokens = list(passage.before)
            for at, piece in zip(passage.places, passage.after, strict=True):
                assert piece.startswith("▁") == tokens[at].startswith("▁")
                assert piece != tokens[at]
                tokens[at] = piece
            ids = [pieces[piece] for piece in tokens]
            assert tokenizer.encode(tokenizer.decode(ids[1:]), bos=True) == ids
    tolls = {(toll.searched, toll.measured): toll for toll in found.tolls}
    assert len(tolls) == 4
    for name in ("q4_0", "q8_0"):
        own = tolls[name, name]
        assert own.found.value > own.random_worst.value > own.random.value
    assert tolls["q4_0", "q4_0"].plain == tolls["q8_0", "q4_0"].plain
    losses = [passage.losses[1].found for passage in found.found["q4_0"]]
    assert tolls["q4_0", "q8_0"].found.value == pytest.approx(np.mean(losses))


def test_random_changes_are_in_the_same_places_and_as_far(hunt: module._Hunt, monkeypatch: pytest.MonkeyPatch) -> None:
    """All draws from distances that are found once."""
    tokenizer = hunt._tokenizer
    ids = np.array(tokenizer.encode("Once upon a time there was a King who had a daughter whom he loved.", bos=True))
    found = ids.copy()
    for place in (3, 7):
        found[place] = int(hunt._far(int(ids[place])).argsort()[400])  # neither near nor far
    asked: list[int] = []
    monkeypatch.setattr(hunt, "_far", lambda token: asked.append(token) or module._Hunt._far(hunt, token))
    draws = hunt._as_far(ids, found, np.random.default_rng(0))
    assert asked == [ids[3], ids[7]]
    assert len(draws) == len(np.unique(draws, axis=0)) == module.DRAWS
    for out in draws:
        places = np.flatnonzero(out != ids)
        assert places.tolist() == [3, 7]
        for place in places:
            fars = hunt._far(int(ids[place]))
            nearer = (fars - fars[found[place]]).abs() < (fars[out[place]] - fars[found[place]]).abs()
            assert int(nearer.sum()) < 64
        assert tokenizer.encode(tokenizer.decode(out[1:].tolist()), bos=True) == out.tolist()


def test_a_passage_of_one_token(run: Callable[..., Search], text: Path) -> None:
    """Nothing is far from anything: nothing moves, and nothing fails."""
    before = text.read_text("utf-8")
    text.write_text(" the" * 400, encoding="utf-8")
    try:
        found = run("q4_0", limit=1)
    finally:
        text.write_text(before, encoding="utf-8")
    assert [passage.places for passage in found.found["q4_0"]] == [[]]
    assert found.found["q4_0"][0].distance == 0


def test_it_goes_on(run: Callable[..., Search], monkeypatch: pytest.MonkeyPatch) -> None:
    first = run("q4_0")
    monkeypatch.setattr(module, "_Hunt", None)
    again = run("q4_0")
    assert again.found == first.found
    assert again.tolls == first.tolls


def test_what_it_needs(
    run: Callable[..., Search], models: dict[str, Spec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidRequest, match="--distance: found 0, expected above 0 and at most 1"):
        run("q4_0", distance=0.0)
    onnx = tmp_path / "model.onnx"
    onnx.mkdir()
    with pytest.raises(InvalidRequest, match="a search takes GGUF files and checkpoints"):
        module.search([Spec(onnx)], models["exact"], [TEXT], states=tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(module, "available_memory", lambda: 1000)
        with pytest.raises(InvalidRequest, match=r"takes about 1\.0 GB of memory for it, and 0\.0 GB are free"):
            module._Model(models["q4_0"])
    monkeypatch.setitem(sys.modules, "bezel.bench.stress.search", None)
    command = ["stress", str(models["q4_0"].path), "--reference", str(models["exact"].path), "--text", str(TEXT)]
    shown = CliRunner().invoke(main, [*command, "--search"])
    assert shown.exit_code == 1
    assert "pip install 'bezel-lm[tune]'" in shown.output


def test_the_command_and_its_report(text: Path, models: dict[str, Spec], tmp_path: Path) -> None:
    command = ["stress", str(models["q4_0"].path), "--reference", str(models["exact"].path), "--text", str(text)]
    command += ["--search", "--chunk", "32", "--chunks", "2", "--state", str(tmp_path / "states")]
    shown = CliRunner().invoke(main, [*command, "--html", str(tmp_path / "report.html")])
    assert shown.exit_code == 0, shown.output
    assert "worst random" in shown.output
    assert "q4_0, from 0" in shown.output
    page = (tmp_path / "report.html").read_text("utf-8")
    for words in ("Where a few words hurt: q4_0", "<mark>", "searched for q4_0", "before", "after"):
        assert words in page
    found = json.loads(CliRunner().invoke(main, [*command, "--json"]).stdout)
    assert found["bezel_search"] == 1
    assert len(found["found"]["q4_0"]) == 2
