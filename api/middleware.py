"""Middleware around every route: a request id, one line in the log, an answer even to a fault of ours, and an answer
that arrives although the caller is still sending."""

from __future__ import annotations

import asyncio
import logging
import time
import traceback

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import MESSAGES, unexpected
from api.metrics import HttpMetrics
from api.request_spans import RequestSpans
from jobs.ids import new_id

logger = logging.getLogger("pagemill.api")

LINGER = 2.0  # seconds that a refused upload is read on, and thrown away


def new_request_id() -> str:
    """A value of `x-request-id`."""
    return f"req_{new_id().hex}"


class RequestMiddleware:
    """ASGI middleware, outside of everything else."""

    def __init__(self, app: ASGIApp, metrics: HttpMetrics, spans: RequestSpans) -> None:
        self._app = app
        self._metrics = metrics
        self._spans = spans

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send)
        with self._spans.around(scope, exchange.request_id) as answered:
            try:
                await self._answer(scope, exchange)
            finally:
                answered.route, answered.status = _route(scope), exchange.status

    async def _answer(self, scope: Scope, exchange: _Exchange) -> None:
        began = time.monotonic()
        # The path and never the query: submissions carry metadata there.
        what = f"{exchange.request_id} {scope['method']} {ascii(scope['path'])[1:-1]}"
        logger.debug("%s begins", what)
        try:
            await self._app(scope, exchange.receive, exchange.send)
        except Exception as error:  # noqa: BLE001  the caller gets an answer and the log gets the frames
            # Frames and kind, not the message: it can quote prompts.
            frames = "".join(traceback.format_tb(error.__traceback__))
            logger.error("%s %s\n%s", what, type(error).__name__, frames, extra={"request_id": exchange.request_id})
            if exchange.status is None:
                await unexpected().response(scope["path"])(scope, exchange.receive, exchange.send)
            # Else the answer stays incomplete; the server cuts the connection, and the caller sees that it is.
        finally:
            seconds = time.monotonic() - began
            route = _route(scope)
            self._metrics.observe(scope["method"], route, exchange.status, seconds)
            logger.info(
                "%s %s %.0f ms",
                what,
                exchange.status,
                seconds * 1000,
                extra={
                    "request_id": exchange.request_id,
                    "method": scope["method"],
                    "route": route,
                    "status": exchange.status,
                    "seconds": round(seconds, 4),
                },
            )


def _route(scope: Scope) -> str | None:
    # The router leaves the route that took the request.
    route: str | None = getattr(scope.get("route"), "path", None)
    return route


class _Exchange:
    """One request and its answer, watched from outside."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        self.request_id = new_request_id()
        self._path: str = scope["path"]
        self.status: int | None = None
        self._receive = receive
        self._send = send
        self._is_body_read = "transfer-encoding" not in headers and headers.get("content-length", "0") == "0"

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            self._is_body_read = True
        return message

    async def send(self, message: Message) -> None:
        is_last = message["type"] == "http.response.body" and not message.get("more_body", False)
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.request_id
            if self._path.startswith(MESSAGES):
                headers["request-id"] = self.request_id  # Anthropic's name for it
            if self._is_cut_short:
                headers["connection"] = "close"
        elif is_last and self._is_cut_short:
            # A server that closes while data still comes in resets the connection, and the caller may never read why.
            await self._send({**message, "more_body": True})
            await self._linger()
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self._send(message)

    @property
    def _is_cut_short(self) -> bool:
        return self.status is not None and self.status >= 400 and not self._is_body_read

    async def _linger(self) -> None:
        try:
            async with asyncio.timeout(LINGER):
                while not self._is_body_read:
                    await self.receive()
        except TimeoutError:
            return
