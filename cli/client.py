"""The command line's view of a Pagemill service: its HTTP API and nothing else."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from cli.first_key import KEY_FILE
from cli.running import with_running
from jobs.settings import Settings

CHUNK = 1 << 16
TERMINAL = frozenset({"completed", "failed", "expired", "cancelled"})


class ServiceError(RuntimeError):
    """The service cannot be reached, or it refused. The message is for the person at the terminal."""


@dataclass(frozen=True, slots=True)
class Submission:
    """Everything of a job but its lines."""

    model: str
    webhook_url: str | None = None
    params: Mapping[str, str] | None = None


class Client:
    """Talks to one service with one key. Raises `ServiceError`."""

    def __init__(self, base_url: str, api_key: str) -> None:
        self.base_url = base_url
        self._http = httpx.Client(
            base_url=base_url,
            headers={"Authorization": f"Bearer {api_key}"},
            timeout=httpx.Timeout(60, connect=5),
            trust_env=False,
        )

    @classmethod
    def from_settings(cls, settings: Settings) -> Client:
        """The service that `pagemill up` runs on this data directory, or PAGEMILL_URL with PAGEMILL_API_KEY."""
        url = with_running(settings).url
        if settings.api_key is not None:
            return cls(url, settings.api_key.get_secret_value())
        try:
            key = (settings.data_dir / KEY_FILE).read_text().strip()
        except FileNotFoundError:
            raise ServiceError(
                f"There is no API key in {settings.data_dir}: set PAGEMILL_API_KEY, or PAGEMILL_DATA_DIR to the "
                "--data-dir of the `pagemill up` that you mean, or start one."
            ) from None
        return cls(url, key)

    def close(self) -> None:
        self._http.close()

    def models(self) -> list[dict[str, Any]]:
        """What the service knows how to serve."""
        models: list[dict[str, Any]] = self._json("GET", "/v1/models")["data"]
        return models

    def submit(self, lines: Path, submission: Submission) -> dict[str, Any]:
        """Stream a file of NDJSON as a new job."""
        query = {"model": submission.model} | dict(submission.params or {})
        if submission.webhook_url is not None:
            query["webhook_url"] = submission.webhook_url
        with lines.open("rb") as file:
            return self._json(
                "POST",
                "/v1/jobs",
                params=query,
                content=iter(lambda: file.read(CHUNK), b""),
                headers={"Content-Type": "application/x-ndjson"},
            )

    def job(self, job_id: str, *, wait: float = 0) -> dict[str, Any]:
        """A job as it stands, or as it stands when it ends within `wait` seconds."""
        return self._json("GET", f"/v1/jobs/{job_id}", params={"wait": wait} if wait else {})

    def follow(self, job_id: str, *, interval: float = 0.25) -> Iterator[dict[str, Any]]:
        """A job again and again, at most every `interval` seconds, until it has ended."""
        while True:
            job = self.job(job_id)
            yield job
            if job["status"] in TERMINAL:
                return
            time.sleep(interval)

    def results(self, job_id: str, *, after: int = 0) -> Iterator[bytes]:
        """Result lines with a `seq` above `after`, as the service wrote them."""
        with self._answer("GET", f"/v1/jobs/{job_id}/results", params={"after": after}) as response:
            yield from _lines(response)

    def cancel(self, job_id: str) -> dict[str, Any]:
        return self._json("POST", f"/v1/jobs/{job_id}/cancel")

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
                    raise ServiceError(_complaint(response))
                yield response
        except httpx.HTTPError as error:
            raise ServiceError(f"{self.base_url} does not answer: {error or type(error).__name__}") from error


def _lines(response: httpx.Response) -> Iterator[bytes]:
    # httpx's own line splitter breaks at U+2028 too, which may stand inside a JSON string.
    rest = b""
    for chunk in response.iter_bytes():
        *whole, rest = (rest + chunk).split(b"\n")
        yield from whole
    if rest:
        yield rest


def _complaint(response: httpx.Response) -> str:
    try:
        error = response.json()["error"]
        return f"{error['message']} ({response.status_code} {error['code']})"
    except (ValueError, KeyError, TypeError):
        return f"{response.request.url} answered {response.status_code}"
