"""The one map from exceptions to error answers.

Every failure leaves as `{"error": {"message", "type", "param", "code"}}`, with `line` where a line of a file is to
blame. An unforeseen exception is a 500 that says nothing of its cause; the log has it under the same `x-request-id`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import psycopg
import sqlalchemy.exc
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match

from api.wrong_keys import WINDOW
from jobs import errors, patterns
from jobs.database import UnsupportedDatabase

logger = logging.getLogger(__name__)

MESSAGES = "/v1/messages"
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
}
RETRY_AFTER = {"retry-after": "2"}

# The first of these that an error is an instance of decides its status.
STATUS: tuple[tuple[type[errors.PagemillError], int], ...] = (
    (errors.TooLarge, 413),
    (errors.InvalidInput, 400),
    (errors.InvalidKey, 401),
    (errors.RoleTooNarrow, 403),
    (errors.ForeignPage, 403),
    (errors.TooManyWrongKeys, 429),
    (errors.KeyNotFound, 404),
    (errors.WorkerNotFound, 404),
    (errors.WorkerEnded, 409),
    (errors.ModelNotFound, 404),
    (errors.JobNotFound, 404),
    (errors.LineNotFound, 404),
    (errors.BatchMissing, 404),
    (errors.BatchEnded, 409),
    (errors.MessageBatchMissing, 404),
    (errors.MessageBatchNotEnded, 400),
    (errors.FileMissing, 404),
    (errors.UploadMissing, 404),
    (errors.WebhookEndpointMissing, 404),
    (errors.WebhookDeliveryMissing, 404),
    (errors.FileInUse, 409),
    (errors.UploadClosed, 409),
    (errors.FileQuotaExceeded, 403),
    (errors.StorageFull, 507),
    (errors.StorageFailed, 503),
    (errors.JobNotDeletable, 409),
    (errors.BulkCountChanged, 409),
    (errors.JobNotOpen, 409),
    (errors.TooManyOpenJobs, 409),
    (errors.NothingToRetry, 409),
    (errors.PromptsGone, 409),
    (errors.IdempotencyBusy, 409),
    (errors.SubmissionCollected, 409),
    (errors.IdempotencyMismatch, 422),
)
HEADERS: dict[type[errors.PagemillError], dict[str, str]] = {
    errors.InvalidKey: {"www-authenticate": "Bearer"},
    errors.TooManyWrongKeys: {"retry-after": f"{WINDOW:.0f}"},
    errors.IdempotencyBusy: {"retry-after": "1"},
    # Sent again it would be refused again; the official OpenAI clients obey this header.
    errors.IdempotencyMismatch: {"x-should-retry": "false"},
    errors.JobNotDeletable: {"x-should-retry": "false"},
    errors.BulkCountChanged: {"x-should-retry": "false"},
    errors.WorkerEnded: {"x-should-retry": "false"},
    errors.JobNotOpen: {"x-should-retry": "false"},
    errors.TooManyOpenJobs: {"x-should-retry": "false"},
    errors.NothingToRetry: {"x-should-retry": "false"},
    errors.PromptsGone: {"x-should-retry": "false"},
    errors.BatchEnded: {"x-should-retry": "false"},
    errors.FileInUse: {"x-should-retry": "false"},
    errors.UploadClosed: {"x-should-retry": "false"},
    errors.StorageFull: {"x-should-retry": "false"},
    errors.StorageFailed: RETRY_AFTER,
}
PARAM: dict[type[errors.PagemillError], str] = {errors.ModelNotFound: "model"}

# https://www.postgresql.org/docs/current/errcodes-appendix.html
DISK_FULL = "53100"
UNDEFINED = ("42P01", "42703")  # table, column
PASSING_CLASSES = ("08", "40", "53", "55", "57", "58")  # connections, rollbacks, resources, locks, operators, system
READ_ONLY_TRANSACTION = "25006"  # a standby after a failover


class UnsupportedMediaType(Exception):
    """The body has a type or an encoding that is not understood."""


class BodyTimeout(Exception):
    """The caller stopped sending in the middle of a body."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"The body stopped arriving for {seconds:g} seconds.")


class Unavailable(Exception):
    """Something that the API needs is away for a while."""


class NoPlaceNow(Exception):
    """A request that may wait found no place to wait in."""


@dataclass(frozen=True, slots=True)
class Problem:
    """An answer that is not a success."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    line: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def type(self) -> str:
        if self.status == 401:
            return "authentication_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    @property
    def content(self) -> bytes:
        """The error as JSON."""
        body: dict[str, object] = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        if self.line is not None:
            body["line"] = self.line
        # A message may quote what was sent. Python escapes what UTF-8 cannot hold in the form that JSON has for it.
        return json.dumps({"error": body}, ensure_ascii=False).encode("utf-8", "backslashreplace")

    def response(self, path: str = "") -> Response:
        """The answer to a request of that path: under `MESSAGES` in Anthropic's shape, else in OpenAI's."""
        content = self.content
        if path.startswith(MESSAGES):
            kind = _ANTHROPIC_TYPES.get(self.status, "api_error" if self.status >= 500 else "invalid_request_error")
            error = json.loads(content)["error"] | {"type": kind}
            content = json.dumps({"type": "error", "error": error}).encode()
        return Response(content, self.status, dict(self.headers), media_type="application/json")


def problem(error: Exception) -> Problem | None:
    """What callers see of an error, or None where it is a fault of ours that was never meant to happen."""
    match error:
        case errors.PagemillError():
            return _of_pagemill(error)
        case RequestValidationError():
            return _of_validation(error)
        case HTTPException():
            return _of_http(error)
        case UnsupportedMediaType():
            return Problem(415, str(error), "unsupported_media_type")
        case BodyTimeout():
            return Problem(408, str(error), "request_timeout")
        case ClientDisconnect():
            return Problem(499, "The client hung up.", "client_closed_request")
        case Unavailable() | UnsupportedDatabase():
            return Problem(503, str(error), "unavailable", headers=RETRY_AFTER)
        case NoPlaceNow():
            return Problem(429, str(error), "resource_unavailable", headers=RETRY_AFTER)
        case sqlalchemy.exc.TimeoutError():
            return Problem(503, "Every connection to the database is busy.", "overloaded", headers=RETRY_AFTER)
        case sqlalchemy.exc.DBAPIError():
            return _of_database(error.orig) if isinstance(error.orig, Exception) else None
        case psycopg.Error():
            return _of_database(error)
        case _:
            return None


def _of_pagemill(error: errors.PagemillError) -> Problem | None:
    for kind, status in STATUS:
        if isinstance(error, kind):
            param = error.param if isinstance(error, errors.InvalidInput) else PARAM.get(kind)
            line = error.line if isinstance(error, errors.InvalidInput) else None
            return Problem(status, str(error), error.code, param, line, HEADERS.get(kind, {}))
    return None


def _of_validation(error: RequestValidationError) -> Problem:
    complaint = error.errors()[0]
    # The first part says where it was looked for: query, path, header.
    param = ".".join(str(part) for part in complaint["loc"][1:])[:100] or None
    message = "no such parameter" if complaint["type"] == "extra_forbidden" else patterns.message(complaint)
    return Problem(400, f"{param}: {message}" if param else message, errors.InvalidInput.code, param)


def _of_http(error: HTTPException) -> Problem:
    headers = dict(error.headers or {})
    if error.status_code == 404:
        return Problem(404, "There is nothing at this address.", "not_found", headers=headers)
    if error.status_code == 405:
        return Problem(405, "This address does not understand that method.", "method_not_allowed", headers=headers)
    return Problem(error.status_code, str(error.detail), headers=headers)


def _of_database(error: Exception) -> Problem | None:
    state = error.sqlstate if isinstance(error, psycopg.Error) else None
    if state == DISK_FULL:
        return Problem(507, "The database's disk is full. Nothing was stored.", "insufficient_storage")
    if state in UNDEFINED:
        return Problem(
            503,
            "The database's tables are missing or of an older version: run `pagemill migrate`.",
            "unavailable",
            headers=RETRY_AFTER,
        )
    if state == READ_ONLY_TRANSACTION or (state is not None and state.startswith(PASSING_CLASSES)):
        return Problem(503, "The database is not available just now.", "unavailable", headers=RETRY_AFTER)
    # A connection that broke or never came about has no SQLSTATE of the server's.
    if state is None and isinstance(error, psycopg.OperationalError | psycopg.InterfaceError):
        return Problem(503, "The database is not available just now.", "unavailable", headers=RETRY_AFTER)
    return None


def unexpected() -> Problem:
    """A fault of ours."""
    return Problem(500, "Something went wrong on our side. The log has it under this x-request-id.", "internal_error")


def head_overdue(seconds: float) -> Problem:
    """A connection whose head did not come."""
    return Problem(408, f"The head of the request did not arrive within {seconds:g} seconds.", "request_timeout")


def connections_exhausted() -> Problem:
    """A connection above the server's bound."""
    return Problem(503, "Every connection is taken by a running request.", "overloaded", headers=RETRY_AFTER)


def malformed_http(hint: int, reason: str, *, is_in_request_line: bool) -> Problem:
    """Bytes that are no request. `hint` is the status that h11 thinks of."""
    if hint != 431:
        return Problem(400, f"This is not HTTP/1.1: {reason}.", "malformed_http")
    if is_in_request_line:
        return Problem(414, "The address is too long: a schema goes into the body, line by line.", "address_too_long")
    return Problem(431, "The header fields are too large.", "headers_too_large")


def _methods(routes: Sequence[BaseRoute], request: Request) -> set[str]:
    # Starlette names the methods of the first route at this address only.
    matching = (route for route in routes if route.matches(request.scope)[0] is not Match.NONE)
    return {method for route in matching for method in getattr(route, "methods", None) or ()}


def install(app: FastAPI, routes: Sequence[BaseRoute]) -> None:
    """Answer every foreseen failure of `app` in the one shape. `api.middleware` answers the others."""

    async def answer(request: Request, error: Exception) -> Response:
        foreseen = problem(error)
        if foreseen is None:
            raise error
        if foreseen.status == 405:
            foreseen = replace(foreseen, headers={"allow": ", ".join(sorted(_methods(routes, request)))})
        if foreseen.status >= 500:
            # Only the kind: a driver's message can quote the data.
            logger.warning("%s: %s", type(error).__name__, getattr(error, "sqlstate", None) or foreseen.code)
        return foreseen.response(request.url.path)

    for kind in (
        errors.PagemillError,
        RequestValidationError,
        HTTPException,
        UnsupportedMediaType,
        BodyTimeout,
        ClientDisconnect,
        Unavailable,
        NoPlaceNow,
        UnsupportedDatabase,
        sqlalchemy.exc.SQLAlchemyError,
        psycopg.Error,
    ):
        app.add_exception_handler(kind, answer)
