"""Pages in a real browser: Chromium, driven by Playwright. Skipped where one of the two is not installed."""

import os
import shutil
import time
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync", "--mute-audio",
         "--disable-background-networking", "--disable-component-update",
         "--autoplay-policy=no-user-gesture-required"]  # fmt: skip


@pytest.fixture(scope="session")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no browser: none of chromium, chromium-browser, google-chrome is installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def until(page, condition: str, seconds: float = 20) -> None:
    """Waits until it is true. (Playwright's own way needs `eval`, which the pages' policy forbids.)"""
    end = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        time.sleep(0.02)


@pytest.fixture
def visit(chromium):
    """visit(path) opens a page and waits for its cards; at the end it must have asked for nothing and said nothing.

    AVF_SCREENSHOTS=DIR keeps a picture of each visit with a `name`.
    """
    contexts, wrong = [], []

    def visit(path: Path, width: int = 1280, theme: str = "light", name: str = ""):
        contexts.append(context := chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=theme))
        page = context.new_page()
        page.until = lambda condition: until(page, condition)
        page.on("console", lambda said: wrong.append(said.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda asked: asked.url.startswith(("file:", "data:")) or wrong.append(asked.url))
        page.goto(path.as_uri())
        cards = page.locator("script.card").count()
        page.until(f"document.documentElement.dataset.ready == {cards}")
        assert page.evaluate("document.documentElement.dataset.error") is None
        if name and (folder := os.environ.get("AVF_SCREENSHOTS")):
            page.screenshot(path=Path(folder, f"{name}-{width}-{theme}.png"), full_page=True)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not wrong
