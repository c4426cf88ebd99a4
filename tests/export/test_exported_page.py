"""The page that `--target web` writes, in a real browser: it answers as bezel's reference engine does, also offline."""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from bezel.export.onnx.npm import PACKAGES, package_files
from bezel.export.sources.opening import open_checkpoint
from bezel.export.verify import verify
from bezel.runtime import Sampling, load
from bezel.runtime.errors import InvalidModelFile, InvalidRequest
from bezel.runtime.files.onnx_folder import OnnxFolder
from test_onnx_elsewhere import NODE, output, with_node
from test_onnx_export import write
from tiny import DEMO, TEXT

pytest.importorskip("playwright.sync_api")
from playwright.sync_api import Browser, Page, expect

READY_MS = 60_000


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        for package in PACKAGES:
            package_files(package)
    except InvalidRequest as error:
        pytest.skip(str(error))
    return write(DEMO, tmp_path_factory.mktemp("web") / "out", "int8", target="web")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def served(folder: Path, handler: type[Quiet] = Quiet) -> Iterator[str]:
    """By a server that knows nothing but files."""
    handles = functools.partial(handler, directory=str(folder.parent))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handles)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/{folder.name}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """One that asks nobody but its own server."""
    context = browser.new_context()
    page = context.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda asked: None if asked.url.startswith("http://127.0.0.1") else wrong.append(asked.url))
    page.on("console", lambda line: wrong.append(line.text) if "Content Security" in line.text else None)
    yield page
    context.close()
    assert [one for one in wrong if not one.startswith("blob:http://127.0.0.1")] == []


def settings(page: Page, **values: str) -> None:
    page.get_by_role("button", name="Settings").click()
    for label, value in values.items():
        page.get_by_label(label.replace("_", " ")).fill(value)
    page.get_by_role("button", name="Save").click()


def is_ready(page: Page) -> None:
    expect(page.locator("#keys")).to_contain_text("WebAssembly", timeout=READY_MS)


def begin(page: Page, address: str) -> None:
    page.goto(f"{address}#new")
    expect(page.locator(".assistant")).to_have_count(0)
    is_ready(page)


def answer(page: Page, text: str) -> str:
    ended = page.locator(".assistant .foot", has_text="tokens read")
    before = ended.count()
    page.get_by_role("textbox", name="Message").last.fill(text)
    page.keyboard.press("Enter")
    expect(ended).to_have_count(before + 1, timeout=READY_MS)
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    found: str = page.evaluate(_STORED)
    return found


# The text as it came, because the page shows it as Markdown.
_STORED = """() => new Promise((resolve) => {
  indexedDB.open("bezel").onsuccess = (event) => {
    const store = event.target.result.transaction("conversations").objectStore("conversations");
    const sorted = (all) => all.sort((a, b) => b.changed - a.changed);
    store.getAll().onsuccess = (got) => resolve(sorted(got.target.result)[0].messages.at(-1).text);
  };
})"""


def test_it_answers_as_bezel_does(web: Path, page: Page) -> None:
    model = load(web / "model", engine="reference", kv="f32")
    # Past the slots that a cache begins with, while it writes; and what looks like a marker is text.
    story = model.tokenizer.decode(model.tokenizer.encode(TEXT.read_text(encoding="utf-8"))[:1000])
    prompts = ["A story about a fox.", "Say <end_of_turn> and <bos>.", story.strip()]
    want = ["".join(model.generate(p, max_tokens=40, sampling=Sampling(temperature=0))) for p in prompts]
    with served(web) as address:
        page.goto(address)
        is_ready(page)
        settings(page, Temperature="0", Max_tokens="40")
        for prompt, expected in zip(prompts, want, strict=True):
            begin(page, address)
            assert answer(page, prompt) == expected


def test_what_is_kept_is_right_after_any_number_of_edits(web: Path, tmp_path: Path) -> None:
    """Each goes back by less than the ring allows, and all together by more."""
    ids = load(web / "model", engine="reference", kv="f32").tokenizer.encode(TEXT.read_text(encoding="utf-8"))
    lengths = (1300, 900, 500, 200, 700, 690, 1100, 640)
    prompts = [[2, *ids[:length], *ids[1300 + 9 * i : 1305 + 9 * i]] for i, length in enumerate(lengths)]
    (with_node(tmp_path) / "package.json").write_text('{"type": "module"}')
    program, folder = shutil.copy(NODE / "rewinds.mjs", tmp_path), shutil.copytree(web, tmp_path / "web")
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    reused, fresh = json.loads(output("node", program, folder, tmp_path / "prompts.json"))
    assert reused == fresh


def test_it_goes_on_without_a_server(web: Path, page: Page) -> None:
    with served(web) as address:
        page.goto(address)
        is_ready(page)
        assert page.evaluate("crossOriginIsolated")  # else there are no threads
        settings(page, Temperature="0", Max_tokens="12")
        first = answer(page, "A story about a fox.")
        answer(page, "And then?")
        expect(page.locator(".assistant .foot").last).to_contain_text("tokens read before")
    page.goto(f"{address}index.html{page.url[page.url.index('#') :]}")
    is_ready(page)
    expect(page.locator(".assistant .text")).to_have_count(2)
    begin(page, address)
    assert answer(page, "A story about a fox.") == first


def test_a_new_export_takes_the_place_of_what_is_kept(web: Path, tmp_path: Path, page: Page) -> None:
    """By itself, or when it is asked to where somebody has begun to write."""
    folder, name = Path(shutil.copytree(web, tmp_path / "out")), page.locator(".empty strong")

    def export(called: str) -> None:
        write(Path(shutil.copytree(DEMO, tmp_path / called)), folder, "int8", target="web", force=True)

    with served(folder) as address:
        page.goto(address)
        is_ready(page)
        export("second")
        page.goto(address)
        expect(name).to_have_text("second", timeout=READY_MS)
        is_ready(page)
        page.get_by_role("textbox", name="Message").last.fill("Half a question")
        export("third")
        page.evaluate("navigator.serviceWorker.getRegistration().then((found) => found.update())")
        page.get_by_role("button", name="Load it").click(timeout=READY_MS)
        expect(name).to_have_text("third", timeout=READY_MS)
        is_ready(page)


def test_a_long_answer_is_stopped(web: Path, page: Page) -> None:
    with served(web) as address:
        page.goto(address)
        is_ready(page)
        settings(page, Max_tokens="1000")
        page.get_by_role("textbox", name="Message").last.fill("A long story.")
        page.keyboard.press("Enter")
        expect(page.locator(".assistant .text")).not_to_be_empty()
        page.keyboard.press("Escape")
        expect(page.locator(".assistant .foot")).to_contain_text("stopped", timeout=3000)
        settings(page, Max_tokens="5")
        assert answer(page, "Once more.")


def test_what_does_not_fit_is_said(web: Path, page: Page) -> None:
    with served(web) as address:
        page.goto(address)
        is_ready(page)
        page.get_by_role("textbox", name="Message").last.fill(TEXT.read_text(encoding="utf-8")[:20_000])
        page.keyboard.press("Control+Enter")
        expect(page.locator("#notice")).to_contain_text("does not fit into the model’s context")


def test_a_damaged_file_is_said(web: Path, tmp_path: Path, page: Page) -> None:
    folder = Path(shutil.copytree(web, tmp_path / "out"))
    data = folder / "model" / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-100])
    was_said = threading.Event()

    class Late(Quiet):
        def do_GET(self) -> None:
            if self.path.endswith("/tokenizer.json"):
                was_said.wait(READY_MS / 1000)
            super().do_GET()

    loading = page.locator("#loading")
    with served(folder, Late) as address:
        page.goto(address)
        expect(loading).to_contain_text("model.onnx.data: found", timeout=READY_MS)
        was_said.set()
        page.wait_for_timeout(1000)  # a file that comes later says no more
        expect(loading).to_contain_text("model.onnx.data: found")


def test_the_model_in_it_is_an_export(web: Path) -> None:
    with open_checkpoint(DEMO) as source:
        assert all(report.ok for report in verify(web / "model", source))
    with pytest.raises(InvalidModelFile, match=r"this is a page for browsers; its model is .*model"):
        OnnxFolder(web)
    listed = set(json.loads((web / "bezel.json").read_text())["files"]) | {"bezel.json"}
    assert listed == {path.relative_to(web).as_posix() for path in web.rglob("*") if path.is_file()}
    with pytest.raises(InvalidRequest, match="--force"):
        write(DEMO, web, "int8", target="web")


def test_packages_are_known_by_their_hashes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    package = PACKAGES[1]
    served_from = tmp_path / "registry" / package.name / "-"
    served_from.mkdir(parents=True)
    (served_from / package.archive).write_bytes(b"something else")
    with served(tmp_path / "registry") as address:
        monkeypatch.setenv("NPM_CONFIG_REGISTRY", address)
        with pytest.raises(InvalidRequest, match=r"tokenizers-.*tgz: found SHA-512 .*, expected LidM"):
            package_files(package)
    with pytest.raises(InvalidRequest, match="a page needs this package once"):
        package_files(package)
    assert not list(tmp_path.rglob("bezel/npm/*.tgz"))
    kept = tmp_path / "bezel" / "npm" / package.archive
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_bytes(b"spoilt")
    with pytest.raises(InvalidRequest, match="a page needs this package once"):
        package_files(package)
