"""Workers that come, are lost and are drained, as the dashboard shows them, in a real browser.

The test plays the workers over the queries that they use, so that each does what it does when the test wants it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import pytest

from jobs.ids import new_id, public_id
from jobs.queries import workers
from jobs.queries.claiming import ClaimedRequest
from jobs.queries.settling import settle
from jobs.queries.workers import WorkerIdentity, end
from jobs.roles import Role
from jobs.settings import Settings
from jobs.states import Wanted
from tests.dashboard.service_calls import Open
from tests.support import browser as browsers
from tests.support.api_server import Api, new_key, running_api
from tests.support.browser import needs_browser
from tests.support.processes import await_condition
from tests.support.rows import MODEL, Rows, rows_in
from tests.support.services import Services
from worker.generation.responses import Answer, Choice, completed

pytestmark = needs_browser

LINES = 6


@pytest.fixture(scope="module")
def rows(services: Services) -> Iterator[Rows]:
    with services.database() as url, rows_in(url) as made:
        made.clear()
        yield made


@pytest.fixture(scope="module")
def api(rows: Rows, services: Services, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    settings = Settings(
        database_url=rows.database_url,
        redis_url=services.redis_database(),
        data_dir=tmp_path_factory.mktemp("dashboard"),
    )
    with running_api(settings) as running:
        yield running


@pytest.fixture(scope="module")
def context(api: Api) -> Iterator[Any]:
    """A browser that is logged in as an operator of the tenant whose jobs there are."""
    with browsers.chromium() as chromium, browsers.context(chromium, api.url) as made:
        key = new_key(api.settings, "default", Role.OPERATOR)
        login = made.request.post("/session", data={"key": key}, headers={"origin": api.url, "x-pagemill-page": "1"})
        assert login.ok, login.text()
        yield made


@pytest.fixture
def open_page(context: Any, api: Api) -> Open:
    @contextmanager
    def open_one(path: str) -> Iterator[Any]:
        with browsers.page_of(context, api.url) as page:
            page.goto(path)
            page.wait_for_selector("h1")
            yield page

    return open_one


@pytest.fixture(autouse=True)
def no_worker(rows: Rows) -> None:
    rows.clear_jobs()
    rows.execute("DELETE FROM workers")


@pytest.fixture
def job(api: Api) -> str:
    prompts = [f"{number} + 7 =" for number in range(LINES)]
    sent = api.client.post("/v1/jobs", json={"model": MODEL.name, "prompts": prompts, "name": "watched"})
    assert sent.status_code == 202, sent.text
    job_id: str = sent.json()["id"]
    return job_id


def worker_on(rows: Rows, host: str) -> UUID:
    worker = WorkerIdentity(new_id(), host=host, pid=7, device="cpu")
    with rows.database.begin() as connection:
        workers.register(connection, worker, MODEL, lease=600)
    return worker.id


def beat(rows: Rows, worker_id: UUID) -> Wanted | None:
    """A heartbeat; returns what an operator wants."""
    with rows.database.begin() as connection:
        return workers.heartbeat(connection, worker_id, lease=600, stats={"seats": 8, "running": 0, "waiting": 0})


def answer(rows: Rows, claimed: tuple[ClaimedRequest, ...]) -> None:
    given = Answer([Choice("an answer", "stop")], prompt_tokens=4, cached_tokens=0, completion_tokens=2)
    with rows.database.begin() as connection:
        settle(connection, [completed(request, MODEL.name, given, is_chat=False) for request in claimed])


def test_job_without_a_worker_says_so_and_moves_when_one_comes(open_page: Open, rows: Rows, job: str) -> None:
    gone = worker_on(rows, "gpu-1")
    with rows.database.begin() as connection:
        end(connection, gone)
    with open_page(f"/jobs/{job}") as page:
        page.get_by_text(f"No live worker for {MODEL.name}, last seen").first.wait_for()
        claimed = rows.claim(worker_on(rows, "gpu-2"), limit=LINES - 1).requests
        page.locator(".badge", has_text="Running").wait_for()
        page.get_by_text("First claim, by gpu-2").wait_for()
        answer(rows, claimed)
        page.locator(".hero .legend b").first.get_by_text(str(LINES - 1), exact=True).wait_for()


def test_lost_worker_is_in_fleet_timeline_and_lines_and_no_answer_is(open_page: Open, rows: Rows, job: str) -> None:
    lost, other = worker_on(rows, "gpu-2"), worker_on(rows, "gpu-3")
    answer(rows, rows.claim(other, limit=2).requests)
    held = rows.claim(lost, limit=3).requests
    with open_page(f"/jobs/{job}") as page:
        page.locator(".badge", has_text="Running").wait_for()
        rows.lapse(lost)
        assert rows.reap() == (lost, 3, 0)
        page.get_by_text("gpu-2 lost, its lease ran out").wait_for()
        page.get_by_text("3 lines free again; no answer lost").wait_for()
        browsers.go(page, "/fleet")
        page.locator("tr.lost", has_text="gpu-2").get_by_text("its 3 lines run elsewhere").wait_for()
        browsers.go(page, f"/jobs/{job}")
        answer(rows, rows.claim(other).requests)
        page.get_by_text("Nothing: every line has an answer").wait_for()
        page.locator(".res .ans").nth(LINES - 1).wait_for()
        browsers.go(page, f"/jobs/{job}/lines/{held[0].line}")
        claims = page.get_by_role("region", name="Earlier claims")
        claims.get_by_text("lost at").wait_for()
        assert claims.get_by_role("link", name="gpu-2").get_attribute("href") == f"/fleet/{public_id('worker_', lost)}"


def test_worker_is_drained_and_taken_back_by_its_buttons(open_page: Open, rows: Rows) -> None:
    worker_id = worker_on(rows, "gpu-2")
    assert beat(rows, worker_id) is None
    with open_page("/fleet") as page:
        row = page.locator("tbody tr", has_text="gpu-2")
        drain, undrain = (
            row.get_by_role("button", name=f"{word} gpu-2-7", exact=True) for word in ("Drain", "Undrain")
        )
        drain.click()
        page.locator(".toast", has_text="claims nothing more and ends when it is empty").wait_for()
        row.get_by_text("draining", exact=True).last.wait_for()
        assert beat(rows, worker_id) is Wanted.DRAIN
        undrain.click()
        page.locator(".toast", has_text="claims lines again").wait_for()
        assert beat(rows, worker_id) is None
        drain.click()
        # The page says so before the service does.
        await_condition(lambda: beat(rows, worker_id) is Wanted.DRAIN, "the wish")
        with rows.database.begin() as connection:
            end(connection, worker_id)
        page.locator("tr.lost", has_text="gpu-2").get_by_text("stopped").wait_for()
        browsers.go(page, "/settings")
        log = page.get_by_role("region", name="Audit log")
        log.get_by_text("worker undrained").wait_for()
        assert log.get_by_text("worker drained").count() == 2
