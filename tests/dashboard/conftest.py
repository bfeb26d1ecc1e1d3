"""The whole service with the demo model, and a browser before it; both serve a module of tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import pytest

from cli.models import DEMO
from cli.stack import RunningStack, running_stack
from jobs.settings import Settings
from tests.dashboard.service_calls import LOOK_AHEAD, Open, ended, sent
from tests.support import browser as browsers
from tests.support.api_server import anonymous
from tests.support.browser import DESKTOP


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(
        data_dir=tmp_path_factory.mktemp("dashboard") / "data",
        port=0,
        lease=4,
        fence_after=3,
        heartbeat_interval=1,
        webhook_allow_private=True,
    )


@pytest.fixture(scope="module")
def stack(settings: Settings) -> Iterator[RunningStack]:
    with running_stack(settings, [DEMO]) as running:
        yield running


@pytest.fixture(scope="module")
def api(stack: RunningStack) -> Iterator[httpx.Client]:
    with anonymous(stack.base_url, stack.api_key) as client:
        yield client


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browsers.chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def logged_in(chromium: Any, stack: RunningStack) -> Iterator[Callable[..., Any]]:
    """A browser context for each key and size, logged in once: its pages find the dashboard's files in its cache."""
    made: dict[tuple[str, tuple[int, int]], Any] = {}
    with ExitStack() as contexts:

        def context_of(key: str, size: tuple[int, int]) -> Any:
            if (key, size) not in made:
                context = contexts.enter_context(browsers.context(chromium, stack.base_url, size=size))
                login = context.request.post(
                    "/session", data={"key": key}, headers={"origin": stack.base_url, "x-pagemill-page": "1"}
                )
                assert login.ok, login.text()
                made[key, size] = context
            return made[key, size]

        yield context_of


@pytest.fixture
def open_page(logged_in: Callable[..., Any], stack: RunningStack) -> Open:
    """Open an address in a browser that is logged in with the first key, or with `key`."""

    @contextmanager
    def open_one(path: str = "/", *, key: str | None = None, size: tuple[int, int] = DESKTOP) -> Iterator[Any]:
        with browsers.page_of(logged_in(key or stack.api_key, size), stack.base_url) as page:
            page.goto(path)
            page.wait_for_selector("h1")
            yield page

    return open_one


@pytest.fixture(scope="module")
def with_failures(api: httpx.Client) -> dict[str, Any]:
    """A job of 24 lines of which four failed in one way."""
    prompts = [{"prompt": f"{number} + 7 =", "custom_id": f"ticket-{number}"} for number in range(10, 30)]
    return ended(api, sent(api, [*prompts, *[LOOK_AHEAD] * 4], name="with failures"))
