"""The chat page in a real browser.

Most tests talk to a server whose answers are scripted; it serves the page's files as the real one does.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from bezel.runtime import Model, Sampling
from bezel.runtime.serve.guard import problem
from scripted import HOSTILE, Script
from serving import running, serving
from starlette.responses import Response

pytest.importorskip("playwright.sync_api")
from playwright.sync_api import Locator, Page, expect

PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
PageOf = Callable[..., Page]


def say(page: Page, text: str) -> None:
    page.get_by_role("textbox", name="Message").last.fill(text)
    page.keyboard.press("Enter")


def answers(page: Page) -> Locator:
    return page.locator(".assistant .text")


def finished(page: Page) -> None:
    expect(page.get_by_role("button", name="Send")).to_be_visible()


def menu(page: Page, item: str) -> None:
    page.get_by_role("button", name="More").click()
    page.get_by_role("button", name=item, exact=True).click()


# --- with a model


@pytest.fixture(scope="module")
def file(gguf_of: Callable[..., Path]) -> Path:
    return gguf_of("demo", "q4_0")


def test_a_chat_with_a_model(file: Path, page_of: PageOf) -> None:
    with serving({"fairy": file, "again": file}) as address:
        page = page_of(address)
        page.get_by_role("button", name="Settings").click()
        for label, value in {"Max tokens": "12", "Temperature": "0", "System prompt": "Be brief."}.items():
            page.get_by_label(label).fill(value)
        page.get_by_role("button", name="Save").click()
        say(page, "A story about a fox.")
        finished(page)
        first = answers(page).inner_text()
        assert first
        foot = page.locator(".assistant .foot").first
        expect(foot).to_contain_text(re.compile(r"cut off after 12 tokens, as set.*tokens/s"))
        expect(foot).to_contain_text(re.compile(r"context \d+ of 2,048\d+ tokens read"))
        say(page, "And then?")
        finished(page)
        expect(page.locator(".assistant .foot").last).to_contain_text(re.compile(r"\d+ of \d+ tokens read before"))
        page.reload()
        expect(answers(page)).to_have_count(2)
        expect(answers(page).first).to_have_text(first)
        expect(page).to_have_title("A story about a fox. – bezel")
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Model").select_option("again")
        page.get_by_role("button", name="Save").click()
        say(page, "And then?")
        finished(page)
        expect(page.locator(".assistant .foot").last).to_contain_text("again")


def test_the_answer_is_the_models(file: Path, page_of: PageOf, model_of: Callable[..., Model]) -> None:
    model = model_of("demo", "q4_0", engine="native", kv="int8", threads=2)
    expected = "".join(model.generate("A story about a fox.", max_tokens=30, sampling=Sampling(seed=7)))
    with serving({"fairy": file}) as address:
        page = page_of(address)
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Max tokens").fill("30")
        page.get_by_label("Seed").fill("7")
        page.get_by_role("button", name="Save").click()
        say(page, "A story about a fox.")
        finished(page)
        assert answers(page).inner_text().split() == expected.split()


@pytest.mark.parametrize("always", [False, True])
def test_a_key_is_asked_for(always: bool, file: Path, page_of: PageOf) -> None:
    with serving({"fairy": file}, key="sesame") as address:
        page = page_of(address)
        dialog = page.get_by_role("dialog", name="A key is required")
        expect(dialog).to_contain_text("This server asks for a key.")
        dialog.get_by_label("Key", exact=True).fill("wrong")
        dialog.get_by_role("button", name="Use this key").click()
        expect(dialog).to_contain_text("The server did not take this key.")
        dialog.get_by_role("button", name="Cancel").click()
        say(page, "Hello")
        dialog.get_by_label("Key", exact=True).fill("sesame")
        if always:
            dialog.get_by_role("checkbox").check()
        dialog.get_by_role("button", name="Use this key").click()
        expect(answers(page)).to_have_text(re.compile(r"\w"))
        kept = page.evaluate("[sessionStorage.getItem('key'), localStorage.getItem('key')]")
        assert kept == ([None, "sesame"] if always else ["sesame", None])
        page.keyboard.press("Escape")
        page.get_by_role("button", name="Settings").click()
        page.get_by_role("button", name="Forget it").click()
        assert page.evaluate("[sessionStorage.getItem('key'), localStorage.getItem('key')]") == [None, None]


# --- answers


def test_what_is_told_of_an_answer(scripted: str, page_of: PageOf) -> None:
    page = page_of(scripted)
    say(page, "Hello")
    foot = page.locator(".assistant .foot")
    expect(foot).to_contain_text("14.2 tokens/s")
    expect(foot).to_contain_text("context 3,592 of 8,192")
    expect(foot).to_contain_text("3,120 of 3,180 tokens read before")


def test_an_answer_comes_in_pieces_and_can_be_stopped(scripted: str, script: Script, page_of: PageOf) -> None:
    page, hold = page_of(scripted), threading.Event()
    script.replies = [["Once upon a time", hold, " there was a king."]]
    say(page, "A story")
    expect(answers(page)).to_have_text("Once upon a time")
    page.get_by_role("button", name="Stop").click()
    finished(page)
    expect(page.locator(".assistant .foot")).to_contain_text("stopped")
    hold.set()
    say(page, "Go on")
    finished(page)
    assert script.asked[1]["messages"][1] == {"role": "assistant", "content": "Once upon a time"}
    expect(answers(page)).to_have_text(["Once upon a time", "An answer."])


def test_stopping_before_the_first_word(scripted: str, script: Script, page_of: PageOf) -> None:
    page, hold = page_of(scripted), threading.Event()
    script.replies = [[hold]]
    say(page, "A story")
    expect(page.locator(".assistant")).to_contain_text(re.compile(r"Reading… \d+ s"))  # the server was asked
    assert script.asked
    page.keyboard.press("Escape")
    expect(page.get_by_role("alert")).to_contain_text("There is no answer to this yet.")
    page.get_by_role("alert").get_by_role("button", name="Answer").click()
    expect(answers(page)).to_have_text("An answer.")
    expect(page.get_by_role("alert")).to_be_empty()
    hold.set()


def test_edit_and_answer_again(scripted: str, script: Script, page_of: PageOf) -> None:
    page = page_of(scripted)
    script.replies = [["One."], ["Two."], ["Two again."], ["Three."]]
    say(page, "first")
    finished(page)
    say(page, "second")
    finished(page)
    page.get_by_role("button", name="Answer again").click()
    expect(answers(page)).to_have_text(["One.", "Two again."])
    finished(page)
    page.get_by_role("button", name="Edit").first.click()
    field = page.locator(".edit textarea")
    expect(field).to_be_focused()
    expect(page.locator(".edit")).to_contain_text("drops the 3 messages below")
    page.keyboard.press("Escape")
    expect(page.locator(".user .text")).to_have_text(["first", "second"])
    page.get_by_role("button", name="Edit").first.click()
    field.fill("changed")
    field.press("Enter")
    finished(page)
    expect(page.locator(".user .text")).to_have_text(["changed"])
    expect(answers(page)).to_have_text(["Three."])
    told = [[message["content"] for message in asked["messages"]] for asked in script.asked]
    assert told == [["first"], ["first", "One.", "second"], ["first", "One.", "second"], ["changed"]]
    page.reload()
    expect(answers(page)).to_have_text(["Three."])


def test_only_what_is_set_is_sent(scripted: str, script: Script, page_of: PageOf) -> None:
    page = page_of(scripted)
    say(page, "Hello")
    finished(page)
    page.get_by_role("button", name="Settings").click()
    fields = {"System prompt": "Be brief.", "Top-p": "0.5", "Top-k": "40", "Seed": "3", "Temperature": "0"}
    for label, value in fields.items():
        page.get_by_label(label).fill(value)
    page.get_by_role("button", name="Save").click()
    say(page, "Again")
    finished(page)
    always = {"stream": True, "stream_options": {"include_usage": True}}
    assert script.asked[0] == {"messages": [{"role": "user", "content": "Hello"}], **always}
    messages = script.asked[1].pop("messages")
    assert script.asked[1] == {**always, "top_p": 0.5, "top_k": 40, "seed": 3, "temperature": 0}
    assert messages[0] == {"role": "system", "content": "Be brief."}
    page.goto(f"{scripted}/#new")  # new conversations begin with them
    say(page, "New")
    finished(page)
    assert script.asked[2]["top_k"] == 40


def test_the_reader_is_not_pulled_to_the_end(scripted: str, script: Script, page_of: PageOf) -> None:
    page, hold, more = page_of(scripted), threading.Event(), threading.Event()
    script.replies = [["word\n\n" * 100, hold, "last words\n\n" * 50, more, "end"]]
    say(page, "Hello")
    at_end = "scrollY + innerHeight > document.documentElement.scrollHeight - 5"
    expect(answers(page).locator("p")).to_have_count(100)
    assert page.evaluate(at_end)
    page.mouse.move(600, 300)
    page.mouse.wheel(0, -1000)
    expect(page.get_by_role("button", name="To the end")).to_be_visible()
    before = page.evaluate("scrollY")
    hold.set()
    expect(answers(page).locator("p")).to_have_count(150)
    assert page.evaluate("scrollY") == before
    page.get_by_role("button", name="To the end").click()
    more.set()
    finished(page)
    page.wait_for_function(at_end)


# --- conversations


def test_conversations(scripted: str, script: Script, page_of: PageOf) -> None:
    page = page_of(scripted)
    names = page.get_by_role("navigation").get_by_role("listitem")
    for text in ("About foxes\nand more", "About kings"):
        page.get_by_role("link", name="New conversation").click()
        say(page, text)
        finished(page)
    expect(names).to_have_text(["About kings", "About foxes"])
    names.last.click()
    expect(page.get_by_role("heading", level=1)).to_have_text("About foxes")
    menu(page, "Rename")
    page.get_by_label("Title").fill("Foxes")
    page.keyboard.press("Enter")
    expect(names).to_have_text(["About kings", "Foxes"])
    menu(page, "Delete")
    expect(names).to_have_text(["About kings"])
    expect(page.get_by_role("alert")).to_contain_text("“Foxes” is deleted.")
    page.get_by_role("button", name="Undo").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Foxes")
    expect(answers(page)).to_have_text("An answer.")
    menu(page, "Delete")
    expect(names).to_have_text(["About kings"])
    page.reload()
    expect(names).to_have_text(["About kings"])
    page.go_back()
    expect(page.locator("#talk")).to_contain_text("fairy")
    assert len(script.asked) == 2


def test_a_conversation_that_is_deleted_while_it_is_answered(scripted: str, script: Script, page_of: PageOf) -> None:
    page, hold = page_of(scripted), threading.Event()
    script.replies = [["Once", hold]]
    say(page, "Hello")
    expect(answers(page)).to_have_text("Once")
    menu(page, "Delete")
    expect(page.get_by_role("alert")).to_contain_text("“Hello” is deleted.")
    page.reload()
    expect(page.locator(".empty")).to_be_visible()
    expect(page.get_by_role("navigation").get_by_role("listitem")).to_have_count(0)
    hold.set()


def test_an_answer_goes_on_while_another_conversation_is_read(scripted: str, script: Script, page_of: PageOf) -> None:
    page, hold = page_of(scripted), threading.Event()
    script.replies = [["Once", hold, " upon a time"], ["Another."]]
    say(page, "Slow")
    expect(answers(page)).to_have_text("Once")
    page.get_by_role("link", name="New conversation").click()
    say(page, "Quick")
    expect(answers(page)).to_have_text("Another.")
    page.get_by_role("link", name="Slow").click()
    expect(answers(page)).to_have_text("Once")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    hold.set()
    expect(answers(page)).to_have_text("Once upon a time")
    finished(page)


def test_a_reload_in_the_middle_of_an_answer(scripted: str, script: Script, page_of: PageOf) -> None:
    page, hold, more = page_of(scripted), threading.Event(), threading.Event()
    script.replies = [["Once upon a time", hold, " there was", more]]
    say(page, "Hello")
    page.wait_for_timeout(1100)  # what is being written is kept once a second
    hold.set()
    expect(answers(page)).to_have_text("Once upon a time there was")
    page.reload()
    expect(answers(page)).to_contain_text("Once upon a time")
    expect(page.locator(".assistant .foot")).to_contain_text("broken off")
    more.set()


def test_saved_as_a_file_and_opened(scripted: str, page_of: PageOf, tmp_path: Path) -> None:
    page = page_of(scripted)
    say(page, "About foxes")
    finished(page)
    page.get_by_role("button", name="More").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Save as a file").click()
    saved = tmp_path / download.value.suggested_filename
    download.value.save_as(saved)
    assert saved.name == "About-foxes.json"
    other = page_of(scripted)
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"id": "x", "title": "y", "messages": [{"role": "king", "text": ""}]}')
    for path, words in ((wrong, "wrong.json is not a conversation"), (saved, "")):
        other.locator("#file").set_input_files(path)
        expect(other.get_by_role("alert")).to_contain_text(words)
    expect(answers(other)).to_have_text("An answer.")
    expect(other.get_by_role("heading", level=1)).to_have_text("About foxes")


def test_a_browser_that_keeps_nothing(scripted: str, page_of: PageOf) -> None:
    page = page_of(scripted, denied=True)
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("This browser keeps no conversations: denied")
    expect(page.locator(".empty")).to_contain_text("8,192 tokens")
    say(page, "Hello")
    expect(answers(page)).to_have_text("An answer.")
    expect(alert).to_contain_text("denied")


def test_the_title_follows_the_first_message(scripted: str, page_of: PageOf) -> None:
    page = page_of(scripted)
    title = page.get_by_role("heading", level=1)
    say(page, "About foxes")
    for named, expected in ((None, "About kings"), ("Mine", "Mine")):
        finished(page)
        if named:
            menu(page, "Rename")
            page.get_by_label("Title").fill(named)
            page.keyboard.press("Enter")
            expect(title).to_have_text(named)
        page.get_by_role("button", name="Edit").click()
        page.locator(".edit textarea").fill("About kings")
        page.locator(".edit textarea").press("Enter")
        finished(page)
        expect(title).to_have_text(expected)


def test_two_tabs(scripted: str, page_of: PageOf) -> None:
    page = page_of(scripted)
    say(page, "One")
    finished(page)
    other = page.context.new_page()
    other.goto(page.url)
    expect(answers(other)).to_have_count(1)
    say(page, "Two")
    expect(answers(other)).to_have_count(2)


# --- what goes wrong


def test_the_server_is_gone(script: Script, page_of: PageOf) -> None:
    app = script.app()
    with running(app) as address:
        page = page_of(address)
        say(page, "First")
        finished(page)
    say(page, "Second")
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("The server does not answer.")
    expect(page.locator(".user .text").last).to_have_text("Second")
    with running(app, int(address.rpartition(":")[2])):
        alert.get_by_role("button", name="Try again").click()
        expect(answers(page)).to_have_count(2)
        finished(page)
        expect(alert).to_be_empty()


def test_an_answer_is_cut_off(scripted: str, script: Script, page_of: PageOf) -> None:
    page = page_of(scripted)
    script.finish, script.replies = None, [["Once upon"]]
    say(page, "Hello")
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("The server went away in the middle of the answer.")
    expect(answers(page)).to_have_text("Once upon")
    expect(page.locator(".assistant .foot")).to_contain_text("broken off")
    script.finish = "stop"
    alert.get_by_role("button", name="Try again").click()
    expect(answers(page)).to_have_text("An answer.")
    finished(page)


def test_an_error_in_the_middle(scripted: str, script: Script, page_of: PageOf) -> None:
    page = page_of(scripted)
    told = {"error": {"message": "not enough memory", "type": "server_error", "code": 500}}
    script.replies = [Response(f"data: {json.dumps(told)}\n\n", media_type="text/event-stream")]
    say(page, "Hello")
    expect(page.get_by_role("alert")).to_contain_text("Not enough memory.")


def test_a_prompt_that_is_too_long(scripted: str, script: Script, page_of: PageOf) -> None:
    page = page_of(scripted)
    say(page, "Short")
    finished(page)
    script.replies = [
        problem("/v1/chat/completions", 400, "the prompt has 9000 tokens: shorten it", code="context_length_exceeded")
    ] * 2
    say(page, "Long words")
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("The prompt has 9000 tokens: shorten it.")
    alert.get_by_role("button", name="Edit").click()
    page.locator(".edit textarea").press("Enter")
    alert.get_by_role("button", name="Begin a new conversation with it").click()
    expect(page.locator("#box")).to_have_value("Long words")
    expect(page.locator(".turn")).to_have_count(0)
    page.get_by_role("link", name="Short").click()
    expect(page.locator(".user .text")).to_have_text(["Short"])


def test_a_model_without_a_chat_template(scripted: str, script: Script, page_of: PageOf) -> None:
    page = page_of(scripted)
    script.replies = [
        problem("/v1/chat/completions", 400, "base has no chat template: it continues texts, by /v1/completions")
    ]
    say(page, "Hello")
    expect(page.get_by_role("alert")).to_contain_text("Base has no chat template: it continues texts")


def test_busy(scripted: str, script: Script, page_of: PageOf) -> None:
    page = page_of(scripted)
    script.replies = [problem("/v1/chat/completions", 503, "64 answers are waiting already; try again later")]
    say(page, "Hello")
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("The server is busy: 64 answers are waiting already; try again later.")
    alert.get_by_role("button", name="Try again").click()
    expect(answers(page)).to_have_text("An answer.")


def test_an_answer_without_a_word(scripted: str, script: Script, page_of: PageOf) -> None:
    page = page_of(scripted)
    script.replies = [[]]
    say(page, "Hello")
    expect(page.get_by_role("alert")).to_contain_text("The model had nothing to say.")


def test_hostile_texts(scripted: str, script: Script, page_of: PageOf) -> None:
    page = page_of(scripted)
    script.replies = [[HOSTILE], [HOSTILE]]
    say(page, HOSTILE)
    finished(page)
    for _ in range(2):  # as it came, and as it was kept
        text = answers(page)
        assert text.locator("script, img, iframe, b, object, embed, form, style").count() == 0
        hrefs = text.locator("a").evaluate_all("links => links.map((link) => link.href)")
        assert {href.split("/")[2] for href in hrefs} == {"evil.example", "a.example"}
        for link in text.locator("a").all():
            assert (link.get_attribute("rel"), link.get_attribute("target")) == ("noopener noreferrer", "_blank")
        attributes = text.locator("*").evaluate_all("all => all.flatMap((one) => one.getAttributeNames())")
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
        expect(text).to_contain_text("[a](javascript:window.hit=3)")
        for link in text.locator("*").all():
            link.dispatch_event("mouseover")
        page.reload()
        expect(text).to_contain_text("window.hit = 6")
    assert page.evaluate("window.hit") is None


def test_html_cannot_be_made_of_text(scripted: str, page_of: PageOf) -> None:
    """The policy holds whatever the code does; a style of an element's own is no hole."""
    page = page_of(scripted)
    made = "document.createElement('p').innerHTML = '<b>x</b>'"
    assert page.evaluate(f"(() => {{ try {{ {made}; return 'made' }} catch (error) {{ return error.name }} }})()") == (
        "TypeError"
    )


HUGE = {
    "words": "word " * 40_000,
    "a line": "x" * 200_000,
    "code": "```\n" + "    code line\n" * 15_000,
    "a list": "- item *and* `code`\n" * 4_000,
    "a table": "| a | b |\n|---|---|\n" + "| 1 | 2 |\n" * 3_000,
    "emphasis": "*a _b " * 30_000,
    "closers": "a* b_ " * 30_000,
    "stars": "*" * 100_000 + "a" + "*" * 100_000,
    "alternating": "*a **b " * 20_000 + "** * " * 20_000,
    "brackets": "[" * 100_000,
    "links": "[a](" * 40_000,
    "closed brackets": "[a]" * 60_000,
    "backticks": "".join("`" * n + " " for n in range(1, 500)),
    "quotes": ">" * 20_000 + "a",
    "deep lists": "\n".join("  " * n + "- a" for n in range(400)),
    "addresses": "http://" * 20_000,
    "tildes": "~" * 250_000 + "`",
    "spaces": "# a" + " " * 100_000 + "b",
    "rules": "- " * 50_000 + "a",
    "pipes": "|" * 50_000 + "\n" + "|-" * 50_000,
}


@pytest.mark.parametrize("kind", HUGE)
def test_huge_answers(kind: str, scripted: str, script: Script, page_of: PageOf) -> None:
    """In a browser that gives up after half a minute; what takes time that grows with the square takes more."""
    page = page_of(scripted)
    script.replies = [[HUGE[kind]]]
    say(page, "Hello")
    expect(page.locator(".assistant .foot")).to_contain_text("14.2", timeout=30_000)
    letters = set(re.sub(r"[\s|\-*_`#>~\[\]()]", "", HUGE[kind]))
    assert letters <= set(answers(page).evaluate("node => node.textContent"))
    say(page, "And now?")  # it still answers
    expect(answers(page)).to_have_count(2)


# --- for everybody


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(scheme: str, scripted: str, script: Script, page_of: PageOf) -> None:
    page = page_of(scripted, color_scheme=scheme, **PHONE)
    script.replies = [
        ["x" * 300 + "\n\n```\n" + "y" * 300 + "\n```\n\n" + "| zzzz " * 40 + "|\n" + "|---" * 40 + "|\n"]
    ]
    box = page.locator("#box")
    box.fill("w" * 300)
    box.press("Enter")  # begins a line where there is no keyboard
    expect(box).to_have_value("w" * 300 + "\n")
    page.get_by_role("button", name="Send").click()
    finished(page)

    expect(answers(page).get_by_role("columnheader")).to_have_count(40)

    for width in (320, 390):  # 320: or a desktop at 400 %
        page.set_viewport_size({"width": width, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.get_by_role("button", name="Conversations").click()
    page.get_by_role("link", name="New conversation").click()
    expect(page.get_by_role("navigation")).not_to_be_visible()
    expect(page.locator(".empty")).to_be_visible()
    page.get_by_role("button", name="Settings").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.get_by_role("button", name="Cancel").click()
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 26)"}[scheme]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(scheme: str, scripted: str, page_of: PageOf) -> None:
    """WCAG 2's AA: 4.5 for texts, 3 for the edges of what is pressed and filled in."""
    page = page_of(scripted, color_scheme=scheme)

    def luminance(name: str) -> float:
        value = page.evaluate(f"getComputedStyle(document.documentElement).getPropertyValue('--{name}')")
        parts = [int(value[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    pairs = [(name, on, 4.5) for name in ("ink", "soft", "accent") for on in ("paper", "card")]
    for name, on, least in [*pairs, ("on-accent", "accent", 4.5), ("edge", "paper", 3), ("edge", "card", 3)]:
        low, high = sorted((luminance(name), luminance(on)))
        assert (high + 0.05) / (low + 0.05) >= least, (name, on)


def test_by_keyboard_alone(scripted: str, script: Script, page_of: PageOf) -> None:
    page, hold = page_of(scripted), threading.Event()
    script.replies = [["First."], ["Second", hold]]
    expect(page.locator("#box")).to_be_focused()

    def tab_to(words: str, key: str) -> None:
        for _ in range(30):
            page.keyboard.press(key)
            focus = page.evaluate("[document.activeElement.textContent.trim(), document.activeElement.ariaLabel]")
            if words in focus:
                outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                assert outline != "none"
                return
        raise AssertionError(f"no {words} by {key}")

    page.keyboard.type("One")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    finished(page)
    assert script.asked[0]["messages"][0]["content"] == "One\ntwo"
    tab_to("Edit", "Shift+Tab")
    page.keyboard.press("Enter")
    page.keyboard.press("Control+a")
    page.keyboard.type("Three")
    page.keyboard.press("Enter")
    expect(answers(page)).to_have_text("Second")
    expect(page.locator("#box")).to_be_focused()
    page.keyboard.press("Escape")
    finished(page)
    hold.set()
    tab_to("Settings", "Shift+Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog", name="Settings")).to_be_visible()
    page.keyboard.press("Escape")
    tab_to("More", "Tab")
    page.keyboard.press("Enter")
    tab_to("Delete", "Tab")
    page.keyboard.press("Enter")
    tab_to("Undo", "Tab")
    page.keyboard.press("Enter")
    expect(answers(page)).to_have_text("Second")
    tab_to("To the message box", "Shift+Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#box")).to_be_focused()


def test_for_screen_readers(scripted: str, script: Script, page_of: PageOf) -> None:
    page, hold = page_of(scripted), threading.Event()
    script.replies = [["One **two** ", hold, "three."]]
    page.evaluate("""() => {
      window.said = [];
      const status = document.querySelector("[role=status]");
      new MutationObserver(() => window.said.push(status.textContent)).observe(status, {childList: true});
    }""")
    say(page, "Hello")
    expect(answers(page)).to_have_text("One two")
    assert page.evaluate("window.said") == ["The model is answering."]
    expect(page.locator("[aria-busy]")).to_have_count(1)
    hold.set()
    finished(page)
    assert page.evaluate("window.said") == ["The model is answering.", "One two three."]
    expect(page.locator("[aria-busy]")).to_have_count(0)
    headings = page.get_by_role("heading").all_inner_texts()
    assert headings == ["Hello", "You", "Answer"]
    unnamed = page.evaluate("""() => [...document.querySelectorAll("button, input, select, textarea, dialog, a")]
      .filter((one) => !one.hidden && !(one.ariaLabel || one.textContent.trim() || one.labels?.length
        || one.getAttribute("aria-labelledby"))).map((one) => one.outerHTML)""")
    assert unnamed == []


@pytest.mark.parametrize("secure", [True, False])
def test_copied(secure: bool, scripted: str, script: Script, page_of: PageOf) -> None:
    page, markdown = page_of(scripted), "**Code:**\n\n```py\nx = 1\n\ty\n```\n"
    if not secure:  # so it is by http from another computer
        page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    script.replies = [[markdown]]
    say(page, "Hello")
    finished(page)
    for place, text in ((".code", "x = 1\n\ty"), (".assistant .foot", markdown)):
        page.locator(place).get_by_role("button", name="Copy").click()
        expect(page.locator(place)).to_contain_text("Copied")
        page.locator("#box").fill("")
        page.locator("#box").press("Control+v")
        expect(page.locator("#box")).to_have_value(text)


def test_a_model_that_does_not_chat(script: Script, scripted: str, page_of: PageOf) -> None:
    script.models = [{"id": "base", "meta": {"n_ctx": 64, "chat": False}}]
    page = page_of(scripted)
    expect(page.locator("#talk")).to_contain_text("This model has no chat template")
    expect(page.locator("#box")).to_be_disabled()
    expect(page.get_by_role("button", name="Send")).to_be_disabled()


# --- pictures

PICTURE = """async ({ how, name = "square.png", part = 1 }) => {
  const canvas = Object.assign(document.createElement("canvas"), { width: 40, height: 30 });
  canvas.getContext("2d").fillRect(5, 5, 20, 20);
  const blob = await new Promise((done) => canvas.toBlob(done, "image/png"));
  const carried = new DataTransfer();
  carried.items.add(new File([blob.slice(0, part * blob.size)], name, { type: "image/png" }));
  const told = { bubbles: true, cancelable: true };
  const event = how === "paste"
    ? new ClipboardEvent("paste", { ...told, clipboardData: carried })
    : new DragEvent("drop", { ...told, dataTransfer: carried });
  document.getElementById("box").dispatchEvent(event);
}"""


@pytest.mark.parametrize("how", ["paste", "drop"])
def test_a_picture_goes_with_the_message(how: str, shapes_of: Callable[..., Path], page_of: PageOf) -> None:
    with serving({"shapes": shapes_of()}) as address:
        page = page_of(address)
        expect(page.get_by_role("button", name="Add a picture")).to_be_visible()
        page.evaluate(PICTURE, {"how": how})
        page.evaluate(PICTURE, {"how": how})
        expect(page.locator("#pictures img")).to_have_count(2)
        page.get_by_role("button", name="Leave picture 2 out").click()
        expect(page.locator("#pictures img")).to_have_count(1)
        say(page, "What colour is the square?")
        finished(page)
        expect(answers(page)).to_have_count(1)
        expect(page.locator(".user .text img")).to_have_count(1)
        expect(page.locator("#pictures img")).to_have_count(0)
        say(page, "How many shapes are there?")
        finished(page)
        expect(answers(page)).to_have_count(2)
        expect(page.locator(".assistant").last).to_contain_text("before")  # what was read of it is not read again
        page.reload()
        expect(page.locator(".user .text img")).to_have_count(1)  # kept with the conversation


def test_a_damaged_picture_is_told_at_once(shapes_of: Callable[..., Path], page_of: PageOf, tmp_path: Path) -> None:
    with serving({"shapes": shapes_of()}) as address:
        page = page_of(address)
        expect(page.get_by_role("button", name="Add a picture")).to_be_visible()
        for name, part in (("half.png", 0.5), ("most.png", 0.9)):
            page.evaluate(PICTURE, {"how": "drop", "name": name, "part": part})
            expect(page.get_by_role("alert")).to_contain_text(f"{name} is damaged, or no picture")
        (tmp_path / "text.png").write_text("Dear reader,")
        page.locator("#picture-file").set_input_files(tmp_path / "text.png")
        expect(page.get_by_role("alert")).to_contain_text("text.png is damaged, or no picture")
        expect(page.locator("#pictures img")).to_have_count(0)
        page.evaluate(PICTURE, {"how": "drop"})
        expect(page.locator("#pictures img")).to_have_count(1)


def test_a_model_that_sees_nothing_takes_no_picture(file: Path, page_of: PageOf) -> None:
    with serving({"fairy": file}) as address:
        page = page_of(address)
        expect(page.get_by_text("A context of")).to_be_visible()
        expect(page.get_by_role("button", name="Add a picture")).to_be_hidden()
        page.evaluate(PICTURE, {"how": "paste"})
        expect(page.get_by_role("alert")).to_contain_text("sees no pictures")
        expect(page.locator("#pictures img")).to_have_count(0)
