"""One attempt to deliver one webhook, as Standard Webhooks 1.0 has it: signed afresh each time, under the same id.

    resolve once, check every address → connect to exactly those → TLS by the host's name → POST → status

httpcore, not httpx: it follows no redirect, reads no proxy or credentials from the environment, and lets us bring the
sockets. One deadline covers everything from name resolution to the last byte that is read, however slowly those drip.
"""

from __future__ import annotations

import base64
import contextlib
import email.utils
import ipaddress
import re
import ssl
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import httpcore
import httpx
import orjson
from standardwebhooks.webhooks import Webhook

from jobs.ids import BATCH_PREFIX, EVENT_PREFIX, JOB_PREFIX, public_id
from jobs.queries.webhooks import DueDelivery
from worker.courier.addresses import AddressPolicy, AddressRefused, ResolutionFailed

BODY_CAP = 16 * 1024  # bytes of an answer's body that are read; the status alone decides
ANSWER_KEPT = 256  # bytes of an answer's body that its owner can read
HEAD_CAP = 64 * 1024  # bytes of an answer that are kept to find its status in, if its headers cannot be parsed
LONGEST_RETRY_AFTER = 86400.0  # seconds; a receiver may ask for a day's rest, not for a year's


@dataclass(frozen=True, slots=True)
class WebhookResponse:
    """What an attempt came to. Delivered where `error` is None."""

    status: int | None = None  # None: there was no answer
    error: str | None = None
    is_final: bool = False  # no retry can mend it
    is_gone: bool = False  # 410: the receiver wants nothing more, ever
    retry_after: float | None = None  # seconds, where the receiver asked to be left alone for a while
    answer: bytes = b""  # the first bytes of the body


def attempt(delivery: DueDelivery, policy: AddressPolicy, *, timeout: float, tls: ssl.SSLContext) -> WebhookResponse:
    """POST the event; returns within about `timeout` seconds. Network faults are answers, not exceptions.

    An address that may not be reached is final where the URL spells it out. Where a name led to it, DNS may have
    changed by the next attempt, and every attempt is checked anew.
    """
    deadline = _Deadline(timeout)
    try:
        url = httpx.URL(delivery.url)
    except httpx.InvalidURL as error:
        return WebhookResponse(error=f"the URL is not valid: {error}", is_final=True)
    host = url.raw_host.decode("ascii")
    port = url.port if url.port is not None else {"http": 80, "https": 443}.get(url.scheme, 0)
    if not host or not 0 < port < 65536:
        return WebhookResponse(
            error="the URL is not valid: it needs http or https, a host and a possible port", is_final=True
        )
    try:
        addresses = policy.addresses(host, port, timeout=deadline.remaining())
        return _post(delivery, url, _PinnedBackend(addresses, deadline), tls)
    except AddressRefused as error:
        return WebhookResponse(error=str(error), is_final=_is_address(host))
    except ResolutionFailed as error:
        return WebhookResponse(error=str(error))
    except httpcore.TimeoutException:
        return WebhookResponse(error=f"no complete answer within {timeout:g} s")
    except (httpcore.NetworkError, httpcore.ProtocolError) as error:
        return WebhookResponse(error=f"{type(error).__name__}: {error}")


def payload(delivery: DueDelivery) -> bytes:
    """The event as JSON: the same bytes on every attempt, since a job at its end does not change.

    A milestone has the counters of the moment when it was announced.

    A batch's event has OpenAI's shape; a test's object has the event's own id.
    """
    prefix = BATCH_PREFIX if delivery.event_type.startswith("batch.") else JOB_PREFIX
    data: dict[str, object] = {"id": public_id(prefix, delivery.batch_id or delivery.job_id or delivery.event_id)}
    if delivery.job_id is not None:
        data |= _job(delivery)
    return orjson.dumps(
        {
            "id": public_id(EVENT_PREFIX, delivery.event_id),
            "object": "event",
            "type": delivery.event_type,
            "created_at": int(delivery.event_created_at.timestamp()),
            "data": data,
        }
    )


def _job(delivery: DueDelivery) -> dict[str, object]:
    if delivery.detail is not None:
        return {"object": "job", "status": "in_progress", "model": delivery.model, "metadata": delivery.metadata} | (
            delivery.detail
        )
    return {
        "object": "job",
        "status": delivery.job_state,
        "model": delivery.model,
        "metadata": delivery.metadata,
        "request_counts": {
            "total": delivery.total,
            "completed": delivery.completed,
            "failed": delivery.failed,
            "cancelled": delivery.cancelled,
            "expired": delivery.expired,
        },
    }


def signed_headers(delivery: DueDelivery, body: bytes) -> dict[str, str]:
    """The three headers of Standard Webhooks. The timestamp is Postgres' clock at the moment this attempt was taken."""
    message_id = public_id(EVENT_PREFIX, delivery.event_id)
    # In UTC: the library replaces the time zone instead of converting.
    timestamp = delivery.taken_at.astimezone(UTC)
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(int(timestamp.timestamp())),
        # Parted by blanks: a receiver takes any that it knows.
        "webhook-signature": " ".join(
            Webhook(secret).sign(message_id, timestamp, body.decode()) for secret in delivery.secrets
        ),
    }


def retry_after(value: bytes | None, now: datetime) -> float | None:
    """`Retry-After` (RFC 9110: seconds or a date) in seconds from `now`, a day at most; None where it says nothing."""
    if value is None:
        return None
    text = value.decode("latin-1").strip()
    if text.isascii() and text.isdigit():
        seconds = float(text[:12])
    else:
        try:
            date = email.utils.parsedate_to_datetime(text)
        except ValueError:
            return None
        seconds = (date.replace(tzinfo=date.tzinfo or UTC) - now).total_seconds()
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER)


def _post(delivery: DueDelivery, url: httpx.URL, backend: _PinnedBackend, tls: ssl.SSLContext) -> WebhookResponse:
    body = payload(delivery)
    headers = {
        "host": url.netloc.decode("ascii"),
        "user-agent": "Pagemill",
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        **signed_headers(delivery, body),
    }
    if delivery.traceparent is not None:
        headers["traceparent"] = delivery.traceparent
    if url.username or url.password:
        credentials = base64.b64encode(f"{url.username}:{url.password}".encode())
        headers["authorization"] = f"Basic {credentials.decode('ascii')}"
    target = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
    try:
        with (
            httpcore.HTTPConnection(origin=target.origin, ssl_context=tls, network_backend=backend) as connection,
            connection.stream("POST", target, headers=list(headers.items()), content=body) as response,
        ):
            # httpcore gives names as they were sent.
            answered = {name.lower(): value for name, value in response.headers}
            answer = _judge(response.status, answered.get(b"retry-after"), delivery.taken_at)
            # The status decides. A little of the body is read, for receivers that cannot bear to be cut off, and a
            # fault in it changes nothing.
            with contextlib.suppress(httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError):
                answer = replace(answer, answer=_read_some(response))
            return answer
    except httpcore.RemoteProtocolError:
        # The receiver took the event and said so, in headers that h11 refuses: a retry would deliver it again.
        status = status_of(bytes(backend.head))
        if status is None:
            raise
        found = _RETRY_AFTER.search(backend.head)
        return _judge(status, None if found is None else bytes(found[1]), delivery.taken_at)


_STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([1-9]\d\d)(?: [^\r\n]*)?\r?\n")
_RETRY_AFTER = re.compile(rb"(?im)^retry-after:[ \t]*([^\r\n]*)")


def status_of(head: bytes) -> int | None:
    """The status of the first final response (not 1xx) that begins in `head`, however its headers look; or None."""
    while line := _STATUS_LINE.match(head):
        status = int(line[1])
        if status >= 200:
            return status
        head = head.partition(b"\r\n\r\n")[2]
    return None


def _judge(status: int, wait: bytes | None, now: datetime) -> WebhookResponse:
    if 200 <= status < 300:
        return WebhookResponse(status)
    if status == 410:
        return WebhookResponse(status, "the receiver is gone (410)", is_final=True, is_gone=True)
    if 300 <= status < 400:
        return WebhookResponse(status, f"the receiver answered {status}; redirects are not followed")
    asked = retry_after(wait, now) if status in (429, 503) else None
    return WebhookResponse(status, f"the receiver answered {status}", retry_after=asked)


def _read_some(response: httpcore.Response) -> bytes:
    """The first bytes of the body."""
    kept, received = b"", 0
    for chunk in response.iter_stream():
        received += len(chunk)
        kept += chunk[: ANSWER_KEPT - len(kept)]
        if received >= BODY_CAP:
            break
    return kept


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class _Deadline:
    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def remaining(self) -> float:
        """Seconds that are left. Raises `httpcore.TimeoutException` where there are none."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise httpcore.ReadTimeout("the deadline is over")
        return left


class _PinnedBackend(httpcore.NetworkBackend):
    """Connects to the checked addresses and ignores the host name, so that DNS is not asked a second time."""

    def __init__(self, addresses: Sequence[str], deadline: _Deadline) -> None:
        self._addresses = addresses
        self._deadline = deadline
        self.head = bytearray()
        """The first bytes of the answer."""
        self._sockets = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        failure: Exception = httpcore.ConnectError(f"{host} has no address")
        for tried, address in enumerate(self._addresses):
            # One that is silent leaves time for the others.
            share = self._deadline.remaining() / (len(self._addresses) - tried)
            try:
                stream = self._sockets.connect_tcp(address, port, share, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
            else:
                return _DeadlineStream(stream, self._deadline, self.head)
        raise failure


class _DeadlineStream(httpcore.NetworkStream):
    """A socket on which no single wait outlasts the attempt."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: _Deadline, head: bytearray) -> None:
        self._stream = stream
        self._deadline = deadline
        self._head = head

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        received = self._stream.read(min(max_bytes, BODY_CAP), self._deadline.remaining())
        self._head += received[: HEAD_CAP - len(self._head)]
        return received

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._deadline.remaining())

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        return _DeadlineStream(
            self._stream.start_tls(ssl_context, server_hostname, self._deadline.remaining()), self._deadline, self._head
        )

    def get_extra_info(self, info: str) -> object:
        return self._stream.get_extra_info(info)
