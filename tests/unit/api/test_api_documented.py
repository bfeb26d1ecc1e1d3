"""`docs/api.md` names every route, parameter, field and error code that there is, and no other code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from fastapi.routing import APIRoute

from api import errors as api_errors
from api.app import ROUTERS
from api.dashboard import routes as dashboard
from api.routes import metrics
from jobs.errors import LeaseLost, PagemillError
from jobs.requests import JobOptions, Params
from tests.support.paths import REPOSITORY

PAGE = (REPOSITORY / "docs" / "api.md").read_text()
INTERNAL = {PagemillError, LeaseLost}  # never answered


def _kinds(kind: type[PagemillError]) -> Iterator[type[PagemillError]]:
    yield kind
    for narrower in kind.__subclasses__():
        yield from _kinds(narrower)


def test_page_names_every_route() -> None:
    own = [router for router in ROUTERS if router not in (dashboard.router, metrics.router)]
    routes = [route for router in own for route in router.routes]
    for route in routes:
        assert isinstance(route, APIRoute)
        names = "job|message_batch|batch|file|upload|key|endpoint|delivery|worker"
        path = re.sub(rf"\{{({names})_id\}}", "{id}", route.path).replace(":path", "")
        for method in route.methods or ():
            assert f"`{method} {path}" in PAGE, f"{method} {path}"


def test_page_names_every_parameter_and_field() -> None:
    parameters = PAGE.partition("### Parameters\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"`(\w+)`", "\n".join(re.findall(r"^\| (.+?) \|", parameters, re.MULTILINE)))) == set(
        Params.model_fields
    )
    inline = PAGE.partition("### Inline")[2].partition("\n### ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", inline, re.MULTILINE)) == set(JobOptions.model_fields) | {"prompts"}


def test_page_names_every_error_code() -> None:
    table = PAGE.partition("| Status | `code` |")[2]
    documented = {
        code: int(row[0])
        for row in re.findall(r"^\| (\d+) \| (.+) \|$", table, re.MULTILINE)
        for code in re.findall(r"`([a-z_]+)`", row[1])
    }
    for kind in set(_kinds(PagemillError)) - INTERNAL:
        status = next(status for parent, status in api_errors.STATUS if issubclass(kind, parent))
        assert documented[kind.code] == status, kind
    # The other codes are written out in the map itself.
    source = Path(api_errors.__file__).read_text()
    written = {(int(status), code) for status, code in re.findall(r'Problem\(\s*(\d+), .+?, "([a-z_]+)"', source)}
    named = {kind.code for kind in set(_kinds(PagemillError)) - INTERNAL}
    assert {(status, code) for code, status in documented.items() if code not in named} == {
        (status, code) for status, code in written if code not in named | {"client_closed_request"}
    }
