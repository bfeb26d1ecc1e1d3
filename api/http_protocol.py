"""HTTP/1.1 as uvicorn speaks it, and what uvicorn leaves open: deadlines and bounds before a request is one.

A head has a deadline, connections have a bound (past it the one that has waited longest without a request gives way),
a client that does not read is cut, a half-closed client is answered, and every refusal has the one shape of errors.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import sys
import time
from dataclasses import dataclass, field
from typing import Any, cast

import h11
from starlette.types import Scope
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from api.errors import Problem, connections_exhausted, head_overdue, malformed_http
from api.middleware import LINGER, new_request_id

logger = logging.getLogger("pagemill.api")

LOG_INTERVAL = 30.0  # seconds between two warnings of one kind
RESERVED_DESCRIPTORS = 64  # for Postgres, Redis, files and the event loop


def connections_possible() -> int:
    """Connections that the process's file descriptors allow, after raising their soft limit to the hard one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - RESERVED_DESCRIPTORS)


@dataclass(slots=True)
class ConnectionLimits:
    """Bounds of one server's connections. Durations are seconds."""

    max_connections: int
    head_timeout: float  # from the connection, or a head's first byte, to its end
    stall_timeout: float  # without a byte that the client takes
    # Connections without a request, the one that has waited longest first.
    idle: dict[HttpProtocol, None] = field(default_factory=dict)
    _warned_at: dict[str, float] = field(default_factory=dict)

    def warn(self, message: str, *details: object) -> None:
        """Log a warning, unless the same one was logged a moment ago."""
        now = time.monotonic()
        if now - self._warned_at.get(message, float("-inf")) >= LOG_INTERVAL:
            self._warned_at[message] = now
            logger.warning(message, *details)


def end_of_input(scope: Scope) -> asyncio.Event:
    """Set when the client of a running request has closed its side of the connection.

    A client that is gone looks the same until something is sent to it: a route that answers late chooses what it means.
    """
    event = scope.setdefault("pagemill.end_of_input", asyncio.Event())
    assert isinstance(event, asyncio.Event)
    return event


class HttpProtocol(H11Protocol):
    """One connection. Made by uvicorn, with `functools.partial` for the limits."""

    def __init__(self, *args: Any, limits: ConnectionLimits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._has_received = False
        self._is_half_closed = False
        self._is_refused = False

    @property
    def _awaits_head(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    # What the transport calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch_head()
        if len(self.connections) > self._limits.max_connections:
            self._make_room()

    def _make_room(self) -> None:
        self._limits.warn(
            "%d connections are open, which is the bound: idle ones give way, others are refused",
            self._limits.max_connections,
        )
        longest_idle = next(iter(self._limits.idle))
        if longest_idle is self:
            self._refuse(connections_exhausted())
        else:
            del self._limits.idle[longest_idle]
            longest_idle.transport.abort()
            # Until it is lost, it still counts.
            self.connections.discard(longest_idle)

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        self._has_received = True
        super().data_received(data)
        self._watch_head()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep a connection open whose client has said all that it wants to say, and waits for the answer."""
        if self._is_refused or self._awaits_head or self.cycle.more_body:
            return False
        self._is_half_closed = True
        end_of_input(cast(Scope, self.cycle.scope)).set()
        return True

    def pause_writing(self) -> None:
        super().pause_writing()
        self._cut_if_it_stalls()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel_stall_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._limits.idle.pop(self, None)
        self._cancel_head_timer()
        self._cancel_stall_timer()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    # What uvicorn calls

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._is_half_closed and self._awaits_head:
            self.transport.close()
        if self.transport.is_closing():
            self._cut_if_it_stalls()
        elif self._awaits_head:
            self._limits.idle[self] = None
            if self.conn.trailing_data[0]:
                self._watch_head()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._cut_if_it_stalls()

    def send_400_response(self, msg: str) -> None:
        """Answer what h11 does not take for HTTP. Called while its error is handled."""
        error = sys.exc_info()[1]
        hint = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        is_in_request_line = self._awaits_head and b"\n" not in self.conn.trailing_data[0]
        self._refuse(malformed_http(hint, str(error), is_in_request_line=is_in_request_line))

    # Deadlines

    def _watch_head(self) -> None:
        if self.transport.is_closing() or self._is_refused or not self._awaits_head:
            self._limits.idle.pop(self, None)
            self._cancel_head_timer()
        elif self._head_timer is None:
            self._limits.idle.setdefault(self)
            self._head_timer = self.loop.call_later(self._limits.head_timeout, self._end_overdue)

    def _cancel_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _end_overdue(self) -> None:
        self._limits.warn("A connection sent no whole head within %g seconds: closed", self._limits.head_timeout)
        self._limits.idle.pop(self, None)
        self._head_timer = None
        if self._has_received and self.conn.our_state is h11.IDLE:
            self._refuse(head_overdue(self._limits.head_timeout))
        else:
            self.transport.abort()

    def _cut_if_it_stalls(self) -> None:
        if self._stall_timer is None:
            self._stall_timer = self.loop.call_later(self._limits.stall_timeout, self.transport.abort)

    def _cancel_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    # Refusals

    def _refuse(self, problem: Problem) -> None:
        """Answer without the application, and read on for a moment: closing at once would reset the connection."""
        self._is_refused = True
        self._limits.idle.pop(self, None)
        self._cancel_head_timer()
        request_id = new_request_id()
        logger.info(
            "%s refused before it was a request: %d %s",
            request_id,
            problem.status,
            problem.code,
            extra={"request_id": request_id},
        )
        if not self._awaits_head:
            is_answered = self.cycle.response_started
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if is_answered:
                self.transport.close()
                return
        response = problem.response()
        headers = [*response.raw_headers, (b"x-request-id", request_id.encode()), (b"connection", b"close")]
        try:
            head = self.conn.send(
                h11.Response(status_code=problem.status, headers=headers, reason=STATUS_PHRASES[problem.status])
            )
            body = self.conn.send(h11.Data(data=bytes(response.body)))
        except h11.LocalProtocolError:
            self.transport.abort()
            return
        self.transport.write((head or b"") + (body or b""))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(LINGER, self.transport.abort)
