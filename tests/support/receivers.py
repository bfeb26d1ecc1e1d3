"""Webhook receivers on loopback, well-behaved and not. Each is a real server in a thread."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.support.processes import await_condition

Reply = tuple[int, dict[str, str]]


@dataclass(frozen=True)
class Received:
    """One request, as it came."""

    path: str
    headers: dict[str, str]  # names in lower case
    body: bytes
    at: float


@dataclass
class Receiver:
    """An HTTP server that keeps what it got. `replies` are given in turn, the last one ever after."""

    replies: list[Reply]
    received: list[Received] = field(default_factory=list)
    url: str = ""
    answer: bytes = b""  # the body of each reply

    def reply(self) -> Reply:
        return self.replies[min(len(self.received), len(self.replies)) - 1]

    def await_requests(self, number: int) -> list[Received]:
        await_condition(lambda: len(self.received) >= number, f"{number} requests at {self.url}")
        return self.received


@contextmanager
def receiver(*replies: Reply, tls: ssl.SSLContext | None = None) -> Iterator[Receiver]:
    """A server on 127.0.0.1 that answers 204 unless told otherwise."""
    state = Receiver(list(replies) or [(204, {})])

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            state.received.append(Received(self.path, headers, body, time.monotonic()))
            status, extra = state.reply()
            self.send_response(status)
            for name, value in extra.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(state.answer)

        do_GET = do_POST  # a redirect that is followed would show

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    state.url = f"http{'s' if tls else ''}://127.0.0.1:{server.server_address[1]}/hook"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@dataclass
class RawReceiver:
    """A server that answers with bytes of its own choosing."""

    url: str = ""
    accepted: int = 0
    head: bytes = b""  # what came first
    sent: int = 0


@contextmanager
def raw_receiver(answer: Callable[[RawReceiver, socket.socket], None]) -> Iterator[RawReceiver]:
    """Calls `answer` with each connection, in a thread of its own, once the request's head has come."""
    listener = socket.create_server(("127.0.0.1", 0))
    state = RawReceiver(f"http://127.0.0.1:{listener.getsockname()[1]}/hook")
    open_sockets: list[socket.socket] = []

    def serve(connection: socket.socket) -> None:
        with suppress(OSError), connection:
            state.head = connection.recv(64 * 1024)
            answer(state, connection)

    def accept() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                open_sockets.append(connection)
                state.accepted += 1
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for connection in open_sockets:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # `close` alone would leave one that is being read from open
            connection.close()
        thread.join()


def black_hole(state: RawReceiver, connection: socket.socket) -> None:
    """Takes the request and never answers."""
    while connection.recv(1024):
        pass


def dripping_head(state: RawReceiver, connection: socket.socket) -> None:
    """Sends a header a moment, for ever."""
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    while True:
        connection.sendall(b"x: y\r\n")
        time.sleep(0.02)


def dripping_body(state: RawReceiver, connection: socket.socket) -> None:
    """Sends 200 at once, and a byte of the body a moment, for ever."""
    connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n")
    while True:
        connection.sendall(b"z")
        time.sleep(0.02)


def endless_body(state: RawReceiver, connection: socket.socket) -> None:
    """Sends 200 and ten gigabytes, as fast as they are taken."""
    connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 10000000000\r\n\r\n")
    block = b"z" * 65536
    while state.sent < 10_000_000_000:
        connection.sendall(block)
        state.sent += len(block)


def garbage(state: RawReceiver, connection: socket.socket) -> None:
    """Does not speak HTTP."""
    connection.sendall(b"\x00\x01\x02 go away\r\n\r\n")


def hang_up(state: RawReceiver, connection: socket.socket) -> None:
    """Closes without a word."""
