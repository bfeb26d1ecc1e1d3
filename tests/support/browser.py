"""A headless Chromium for tests of the dashboard, where the machine has one.

The driver is Playwright; the browser is the machine's own (`apt-get install chromium`, or PAGEMILL_TEST_CHROMIUM).
Every page that is opened here fails its test where it logs an error, throws one, or breaks its own security policy.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import PATIENCE

AXE = "axe-core@4.10.3"
DESKTOP = (1440, 900)
PHONE = (390, 844)


def executable() -> str | None:
    """The path of a Chromium, or None."""
    given = os.environ.get("PAGEMILL_TEST_CHROMIUM")
    return given or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def missing() -> str | None:
    """Why no browser can be driven here, or None."""
    if executable() is None:
        return "there is no Chromium here: apt-get install chromium, or set PAGEMILL_TEST_CHROMIUM"
    try:
        import playwright  # noqa: F401  only whether it is there
    except ImportError:
        return "the package playwright is not installed"
    return None


@contextmanager
def chromium() -> Iterator[Any]:
    """A `playwright.sync_api.Browser`."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        # Without the sandbox, since containers run tests as root.
        browser = driver.chromium.launch(executable_path=executable(), args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(browser: Any, url: str, *, size: tuple[int, int] = DESKTOP, theme: str = "light") -> Iterator[Any]:
    """A `playwright.sync_api.Page` in a context of its own, on `url` for relative addresses."""
    with context(browser, url, size=size, theme=theme) as own, page_of(own, url) as page:
        yield page


@contextmanager
def context(browser: Any, url: str, *, size: tuple[int, int] = DESKTOP, theme: str = "light") -> Iterator[Any]:
    """A `playwright.sync_api.BrowserContext`: cookies, storage and a cache that its pages share."""
    made = browser.new_context(
        base_url=url,
        viewport={"width": size[0], "height": size[1]},
        color_scheme=theme,
        reduced_motion="reduce",
        has_touch=size == PHONE,
        accept_downloads=True,
    )
    try:
        made.grant_permissions(["clipboard-read", "clipboard-write"])
        made.set_default_timeout(1000 * PATIENCE)
        yield made
    finally:
        made.close()


@contextmanager
def page_of(context: Any, url: str) -> Iterator[Any]:
    """A page of a context; it fails its test where it complains, or asks for anything that is not under `url`."""
    page = context.new_page()
    complaints: list[str] = []
    foreign: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "request",
        lambda request: foreign.append(request.url) if not request.url.startswith((url, "blob:", "data:")) else None,
    )
    page.allowed = []  # parts of complaints that a test provokes
    try:
        yield page
        kept = [text for text in complaints if not any(part in text for part in page.allowed)]
        assert kept == [], kept
        assert foreign == [], foreign
    finally:
        page.close()


def go(page: Any, path: str) -> None:
    """Follow an address as a link of the page does, without loading the page anew. Returns when it has drawn again."""
    page.evaluate(
        """path => {
            history.pushState(null, "", path);
            dispatchEvent(new PopStateEvent("popstate"));
            return new Promise(drawn => requestAnimationFrame(() => requestAnimationFrame(drawn)));
        }""",
        path,
    )


def axe_source(directory: Path) -> str | None:
    """The text of axe-core from the package index, or None where npm cannot fetch it."""
    if shutil.which("npm") is None:
        return None
    fetched = subprocess.run(
        ["npm", "install", "--no-audit", "--no-fund", "--silent", AXE], cwd=directory, capture_output=True, check=False
    )
    source = directory / "node_modules/axe-core/axe.min.js"
    return source.read_text() if fetched.returncode == 0 and source.exists() else None


def violations(page: Any, source: str) -> list[str]:
    """What axe-core finds on a page, as `rule: selector`."""
    if not page.evaluate("'axe' in window"):
        page.evaluate(source)
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [
        f"{rule['id']}: {node['target']} {node.get('failureSummary', '')}"
        for rule in found["violations"]
        for node in rule["nodes"]
    ]


needs_browser = pytest.mark.skipif(missing() is not None, reason=missing() or "")
