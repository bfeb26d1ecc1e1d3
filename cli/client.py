"""The command line's view of a Pagemill service: its HTTP API and nothing else."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any, BinaryIO

import httpx

from cli.first_key import KEY_FILE
from cli.running import with_running
from jobs.settings import Settings

CHUNK = 1 << 16
GZIP_MAGIC = b"\x1f\x8b"
TERMINAL = frozenset({"completed", "failed", "expired", "cancelled"})
PASSING = frozenset({HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT})
RETRY_DELAY = 2.0  # seconds between two tries where the service names no time of its own
LONGEST_RETRY_DELAY = 60.0


class ServiceError(RuntimeError):
    """The service cannot be reached, or it refused. The message is for the person at the terminal."""


class ServiceUnavailable(ServiceError):
    """The service is away for a while: a restart, an overload, or no service at all."""

    def __init__(self, message: str, retry_after: float = RETRY_DELAY) -> None:
        super().__init__(message)
        self.retry_after = min(retry_after, LONGEST_RETRY_DELAY)  # seconds


OnOutage = Callable[[ServiceUnavailable | None], None]
"""Told of an outage once when it begins, and with None when it is over."""


@dataclass(frozen=True, slots=True)
class Submission:
    """Everything of a job but its lines. `options` are fields of the query, such as ("temperature", "0")."""

    model: str
    webhook_url: str | None = None
    options: Sequence[tuple[str, str]] = field(default=())


class Client:
    """Talks to one service with one key. Raises `ServiceError`, whose messages hold neither key nor password."""

    def __init__(self, base_url: str, api_key: str, *, key_origin: str = "the API key") -> None:
        """`key_origin` says in messages where the key was found."""
        self.base_url = base_url
        self._shown_url = _shown(base_url)
        self._key_origin = key_origin
        self._http = httpx.Client(
            base_url=base_url,
            headers={"Authorization": f"Bearer {_sendable(api_key, key_origin)}"},
            timeout=httpx.Timeout(60, connect=5),
            trust_env=False,
        )

    @classmethod
    def from_settings(cls, settings: Settings) -> Client:
        """The service that `pagemill up` runs on this data directory, or PAGEMILL_URL with PAGEMILL_API_KEY."""
        url = with_running(settings).url
        if settings.api_key is not None:
            return cls(url, settings.api_key.get_secret_value(), key_origin="PAGEMILL_API_KEY")
        file = settings.data_dir / KEY_FILE
        try:
            key = file.read_text(errors="replace").strip()
        except FileNotFoundError:
            raise ServiceError(
                f"There is no API key in {settings.data_dir}: set PAGEMILL_API_KEY, or PAGEMILL_DATA_DIR to the "
                "--data-dir of the `pagemill up` that you mean, or start one."
            ) from None
        return cls(url, key, key_origin=str(file))

    def close(self) -> None:
        self._http.close()

    def models(self) -> list[dict[str, Any]]:
        """What the service knows how to serve."""
        models: list[dict[str, Any]] = self._json("GET", "/v1/models")["data"]
        return models

    def submit(self, file: Path, submission: Submission) -> dict[str, Any]:
        """Stream a file of NDJSON as a new job."""
        with file.open("rb") as lines:
            return self.submit_stream(lines, submission)

    def submit_stream(self, lines: BinaryIO, submission: Submission) -> dict[str, Any]:
        """Stream NDJSON as a new job. What begins as gzip does is sent as it is, under that encoding."""
        query = [("model", submission.model), *submission.options]
        if submission.webhook_url is not None:
            query.append(("webhook_url", submission.webhook_url))
        first = lines.read(CHUNK)
        headers = {"Content-Type": "application/x-ndjson"}
        if first.startswith(GZIP_MAGIC):
            headers["Content-Encoding"] = "gzip"
        chunks = itertools.chain((first,), iter(lambda: lines.read(CHUNK), b""))
        return self._json("POST", "/v1/jobs", params=query, content=chunks, headers=headers)

    def job(self, job_id: str, *, wait: float = 0) -> dict[str, Any]:
        """A job as it stands, or as it stands when it ends within `wait` seconds."""
        return self._json("GET", f"/v1/jobs/{job_id}", params={"wait": wait} if wait else {})

    def follow(
        self, job_id: str, *, interval: float = 0.25, on_outage: OnOutage | None = None
    ) -> Iterator[dict[str, Any]]:
        """A job again and again, at most every `interval` seconds, until it has ended.

        With `on_outage` an outage is waited out, however long it takes; without it, it is raised.
        """
        outage: ServiceUnavailable | None = None
        while True:
            try:
                job = self.job(job_id)
            except ServiceUnavailable as error:
                if on_outage is None:
                    raise
                outage = _wait_out(error, outage, on_outage)
                continue
            if outage is not None and on_outage is not None:
                on_outage(None)
            outage = None
            yield job
            if job["status"] in TERMINAL:
                return
            time.sleep(interval)

    def results(self, job_id: str, *, after: int = 0, on_outage: OnOutage | None = None) -> Iterator[bytes]:
        """Result lines with a `seq` above `after`, as the service wrote them.

        With `on_outage` an outage is waited out, and the stream goes on behind the last line that came whole.
        """
        outage: ServiceUnavailable | None = None
        while True:
            line = b""
            try:
                with self._answer("GET", f"/v1/jobs/{job_id}/results", params={"after": after}) as response:
                    for line in _lines(response):
                        yield line
                    return
            except ServiceUnavailable as error:
                if on_outage is None:
                    raise
                if line:
                    after, outage = json.loads(line)["seq"], None
                outage = _wait_out(error, outage, on_outage)

    def cancel(self, job_id: str) -> dict[str, Any]:
        return self._json("POST", f"/v1/jobs/{job_id}/cancel")

    def retry(self, job_id: str, wanted: dict[str, Any]) -> dict[str, Any]:
        """The new job that runs lines of this one again; without a choice, all that have no answer."""
        return self._json("POST", f"/v1/jobs/{job_id}/retry", json=wanted)

    def webhook_secret(self) -> str:
        """The tenant's secret that webhooks are signed with."""
        secret: str = self._json("GET", "/v1/webhook_secret")["secret"]
        return secret

    def _json(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        with self._answer(method, path, **options) as response:
            answer: dict[str, Any] = json.loads(response.read())
            return answer

    @contextlib.contextmanager
    def _answer(self, method: str, path: str, **options: Any) -> Iterator[httpx.Response]:
        try:
            with self._http.stream(method, path, **options) as response:
                if response.is_error:
                    response.read()
                    raise self._refusal(response)
                yield response
        except (httpx.LocalProtocolError, httpx.UnsupportedProtocol) as error:
            # Its text may quote a header, and one of them is the key.
            raise ServiceError(
                f"The request to {self._shown_url} could not be built: {type(error).__name__}."
            ) from None
        except httpx.ConnectError as error:
            raise ServiceUnavailable(
                f"No service answers at {self._shown_url} ({error}). Start one with `pagemill up`, or say where it is "
                "with PAGEMILL_URL, or with PAGEMILL_DATA_DIR where `up` was given a --data-dir."
            ) from error
        except httpx.HTTPError as error:
            what = f"did not answer in time ({type(error).__name__})"
            if not isinstance(error, httpx.TimeoutException):
                what = f"broke the connection off ({error or type(error).__name__})"
            raise ServiceUnavailable(f"{self._shown_url} {what}.") from error

    def _refusal(self, response: httpx.Response) -> ServiceError:
        try:
            error = response.json()["error"]
            message = f"{error['message']} ({response.status_code} {error['code']})"
        except (ValueError, KeyError, TypeError):
            message = f"{self._shown_url}{response.request.url.path} answered {response.status_code}"
        if response.status_code == HTTPStatus.UNAUTHORIZED:
            message += f"\nThe key was taken from {self._key_origin}."
        if response.status_code in PASSING:
            return ServiceUnavailable(message, _retry_after(response))
        return ServiceError(message)


def _wait_out(error: ServiceUnavailable, before: ServiceUnavailable | None, on_outage: OnOutage) -> ServiceUnavailable:
    """Sleep until the next try. The outage is told unless `before` was a part of it."""
    if before is None:
        on_outage(error)
    time.sleep(error.retry_after)
    return error


def _retry_after(response: httpx.Response) -> float:
    """Seconds that the service asks for. A date, which only proxies send, counts as none."""
    try:
        return max(0.0, float(response.headers["retry-after"]))
    except (KeyError, ValueError):
        return RETRY_DELAY


def _shown(base_url: str) -> str:
    """The URL without user and password. Raises ServiceError where it is none, without repeating it."""
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL:
        url = httpx.URL()
    if url.scheme not in ("http", "https") or not url.host:
        raise ServiceError("PAGEMILL_URL is not a URL such as http://127.0.0.1:8100.")
    return str(url.copy_with(userinfo=b"")).rstrip("/")


def _sendable(key: str, origin: str) -> str:
    """`key`, if a header can carry it. The complaint names one character of it at most."""
    if not key:
        raise ServiceError(f"{origin} is empty. Unset it to use the key in the data directory, or set it to a key.")
    unfit = next((character for character in key if not " " <= character <= "~"), " " if key != key.strip() else "")
    if unfit:
        raise ServiceError(f"{origin} holds the character {unfit!r}, which is in no API key. Was it copied whole?")
    return key


def _lines(response: httpx.Response) -> Iterator[bytes]:
    # httpx's own line splitter breaks at U+2028 too, which may stand inside a JSON string.
    rest = b""
    for chunk in response.iter_bytes():
        *whole, rest = (rest + chunk).split(b"\n")
        yield from whole
    if rest:
        yield rest
