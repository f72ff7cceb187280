"""A served page, and a browser to look at it with."""

from __future__ import annotations

import shutil

import pytest
from served_page import Served

FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """One page for a module's tests."""
    page = Served(tmp_path_factory.mktemp("runs ü"))
    yield page
    page.close()


@pytest.fixture
def fresh(tmp_path):
    """A page of the test's own, on a card of 6 GB, with no runs."""
    page = Served(tmp_path / "my runs ü", FAKE_CARD="1")
    yield page
    page.close()


@pytest.fixture(scope="session")
def browser():
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    tool = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    if not chromium:
        pytest.skip("needs Chromium")
    with tool.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=chromium, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def tab(browser):
    """Opens tabs that fail the test on a script error, a dialog, or a request to anywhere else."""
    contexts, wrong = [], []

    def away(address: str, request) -> None:
        """Notes a request to anywhere else that the page's policy has not blocked."""
        if not request.url.startswith((address, "data:", "blob:")) and "csp" not in (request.failure or "").lower():
            wrong.append(f"request: {request.url} ({request.failure})")

    def open_tab(address: str, **options):
        context = browser.new_context(viewport={"width": 1366, "height": 768}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: wrong.append(f"script error: {error}"))
        page.on("dialog", lambda dialog: (wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("requestfinished", lambda request: away(address, request))
        page.on("requestfailed", lambda request: away(address, request))
        page.goto(address)
        page.wait_for_selector("#start")
        page.wait_for_function("document.querySelector('#vram-gauge .bar')")
        return page

    yield open_tab
    for context in contexts:
        context.close()
    assert not wrong
