"""`bezel stress`: what the poses do to a text, and that a pose's loss is what measuring the posed text alone says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from bezel.bench.loss.metrics import compare
from bezel.bench.loss.subjects import Opener, Spec
from bezel.bench.loss.writing import continuation
from bezel.bench.report.stress import write_report
from bezel.bench.stress import poses
from bezel.bench.stress import stress as stress_module
from bezel.bench.stress.poses import TEXT_CHANGES, posed
from bezel.bench.stress.result import ORIGIN, Stress, pose_name
from bezel.bench.stress.stress import stress
from bezel.bench.stress.tables import show
from bezel.export.calibration.rounding import export_calibrated
from bezel.export.gguf.writer import export_gguf
from bezel.export.sources.opening import open_checkpoint
from bezel.runtime.commands.main import main
from bezel.runtime.errors import InvalidRequest
from click.testing import CliRunner
from tiny import TEXT, checkpoint_folder

TINY = "gemma2-gqa"
TALE = "Once upon a time there was a King. He had three sons! Did he like them? Nobody knew; it was long ago."


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    found = {"exact": checkpoint_folder(TINY, folder)}
    with open_checkpoint(found["exact"]) as source:
        for name in ("q4_0", "q8_0"):
            found[name] = folder / f"{name}.gguf"
            export_gguf(source, found[name], name)
    return found


@pytest.fixture
def run(tmp_path: Path, models: dict[str, Path]) -> Callable[..., Stress]:
    def call(*names: str, length: int = 12000, **options: Any) -> Stress:
        text = tmp_path / "tale.txt"
        text.write_text(TEXT.read_text("utf-8")[:length], encoding="utf-8")
        exact = Spec(models["exact"], "reference", "f32", "f32")
        candidates = [exact if name == "exact" else Spec(models.get(name, name), "native") for name in names]
        asked: dict[str, Any] = {"chunk": 32, "limit": 6, "corners": 3, "states": tmp_path / "states"}
        return stress(candidates, exact, [text], **asked | options)

    return call


@pytest.mark.parametrize("name", TEXT_CHANGES)
def test_a_change_begins_with_none_and_grows(name: str) -> None:
    """At level 0 nothing changes; what a level changed is changed alike by a higher one, where that can be told."""
    change = TEXT_CHANGES[name]
    assert change(TALE, 0, Random(1)) == TALE
    assert change(TALE, 1, Random(1)) != TALE
    if name in ("case", "homoglyphs"):  # letter for letter
        low, high, all_of_it = (change(TALE, level, Random(1)) for level in (0.3, 0.6, 1))
        differing = [
            {i for i, (a, b) in enumerate(zip(TALE, x, strict=True)) if a != b} for x in (low, high, all_of_it)
        ]
        assert differing[0] < differing[1] < differing[2]
        assert all(high[i] == low[i] for i in differing[0])


def test_what_changes_do() -> None:
    always = Random(1)
    assert poses.case(TALE, 1, always) == TALE.upper()
    assert poses.digits("ab cde", 1, always).replace(" ", "").isdigit()
    assert [len(word) for word in poses.digits("ab cde", 1, always).split()] == [2, 3]
    assert poses.repetition("One. Two! ", 2, always) == "One. One. One. Two! Two! Two! "
    assert sorted(poses.shuffle(TALE, 1, Random(2)).split()) == sorted(TALE.split())
    assert set(poses.homoglyphs("ace", 1, always)).isdisjoint("ace")
    tale = "从前有一个国王。他有三个女儿！后来呢？"  # no spaces, and its own full stops
    assert poses.repetition(tale, 1, always) == "".join(
        part * 2 for part in ("从前有一个国王。", "他有三个女儿！", "后来呢？")
    )
    assert len(poses.digits(tale * 9, 1, always)) == len(tale * 9)
    assert " " not in poses.spacing("a b c d e", 1, always).replace("  ", "")
    assert posed(TALE, {"case": 0.5, "typos": 0.1}, "3") == posed(TALE, {"typos": 0.1, "case": 0.5}, "3")
    assert posed(TALE, {"typos": 0.1}, "3") != posed(TALE, {"typos": 0.1}, "4")


def test_a_pose_costs_what_reading_it_does(run: Callable[..., Stress], models: dict[str, Path]) -> None:
    """Against passages that are put together here, word by word, and both models run on them directly."""
    found = run("q4_0", levels={"case": [1.0], "depth": [40.0]}, grid=None, corners=0)
    assert [pose_name(pose.turned) for pose in found.poses] == ["as it is", "case 1", "depth 40"]
    opener = Opener()
    exact = opener.open(Spec(models["exact"], "reference", "f32", "f32"))
    rounded = opener.open(Spec(models["q4_0"], "native"))
    ids = exact.tokenizer.encode(Path(found.texts[0].path).read_text("utf-8"))
    for turned, case, depth in (({}, False, 0), ({"case": 1.0}, True, 0), ({"depth": 40.0}, False, 40)):
        klds, flips = [], []
        for i in range(6):
            text = exact.tokenizer.decode(ids[32 * i : 32 * i + 64])
            passage = exact.tokenizer.encode(text.upper() if case else text)[:31]
            before = [(ids + ids + ids)[len(ids) + 32 * i - depth + j] for j in range(depth)]
            read = np.array([exact.tokenizer.encode("", bos=True)[0], *before, *passage])
            logits = [
                np.concatenate([engine.forward(read[:-1][j : j + 1], 1) for j in range(len(read) - 1)])[depth + 16 :]
                for engine in (exact.start(128), rounded.start(128))
            ]
            (records,) = compare(logits, [(0, 1)], depth + 16, read[depth + 17 :])
            klds += records["kld"].tolist()
            flips += (records["top"][:, 0] != records["reference_top"][:, 0]).tolist()
        loss = found.candidates[0].losses[found.find(turned)]
        assert loss.kld.value == pytest.approx(np.mean(klds), rel=1e-3)
        assert loss.flips.value == pytest.approx(np.mean(flips))
        assert loss.more.value == pytest.approx(loss.kld.value - found.candidates[0].losses[ORIGIN].kld.value)


def test_poses_are_all_there_each_once(run: Callable[..., Stress]) -> None:
    found = run("q4_0", "q8_0", levels={"case": None, "typos": [0.1], "repetition": [2.0]}, grid=("typos", "case"))
    names = [pose_name(pose.turned) for pose in found.poses]
    assert names[0] == "as it is"
    assert len(names) == len(set(names))
    assert {"typos 0.1, case 0.25", "typos 0.1, case 0.5", "typos 0.1, case 1", "repetition 2"} <= set(names)
    assert found.levels == {"case": [0.25, 0.5, 1], "typos": [0.1], "repetition": [2.0]}
    assert [pose.changed for pose in found.poses[:2]] == [0, 6]
    assert all(len(candidate.losses) == len(names) for candidate in found.candidates)
    four, eight = found.candidates
    assert four.losses[four.worst].kld.value == max(loss.kld.value for loss in four.losses)
    assert all(a.kld.value > b.kld.value for a, b in zip(four.losses, eight.losses, strict=True))
    assert -1 <= found.transfer[0].rank_correlation <= 1


def test_the_reference_writes_what_comes_before(run: Callable[..., Stress], models: dict[str, Path]) -> None:
    exact = Opener().open(Spec(models["exact"], "reference", "f32", "f32"))
    begun = np.array(exact.tokenizer.encode("Once upon a time", bos=True))
    out = continuation(exact, begun, 12, 1.0, seed=1)
    assert (
        out.tolist()
        == continuation(exact, begun, 12, 1.0, seed=1).tolist()
        != continuation(exact, begun, 12, 1.0, 2).tolist()
    )
    assert not exact.tokenizer.special_ids & set(out.tolist())
    greedy, engine, ids = continuation(exact, begun, 4, 0.0, seed=0), exact.start(64), begun.tolist()
    for token in greedy:
        logits = exact.start(64).forward(np.array(ids), 1)[0]
        logits[list(exact.tokenizer.special_ids)] = -np.inf
        assert token == int(np.argmax(logits))
        ids.append(int(token))
    del engine
    found = run("q4_0", levels={"temperature": [1.5]}, grid=None, corners=0)
    plain, other = (loss.kld.value for loss in found.candidates[0].losses)
    assert plain != other


def test_it_goes_on(run: Callable[..., Stress], monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured is not measured again, whichever other poses are asked for; and the figures are the same."""
    levels = {"typos": [0.1], "temperature": [1.0]}
    first = run("q4_0", levels=levels, grid=None, corners=0)
    calls: list[int] = []
    monkeypatch.setattr("bezel.bench.stress.stress.continuation", lambda *_, **__: calls.append(1))
    monkeypatch.setattr("bezel.bench.loss.scoring.score", lambda *_, **__: calls.append(1))
    again = run("q4_0", levels=dict(reversed(levels.items())), grid=None, corners=0)
    assert not calls
    for pose, loss in zip(first.poses, first.candidates[0].losses, strict=True):
        assert again.candidates[0].losses[again.find(pose.turned)] == loss


def test_what_is_kept_is_each_passage_s_own(models: dict[str, Path], tmp_path: Path) -> None:
    """With other limits, too, by which the passages of a second text have other places."""
    tale, texts = TEXT.read_text("utf-8"), [tmp_path / "a.txt", tmp_path / "b.txt"]
    for i, text in enumerate(texts):
        text.write_text(tale[6000 * i : 6000 * (i + 1)], encoding="utf-8")
    exact, rounded = Spec(models["exact"], "reference", "f32", "f32"), Spec(models["q4_0"], "native")

    def run(states: str, limit: int) -> Stress:
        levels = {"typos": [0.2], "temperature": [1.0]}
        options: dict[str, Any] = {"chunk": 32, "levels": levels, "grid": None, "corners": 0}
        return stress([rounded], exact, texts, limit=limit, states=tmp_path / states, **options)

    run("before", 2)
    assert run("before", 4).candidates == run("alone", 4).candidates


def test_what_comes_before_is_no_part_of_the_passage(run: Callable[..., Stress]) -> None:
    """A text of n tokens has n less a stretch to come before one; the usual depths are no deeper."""
    with pytest.raises(InvalidRequest, match=r"depth: found 200, expected different levels above 0, up to 1[0-9]+"):
        run("q4_0", length=800, levels={"depth": [200.0]}, grid=None, limit=1)
    found = run("q4_0", length=800, levels={"depth": None}, grid=None, corners=0, limit=1)
    assert found.levels["depth"] == [4, 8, 16, 32]


def test_a_pose_in_name_only(run: Callable[..., Stress], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = run("q4_0", levels={"shuffle": [0.01], "case": [1.0]}, grid=None, corners=0, limit=1)
    assert [pose.changed for pose in found.poses] == [0, 0, 1]
    show(found)
    write_report(found, tmp_path / "report.html")
    for page in (capsys.readouterr().out, (tmp_path / "report.html").read_text("utf-8")):
        assert "shuffle 0.01 (changes nothing)" in page
        assert "case 1 (changes" not in page


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"levels": {"colour": None}}, "--turn: found 'colour', expected one of case, typos"),
        ({"levels": {"typos": [0.1, 0.1]}}, "typos: found 0.1, 0.1, expected different levels above 0, up to 1"),
        ({"levels": {"typos": [0.0]}}, "typos: found 0, expected"),
        ({"levels": {"typos": [float("nan")]}}, "typos: found nan, expected"),
        ({"levels": {"case": [1.5]}}, "case: found 1.5, expected different levels above 0, up to 1"),
        ({"levels": {"depth": [2.5]}}, "depth: found 2.5, expected whole numbers"),
        ({"levels": {"depth": [1e9]}}, "depth: found 1e+09, expected different levels above 0, up to 224"),
        (
            {"levels": {"case": [1.0]}, "grid": ("case", "typos")},
            "--grid: found 'typos', expected two of what is turned",
        ),
        ({"grid": ("case", "case")}, "--grid: found 'case,case', expected two"),
        ({"grid": ("case",)}, "--grid: found 'case', expected two parameters, as typos,case"),
        ({"chunk": 3}, "--chunk: found 3, expected 4 to 256"),
        ({"chunk": 256, "levels": {"depth": [1.0]}}, "depth: found 1, expected different levels above 0, up to 0"),
        ({"chunk": 256, "levels": {"case": [1.0]}, "grid": None, "length": 900}, "tokens, expected at least 513"),
        ({"length": 200}, "tokens, expected at least 65; give more text or a smaller --chunk"),
    ],
)
def test_errors(run: Callable[..., Stress], options: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        run("q4_0", **options)
    assert says in str(error.value)


def test_a_pose_that_leaves_too_little(run: Callable[..., Stress], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stress_module, "posed", lambda *_: "Once")
    with pytest.raises(InvalidRequest, match=r"tale\.txt: as it is: leaves 1 of 64 tokens, .* \(--turn\)"):
        run("q4_0", levels={"case": [1.0]}, grid=None, corners=0)


def test_a_candidate_calibrated_on_the_text_is_warned_of(
    run: Callable[..., Stress], models: dict[str, Path], tmp_path: Path
) -> None:
    plain = run("q4_0", levels={"case": [1.0]}, grid=None, corners=0)
    with open_checkpoint(models["exact"]) as source:
        export_calibrated(source, tmp_path / "c.gguf", "q4_0", None, tmp_path / "tale.txt", tokens=512)
    calibrated = run(tmp_path / "c.gguf", levels={"case": [1.0]}, grid=None, corners=0)
    assert not [warning for warning in plain.warnings if "was calibrated on" in warning]
    assert calibrated.warnings[-1].startswith(f"c was calibrated on {tmp_path / 'tale.txt'}: ")


def test_the_command_and_its_report(tmp_path: Path, models: dict[str, Path]) -> None:
    text = tmp_path / "tale.txt"
    text.write_text(TEXT.read_text("utf-8")[:6000], encoding="utf-8")
    command = ["stress", str(models["q4_0"]), str(models["q8_0"]), "--reference", str(models["exact"])]
    command += ["--text", str(text), "--chunk", "32", "--chunks", "2", "--corners", "2", "--state", str(tmp_path / "s")]
    command += ["--turn", "typos=0.1,0.3", "--turn", "case", "--grid", "typos,case"]
    shown = CliRunner().invoke(main, [*command, "--html", str(tmp_path / "report.html")])
    assert shown.exit_code == 0, shown.output
    for words in ("q4_0, native engine", "the worst of all poses", "typos 0.3", "case 0.5", "Rank correlation"):
        assert words in shown.output
    page = (tmp_path / "report.html").read_text("utf-8")
    for words in ("Typos and case together", "share of words in capitals", "Do they suffer alike?", "bezel "):
        assert words in page
    found = json.loads(CliRunner().invoke(main, [*command, "--json"]).stdout)
    assert found["bezel_stress"] == 1
    assert [len(c["losses"]) for c in found["candidates"]] == [len(found["poses"])] * 2
    wrong = CliRunner().invoke(main, [*command, "--turn", "digits=much"])
    assert wrong.exit_code == 1
    assert "--turn: found 'digits=much', expected numbers" in wrong.output
    for options, says in (
        (["--turn", "case"], "--turn: found 'case' twice"),
        (["--search"], "--search takes no poses"),
        (["--distance", "0.1"], "--distance goes with --search"),
    ):
        assert says in CliRunner().invoke(main, [*command, *options]).output


def test_what_is_exact_loses_nothing(tmp_path: Path, run: Callable[..., Stress]) -> None:
    found = run("exact", corners=1, levels={"typos": [0.5], "case": [1.0]})
    assert all(loss.kld.value == loss.flips.value == 0 for loss in found.candidates[0].losses)
    write_report(found, tmp_path / "report.html")
    assert "and nowhere more" in (tmp_path / "report.html").read_text("utf-8")
