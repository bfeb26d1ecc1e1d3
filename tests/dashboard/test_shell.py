"""The dashboard's shell and files, over HTTP. None of it needs a database, a key, or a browser."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator

import httpx
import pytest

from api.dashboard.assets import load_assets, trimmed, without_spaces
from api.dashboard.routes import PAGES
from jobs.settings import Settings
from tests.support.api_server import anonymous, error_of, served
from tests.support.paths import REPOSITORY

STATIC = REPOSITORY / "api/dashboard/static"
RAW_LIMIT = 200_000  # bytes of everything that is sent
PACKED_LIMIT = 72_000


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    nowhere = Settings(
        database_url="postgresql://127.0.0.1:9/none",
        redis_url="redis://127.0.0.1:9",
        data_dir=tmp_path_factory.mktemp("a"),
    )
    with served(nowhere) as (_, url), anonymous(url) as opened:
        yield opened


@pytest.mark.parametrize("page", PAGES)
def test_every_page_is_the_shell_without_a_key(client: httpx.Client, page: str) -> None:
    answer = client.get(re.sub(r"\{\w+\}", "anything", page))
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.text == load_assets().shell.content.decode()


def test_policy_lets_nothing_in_from_elsewhere_and_no_markup_from_strings(client: httpx.Client) -> None:
    policy = dict(
        directive.strip().partition(" ")[::2]
        for directive in client.get("/").headers["content-security-policy"].split(";")
    )
    assert policy == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "img-src": "'self' data:",
        "connect-src": "'self'",
        "form-action": "'self'",
        "base-uri": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    assert client.get("/").headers["x-content-type-options"] == "nosniff"
    assert client.get("/").headers["referrer-policy"] == "no-referrer"


def test_shell_is_not_sent_again_while_it_is_the_same(client: httpx.Client) -> None:
    first = client.get("/")
    again = client.get("/", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == first.headers["etag"]
    assert client.get("/", headers={"if-none-match": '"another"'}).status_code == 200


def test_shell_names_every_module_and_style(client: httpx.Client) -> None:
    shell = client.get("/").text
    named = set(re.findall(r'(?:href|src)="(/static/[^"]+)"', shell))
    written = {path.relative_to(STATIC).as_posix() for path in STATIC.rglob("*") if path.is_file()} - {"index.html"}
    assert {address.split("/", 3)[3] for address in named} == written
    for address in named:
        answer = client.get(address)
        assert answer.status_code == 200, address
        assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
        kind = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}[address.rsplit(".", 1)[1]]
        assert answer.headers["content-type"] == f"{kind}; charset=utf-8"


def test_file_of_another_version_is_not_found(client: httpx.Client) -> None:
    digest = load_assets().digest
    assert client.get(f"/static/{digest}/app.js").status_code == 200
    error_of(client.get("/static/0123456789abcdef/app.js"), 404)
    error_of(client.get(f"/static/{digest}/none.js"), 404)
    error_of(client.get(f"/static/{digest}/../routes.py"), 404)
    error_of(client.get(f"/static/{digest}/index.html"), 404)


@pytest.mark.parametrize(
    ("accepted", "is_packed"), [("gzip, br", True), ("br", False), ("gzip;q=0", False), ("", False)]
)
def test_files_are_packed_where_the_browser_takes_it(client: httpx.Client, accepted: str, is_packed: bool) -> None:
    address = f"/static/{load_assets().digest}/app.js"
    with client.stream("GET", address, headers={"accept-encoding": accepted}) as answer:
        body = b"".join(answer.iter_raw())
    assert answer.headers["vary"] == "accept-encoding"
    assert (answer.headers.get("content-encoding") == "gzip") == is_packed
    assert (gzip.decompress(body) if is_packed else body) == trimmed((STATIC / "app.js").read_text()).encode()


def test_head_is_answered_without_a_body(client: httpx.Client) -> None:
    answer = client.head("/")
    assert (answer.status_code, answer.content) == (200, b"")


def test_everything_together_is_small() -> None:
    assets = load_assets()
    everything = [assets.shell, *assets.by_path.values()]
    assert sum(len(asset.content) for asset in everything) <= RAW_LIMIT
    assert sum(len(asset.packed) for asset in everything) <= PACKED_LIMIT


def test_comments_and_indentation_are_not_sent_and_lines_stay() -> None:
    source = '// one\n/** two\n * three\n */\nif (a) {\n  b("//c"); // d\n}\n/* e */ f { g: h }\n/* i */\nj\n'
    assert trimmed(source) == '\n\n\n\nif (a) {\nb("//c"); // d\n}\n/* e */ f { g: h }\n\nj\n'
    for path in STATIC.rglob("*.js"):
        text = path.read_text()
        assert trimmed(text).count("\n") == text.count("\n")
        assert all(line.count("`") % 2 == 0 for line in text.split("\n")), f"{path.name}: a literal spans lines"


def test_spaces_of_css_are_not_sent_where_they_mean_nothing() -> None:
    source = 'a > b :hover { margin: 0 1px; content: attr(x) " "; }\n@media (width > 9px) { i { top: 0 } }'
    assert without_spaces(source) == 'a > b :hover{margin:0 1px;content:attr(x) " ";}\n@media (width > 9px){i{top:0}}'
    for path in STATIC.rglob("*.css"):
        texts = re.findall('"[^"]*"', path.read_text())
        assert [text for text in texts if without_spaces(text) != text] == []


def test_no_file_names_another_origin() -> None:
    for path in STATIC.rglob("*.*"):
        for address in re.findall(r"(?:https?:)?//[\w.-]+\.\w+", path.read_text()):
            assert re.search(r"www\.w3\.org|example\.com", address), f"{path.name}: {address}"
