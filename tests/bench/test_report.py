"""The HTML report: sound markup, nothing from elsewhere, inert texts, and the figures of the measurement."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from bezel.bench.loss.intervals import Interval
from bezel.bench.loss.result import ByPosition, Pair, Quantiles
from bezel.bench.report import sensitivity as sensitivity_report
from bezel.bench.report import tasks as tasks_report
from bezel.bench.report.measurement import METRICS, visible, write_report
from bezel.bench.report.svg import Axis, Plot, number
from bezel.bench.tasks.tasks import Accuracy, Answers, Flips
from bezel.runtime.commands.main import main
from click.testing import CliRunner
from measured import candidate, result, sensitivity, text_loss, without_intervals

VOID = ("meta", "br")
HOSTILE = (
    "</title></style><script>alert(1)</script><img src=https://example.org/x onerror=alert(1)>\" ' &lt; \x00\x1b\ud800"
)


class Page(HTMLParser):
    """The elements of a page, checked to be nested; `data` are (text, value) of the `data` elements."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[tuple[str, str | None]] = set()
        self.data: list[tuple[str, str]] = []
        self.text = ""
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= set(attrs)
        if tag == "data":
            self.data.append(("", str(dict(attrs)["value"])))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "data":
            self.data[-1] = (data, self.data[-1][1])
        if self.open and self.open[-1] != "style":
            self.text += data


def report(measured: Any, folder: Path, write: Callable[[Any, Path], None] = write_report) -> tuple[Page, str]:
    write(measured, folder / "report.html")
    assert [path.name for path in folder.iterdir()] == ["report.html"]
    source = (folder / "report.html").read_text("utf-8")
    return Page(source), source


def plots(source: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(found) for found in re.findall(r"<svg.*?</svg>", source, re.DOTALL)]


def test_the_page_is_whole_and_needs_nothing(tmp_path: Path) -> None:
    page, source = report(result(), tmp_path)
    assert source.startswith("<!DOCTYPE html>")
    assert page.tags.isdisjoint({"script", "link", "img", "iframe", "object", "a", "base", "form"})
    assert not re.search(r"https?:|//\w|url\(|@import|\bsrc=|\bhref=", source)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    labels = [svg.get("aria-label") for svg in plots(source) if svg.get("aria-label")]
    assert len(labels) == len(set(labels)) == 7
    assert "NaN" not in source
    assert "inf" not in re.findall(r'="[^"]*"', source.partition("</style>")[2])


def test_every_figure_of_the_table_is_the_measurement_s(tmp_path: Path) -> None:
    measured = result()
    page, _ = report(measured, tmp_path)
    found = [float(value) for _, value in page.data]
    main = ("kld_mean", "kld_p999", "top1", "rms_dp", "perplexity_ratio")
    expected: list[float] = []
    for c in measured.ranked:
        expected += [c.file_bytes, c.bits_per_weight, *(getattr(c.metrics, m).value for m in main)]
    expected += [measured.reference.file_bytes, measured.reference.bits_per_weight, 8.389]
    expected += [getattr(c.metrics, m).value for m in METRICS for c in measured.candidates]
    assert found == expected
    for text, value in page.data:  # and what is shown is that figure, rounded to at least two digits
        shown = re.fullmatch(r"([\d,.]+)(?: × 10([⁻⁰-⁹¹²³]+))?( %| GB)?", text)
        assert shown, text
        power = (shown[2] or "⁰").translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789"))
        scale = 10.0 ** int(power) * {" %": 0.01, " GB": 1e9, None: 1.0}[shown[3]]
        digits = shown[1].replace(",", "")
        step = scale * 10.0 ** -len(digits.partition(".")[2])
        assert abs(float(digits) * scale - float(value)) <= 0.5001 * step
        assert len(digits.replace(".", "").lstrip("0")) >= 2


def test_texts_apart(tmp_path: Path) -> None:
    """Every figure of every text and candidate, the least loss first; two texts of one name go by their paths."""
    paths = ["/a/tales.txt", "/b/tales.txt"]
    candidates = [
        replace(c, by_text=[text_loss(path, times * (i + 1)) for i, path in enumerate(paths)])
        for c, times in zip(result().candidates, (1.0, 0.1), strict=True)
    ]
    measured = result(candidates=candidates)
    page, _ = report(measured, tmp_path)
    names = ("kld_mean", "kld_p999", "top1", "perplexity_ratio", "bits_per_byte")
    expected = [getattr(c.by_text[i], m).value for i in range(2) for c in measured.ranked for m in names]
    found = [float(value) for _, value in page.data]
    assert any(found[i : i + len(expected)] == expected for i in range(len(found)))
    assert "Text by text" in page.text
    assert "0.900 for /a/tales.txt and 0.900 for /b/tales.txt" in page.text
    assert "Text by text" not in report(result(), tmp_path)[0].text


@pytest.mark.parametrize("where", ["name", "token", "before", "text", "path", "formats", "command"])
def test_hostile_text_stays_text(where: str, tmp_path: Path) -> None:
    first, second = result().candidates
    worst = first.worst[0]
    if where == "token":
        hostile = replace(worst, token=HOSTILE, candidate_top=[(HOSTILE, 0.5), *worst.candidate_top[1:]])
        first = replace(first, worst=[hostile])
    elif where in ("before", "text"):
        first = replace(first, worst=[replace(worst, **{where: HOSTILE})])
    elif where != "command":
        first = replace(first, **{where: {HOSTILE: 1} if where == "formats" else HOSTILE})
    measured = result(candidates=[first, second], pairs=[], effects=[])
    page, source = report(replace(measured, command=HOSTILE) if where == "command" else measured, tmp_path)
    assert page.tags.isdisjoint({"script", "img"})
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert "<img src=https" in page.text if where != "text" else "x onerror" in page.text
    assert not re.search("[\x00-\x08\x0b-\x1f\ud800-\udfff\u202a-\u202e]", source)
    assert plots(source)


def test_what_was_not_found_is_left_out(tmp_path: Path) -> None:
    """Of a few positions: no intervals, no tail, one bin, and an engine that tells nothing of its layers."""
    bare = replace(
        candidate("bare"),
        metrics=without_intervals(candidate("bare").metrics),
        by_position=ByPosition([256, 384, 512], [0.01, None], [None, None], [None, None], [3, 0]),
        quantiles=Quantiles([], []),
        by_layer=None,
    )
    page, source = report(result(candidates=[bare], pairs=[], effects=[]), tmp_path)
    assert "bare loses 0.0123 nats per token" in page.text
    assert [svg.get("aria-label") for svg in plots(source) if svg.get("aria-label")] == ["Distribution"]
    assert "None" not in page.text


def test_a_sensitivity(tmp_path: Path) -> None:
    page, source = report(sensitivity(), tmp_path, sensitivity_report.write_report)
    assert "How sensitive exact is to quantization" in page.text
    assert page.text.index("sensitive to q4_0") < page.text.index("sensitive to q8_0")
    labels = ["Layer by role", "sensitivity ranking"]
    assert [svg.get("aria-label") for svg in plots(source)] == labels * 2
    assert "Outside the layers: token_embd 0.0200." in page.text


def test_answers(tmp_path: Path) -> None:
    share = Interval(0.75, 0.61, 0.85)
    accuracies = [Accuracy("exact", share, share), Accuracy("small", Interval(0.7, 0.55, 0.81), share)]
    flips = Flips("exact", "small", 3, 1, 0.625, [2, 4, 40], [7])
    answers = Answers("/q/arc.jsonl", "ab" * 32, 40, accuracies, [flips])
    page, _ = report([answers, replace(answers, file=HOSTILE)], tmp_path, tasks_report.write_report)
    assert page.tags.isdisjoint({"script", "img"})
    assert "arc.jsonl: 40 questions" in page.text
    assert "3 worse, 1 better" in page.text
    assert "worse on lines 2, 4, 40; better on lines 7" in page.text
    assert [float(value) for _, value in page.data] == [0.75, 0.75, 0.7, 0.75] * 2


def test_a_lossless_candidate(tmp_path: Path) -> None:
    exact = candidate("copy", 0.0)
    measured = result(candidates=[exact, candidate("small"), candidate("other", 2.0)], pairs=[], effects=[])
    page, _ = report(measured, tmp_path)
    assert "copy loses nothing" in page.text
    assert "Not shown, because without loss: copy." in page.text


def test_the_headline_and_the_comparison(tmp_path: Path) -> None:
    page, _ = report(result(), tmp_path)
    text = page.text.replace("\N{NO-BREAK SPACE}", " ")
    assert (
        "small loses 0.01235 ± 0.00049 nats per token (mean KLD) against exact: the same top token at 94.1 % of "
        "positions, perplexity 0.51 % higher (which may be chance), at 29 % of its bytes."
    ) in text
    assert "large is better than small, by 0.0111 (0.0105 to 0.0117) nats per token." in text
    undecided = Pair("small", "large", "kld_mean", 0.001, -0.001, 0.003)
    (tmp_path / "report.html").unlink()
    assert "cannot be told apart" in report(result(pairs=[undecided]), tmp_path)[0].text


def test_many_candidates(tmp_path: Path) -> None:
    """Every point of the plot of sizes has its label, none over another's."""
    many = [candidate(f"candidate {i}", 1.1**i, 1_500_000_000 + 30_000_000 * (i % 4)) for i in range(9)]
    many.append(candidate("far away", 200.0, 2_000_000_000))  # so that the others are close together
    _, source = report(result(candidates=many, pairs=[], effects=[]), tmp_path)
    sizes = next(svg for svg in plots(source) if svg.get("aria-label") == "size against mean KLD")
    labels = [(float(t.attrib["x"]), float(t.attrib["y"])) for t in sizes.iter("text") if t.get("class") == "label"]
    assert len(labels) == 10
    overlaps = [(a, b) for a in labels for b in labels if a < b and abs(a[0] - b[0]) < 70 and abs(a[1] - b[1]) < 12]
    assert not overlaps


@pytest.mark.parametrize(
    ("axis", "ticks"),
    [
        (Axis("", 0, 1), ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        (Axis("", 0, 3, whole=True), ["0", "1", "2", "3"]),
        (Axis("", -0.02, 0.01), ["−0.02", "−0.015", "−0.01", "−0.005", "0", "0.005", "0.01"]),
        (Axis("", 3e-6, 2.0, log=True), ["10⁻⁵", "0.0001", "0.001", "0.01", "0.1", "1"]),
        (Axis("", 0.008, 0.013, log=True), ["0.008", "0.009", "0.01", "0.011", "0.012", "0.013"]),
        (Axis("", 0.0005, 1.0, log=True, percent=True), ["0.1 %", "1 %", "10 %", "100 %"]),
    ],
)
def test_ticks_are_round(axis: Axis, ticks: list[str]) -> None:
    assert [axis.format(tick) for tick in axis.ticks()] == ticks


def test_a_curve_lies_where_its_axes_say() -> None:
    plot = Plot(Axis("x", 0, 10), Axis("y", 0.01, 1, log=True), "a plot")
    plot.curve([(0, 0.01), (5, 0.1), (10, 1), (20, 5)], 0, "curve")
    path = next(e for e in plot.svg.iter("path") if e.get("class") == "line")
    found = [tuple(map(float, point.split())) for point in path.attrib["d"][1:].split("L")]
    left, right, top, bottom = plot.left, plot.right, plot.top, plot.bottom
    middle = ((left + right) / 2, (top + bottom) / 2)
    # What lies outside is drawn at the edge.
    assert found == [pytest.approx(p, abs=0.06) for p in ((left, bottom), middle, (right, top), (right, top))]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0123456, "0.0123"),
        (0.00999999, "0.0100"),
        (0, "0"),
        (1234.5, "1,234"),
        (3.21e-7, "3.21 × 10⁻⁷"),
        (-0.5, "−0.500"),
    ],
)
def test_numbers_as_people_read_them(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("token", "text"),
    [
        ("a", "a"),
        (" the", "·the"),
        ("▁the", "·the"),
        ("\n\n", "↵↵"),
        ("\u202e", "U+202E"),
        ("", "(nothing)"),
        ("\x00", "␀"),
    ],
)
def test_tokens_are_visible(token: str, text: str) -> None:
    assert visible(token) == text


def test_a_report_replaces_a_report_only(gguf_of: Callable[..., Path], tmp_path: Path) -> None:
    """And that is asked before hours of measuring rather than after them."""
    file, text = gguf_of("gemma2-gqa"), tmp_path / "text"
    text.write_text("Once upon a time there was a king. " * 40)
    options = ["measure", file, "--reference", file, "--text", text, "--chunk", 64, "--chunks", 1]
    options += ["--state", tmp_path / "states"]
    before = file.read_bytes()
    for out in (file, text, tmp_path, tmp_path / "nowhere" / "r.html"):
        done = CliRunner().invoke(main, list(map(str, [*options, "--html", out])))
        assert done.exit_code != 0
        assert not (tmp_path / "states").exists()
    assert file.read_bytes() == before
    for _ in range(2):
        assert CliRunner().invoke(main, list(map(str, [*options, "--html", tmp_path / "r.html"]))).exit_code == 0
    ranked = ["sensitivity", str(file), "--text", str(text), "--formats", "q4_0", "--chunk", "64", "--chunks", "1"]
    assert CliRunner().invoke(main, [*ranked, "-o", str(tmp_path / "r.html")]).exit_code != 0
    for _ in range(2):
        assert CliRunner().invoke(main, [*ranked, "-o", str(tmp_path / "s.json")]).exit_code == 0
