"""The API as a process: uvicorn, its limits, and a stop that does not wait for long polls."""

from __future__ import annotations

import signal
import socket
from functools import partial
from types import FrameType

import uvicorn
from fastapi import FastAPI

from api.app import create_app
from api.http_protocol import ConnectionLimits, HttpProtocol, connections_possible
from jobs.settings import Settings

MAX_HEADER_BYTES = 64 * 1024
SHUTDOWN_TIMEOUT = 15  # seconds that running requests have to finish


class Server(uvicorn.Server):
    """Run uvicorn, and end long polls and feeds first when it stops."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        limits = ConnectionLimits(
            max_connections=settings.max_connections or connections_possible(),
            head_timeout=settings.head_timeout,
            stall_timeout=settings.body_timeout,
        )
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                # On h11, since httptools bounds neither a header's size nor their number.
                http=partial(HttpProtocol, limits=limits),  # type: ignore[arg-type]  # uvicorn only calls it
                h11_max_incomplete_event_size=MAX_HEADER_BYTES,
                ws="none",
                lifespan="on",
                timeout_graceful_shutdown=SHUTDOWN_TIMEOUT,
                access_log=False,  # it would log queries; `api.middleware` logs paths
                log_config=None,
                log_level=settings.log_level,
                server_header=False,
            )
        )
        self._app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.state.services.job_watch.close()
        self._app.state.services.feed.close()
        await super().shutdown(sockets)


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT. Raises `SystemExit` where the address is taken. The caller has set up logging."""
    for number in (signal.SIGTERM, signal.SIGINT):
        # Uvicorn takes these over, and raises them again for the handlers from before when it has stopped.
        signal.signal(number, _stopped)
    Server(create_app(settings), settings).run()


def _stopped(number: int, frame: FrameType | None) -> None:
    """A stop that was asked for and is done ends with status 0."""
