"""The chat page of a server in a browser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
from scripted import Script
from serving import running

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page


@pytest.fixture
def page_of(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens the page of a server, where `denied` in a browser that keeps nothing.

    In the end, nothing went wrong in it and nobody else was asked for anything.
    """
    contexts: list[BrowserContext] = []
    wrong: list[str] = []

    def make(address: str, denied: bool = False, **options: Any) -> Page:
        context = browser.new_context(**options)
        contexts.append(context)
        if denied:
            context.add_init_script(
                "Object.defineProperty(window, 'indexedDB', {value: {open() { throw new Error('denied'); }}});"
                "for (const name of ['localStorage', 'sessionStorage'])"
                "  Object.defineProperty(window, name, {get() { throw new Error('denied'); }});"
            )
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda asked: None if asked.url.startswith(address) else wrong.append(asked.url))
        page.on("console", lambda line: wrong.append(line.text) if "Content Security" in line.text else None)
        page.goto(address)
        return page

    yield make
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def scripted(script: Script) -> Iterator[str]:
    with running(script.app()) as address:
        yield address
