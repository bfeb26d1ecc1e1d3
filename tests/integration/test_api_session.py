"""A page's login: the cookie, what a write with it needs, and how it ends."""

from __future__ import annotations

import time
from collections.abc import Iterator
from http.cookies import SimpleCookie
from uuid import UUID

import httpx
import pytest

from api.session_cookie import COOKIE, IDLE, LONGEST, Cookies, Session
from api.wrong_keys import MOST
from jobs import keys
from jobs.ids import parse_id
from jobs.queries import tenants
from jobs.settings import Settings
from tests.support.api_server import Api, anonymous, error_of, new_key, running_api
from tests.support.rows import Rows

OWN_PAGE = {"sec-fetch-site": "same-origin", "x-pagemill-page": "1"}


@pytest.fixture(scope="module")
def api(api_settings: Settings) -> Iterator[Api]:
    with running_api(api_settings) as running:
        yield running


@pytest.fixture
def page(api: Api) -> Iterator[httpx.Client]:
    """A client that keeps cookies and sends no key."""
    with anonymous(api.url) as client:
        yield client


@pytest.fixture
def key(api: Api) -> str:
    return new_key(api.settings, "default")


def log_in(page: httpx.Client, **login: str) -> httpx.Response:
    return page.post("/session", json=login, headers=OWN_PAGE)


def cookie_of(session: Session, api: Api) -> dict[str, str]:
    return {"cookie": f"{COOKIE}={Cookies(keys.load_pepper(api.settings)).value(session)}"}


def test_login_sets_a_cookie_that_no_script_and_no_other_site_gets(page: httpx.Client, key: str) -> None:
    answer = log_in(page, key=key)
    assert answer.status_code == 200
    assert (answer.json()["tenant"], answer.json()["role"]) == ("default", "read-write")
    assert key not in answer.text
    morsel = SimpleCookie(answer.headers["set-cookie"])[COOKIE]
    assert morsel["httponly"]
    assert morsel["samesite"] == "strict"
    assert morsel["path"] == "/"
    assert not morsel["secure"]
    assert IDLE - 60 < int(morsel["max-age"]) <= IDLE
    assert page.get("/v1/jobs").status_code == 200
    assert page.get("/session").json() == answer.json()


def test_cookie_is_secure_on_https(api: Api, page: httpx.Client, key: str) -> None:
    # As behind a proxy on this machine that ends TLS.
    answer = page.post("/session", json={"key": key}, headers=OWN_PAGE | {"x-forwarded-proto": "https"})
    assert SimpleCookie(answer.headers["set-cookie"])[COOKIE]["secure"]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"sec-fetch-site": "same-origin"},
        {"x-pagemill-page": "1"},
        {"x-pagemill-page": "1", "sec-fetch-site": "cross-site"},
        {"x-pagemill-page": "1", "sec-fetch-site": "same-site"},
        {"x-pagemill-page": "1", "sec-fetch-site": "none"},
        {"x-pagemill-page": "1", "origin": "http://evil.example"},
        {"x-pagemill-page": "1", "origin": "null"},
    ],
)
def test_write_with_a_cookie_is_refused_from_another_page(
    page: httpx.Client, key: str, headers: dict[str, str]
) -> None:
    log_in(page, key=key)
    assert error_of(page.post("/v1/keys", json={}, headers=headers), 403)["code"] == "foreign_page"
    assert error_of(page.post("/session", json={"key": key}, headers=headers), 403)["code"] == "foreign_page"


def test_write_with_a_cookie_is_taken_from_our_page(api: Api, page: httpx.Client, key: str) -> None:
    log_in(page, key=key)
    for headers in (OWN_PAGE, {"x-pagemill-page": "1", "origin": api.url}):
        assert page.post("/v1/keys", json={}, headers=headers).status_code == 201


def test_key_beside_a_cookie_counts_alone(api: Api, page: httpx.Client, key: str) -> None:
    log_in(page, key=key)
    other = new_key(api.settings, "another")
    assert page.get("/session", headers={"authorization": f"Bearer {other}"}).json()["tenant"] == "another"


def test_session_ends_with_its_key(page: httpx.Client, api: Api, key: str) -> None:
    key_id = log_in(page, key=key).json()["key_id"]
    assert api.client.delete(f"/v1/keys/{key_id}").status_code == 200
    assert error_of(page.get("/v1/jobs"), 401)["code"] == "invalid_api_key"


def test_logout_forgets_the_cookie(page: httpx.Client, key: str) -> None:
    log_in(page, key=key)
    assert page.delete("/session", headers=OWN_PAGE).status_code == 204
    assert page.get("/v1/jobs").status_code == 401


@pytest.mark.parametrize(
    "spoil", [lambda value: value[:-1] + ("0" if value[-1] != "0" else "1"), lambda value: "x", lambda value: ""]
)
def test_changed_cookie_is_refused(api: Api, page: httpx.Client, key: str, spoil: object) -> None:
    log_in(page, key=key)
    value = spoil(page.cookies[COOKIE])  # type: ignore[operator]
    page.cookies.clear()
    assert page.get("/v1/jobs", headers={"cookie": f"{COOKIE}={value}"}).status_code == 401


def test_session_goes_on_while_used_and_ends_after_30_days(api: Api, page: httpx.Client, key: str) -> None:
    key_id = parse_id("key_", log_in(page, key=key).json()["key_id"])
    assert key_id is not None
    page.cookies.clear()
    now = int(time.time())

    def session(*, age: int, left: int) -> Session:
        began = UUID(int=((now - age) * 1000 << 80) | 0x7 << 76 | 0b10 << 62)
        return Session(began, key_id, now + left)

    fresh = page.get("/v1/jobs", headers=cookie_of(session(age=60, left=IDLE - 60), api))
    assert fresh.status_code == 200
    assert "set-cookie" not in fresh.headers
    used = page.get("/v1/jobs", headers=cookie_of(session(age=3600, left=IDLE - 3600), api))
    assert int(SimpleCookie(used.headers["set-cookie"])[COOKIE]["max-age"]) > IDLE - 60
    old = page.get("/v1/jobs", headers=cookie_of(session(age=LONGEST - 3600, left=60), api))
    assert int(SimpleCookie(old.headers["set-cookie"])[COOKIE]["max-age"]) <= 3600
    page.cookies.clear()
    assert page.get("/v1/jobs", headers=cookie_of(session(age=IDLE, left=-1), api)).status_code == 401


class TestLoginCode:
    def code(self, api: Api, rows: Rows, key: str, seconds: float = 60) -> str:
        pepper = keys.load_pepper(api.settings)
        code = f"code of {key[-8:]}"
        with rows.database.begin() as connection:
            digests = (keys.digest(key, pepper), keys.digest(code, pepper))
            assert tenants.add_login_code(connection, *digests, seconds=seconds)
        return code

    def test_code_logs_in_once(self, api: Api, api_rows: Rows, page: httpx.Client, key: str) -> None:
        code = self.code(api, api_rows, key)
        assert log_in(page, code=code).status_code == 200
        assert page.get("/v1/jobs").status_code == 200
        assert error_of(log_in(page, code=code), 401)["code"] == "invalid_api_key"

    def test_code_is_refused_when_its_time_is_over(
        self, api: Api, api_rows: Rows, page: httpx.Client, key: str
    ) -> None:
        assert log_in(page, code=self.code(api, api_rows, key, seconds=-1)).status_code == 401


@pytest.mark.parametrize("login", [{}, {"key": "a", "code": "b"}, {"key": 1}, {"password": "x"}])
def test_login_without_one_of_the_two_is_refused(page: httpx.Client, login: dict[str, str]) -> None:
    error_of(log_in(page, **login), 400)


def test_login_from_one_address_waits_after_wrong_keys(api_settings: Settings, key: str) -> None:
    with running_api(api_settings) as api, anonymous(api.url) as page:
        for number in range(MOST):
            assert error_of(log_in(page, key=f"guess {number}"), 401)["code"] == "invalid_api_key"
        refused = log_in(page, key=key)
        assert error_of(refused, 429)["code"] == "too_many_wrong_keys"
        assert refused.headers["retry-after"] == "60"
        # A key that comes with each request is no guess at the login.
        assert page.get("/v1/jobs", headers={"authorization": f"Bearer {key}"}).status_code == 200
