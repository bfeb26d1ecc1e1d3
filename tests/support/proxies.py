"""A TCP proxy that can lose its peer, to try what a service does when Postgres or Redis is away."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from sqlalchemy.engine import URL, make_url


class Proxy:
    """Forwards 127.0.0.1:`port` to a server, until it is told to be `down` or to `hang`."""

    def __init__(self, target: tuple[str, int] | str) -> None:
        self._target = target
        self._lock = threading.Lock()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._flowing = threading.Event()
        self._flowing.set()
        self._listener: socket.socket | None = None
        self._spares = 0  # commits that go well between two whose answers are lost; 0: all do
        self._commits = 0
        self._losses = 0  # answers that are still to be lost, whatever they are
        self.lost = 0
        self.port = 0
        self.up()

    def up(self) -> None:
        """Listen (again, on the same port) and forward."""
        self._flowing.set()
        if self._listener is None:
            self._listener = socket.create_server(("127.0.0.1", self.port))
            self.port = self._listener.getsockname()[1]
            threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def down(self) -> None:
        """Refuse connections and cut those that stand: the server died."""
        with self._lock:
            listener, self._listener = self._listener, None
            pairs, self._pairs = self._pairs, []
        if listener is not None:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        for pair in pairs:
            for end in pair:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()

    def hang(self) -> None:
        """Keep connections open and forward nothing: the network swallows everything."""
        self._flowing.clear()

    def lose_commits(self, *, every: int) -> None:
        """From now on each so-manieth COMMIT succeeds at the server while its answer is lost with the connection.

        `lost` counts them; 0 ends it.
        """
        with self._lock:
            self._spares = every

    def lose_answers(self, number: int) -> None:
        """Cut so many connections from now on at the moment when the server answers; `lost` counts them."""
        with self._lock:
            self._losses = number

    def _loses_answer(self) -> bool:
        with self._lock:
            self._losses -= 1
            return self._losses >= 0

    def _loses(self, sent: bytes) -> bool:
        if b"COMMIT" not in sent:
            return False
        with self._lock:
            self._commits += 1
            return self._spares > 0 and self._commits % self._spares == 0

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                try:
                    far = self._connect()
                except OSError:
                    near.close()
                    continue
                with self._lock:
                    self._pairs.append((near, far))
                mute = threading.Event()
                threading.Thread(target=self._forward, args=(near, far, mute), daemon=True).start()
                threading.Thread(target=self._answer, args=(far, near, mute), daemon=True).start()

    def _connect(self) -> socket.socket:
        if isinstance(self._target, tuple):
            return socket.create_connection(self._target)
        far = socket.socket(socket.AF_UNIX)
        far.connect(self._target)
        return far

    def _forward(self, source: socket.socket, sink: socket.socket, mute: threading.Event) -> None:
        """What the client says. `mute` is set before a commit is passed on whose answer is to be lost."""
        with suppress(OSError):
            while chunk := source.recv(65536):
                self._flowing.wait()
                if self._loses(chunk):
                    mute.set()
                sink.sendall(chunk)
        _cut(source, sink)

    def _answer(self, source: socket.socket, sink: socket.socket, mute: threading.Event) -> None:
        """What the server says, until it is not to be heard: it has committed by then."""
        with suppress(OSError):
            while chunk := source.recv(65536):
                self._flowing.wait()
                if mute.is_set() or self._loses_answer():
                    with self._lock:
                        self.lost += 1
                    break
                sink.sendall(chunk)
        _cut(source, sink)


def _cut(*ends: socket.socket) -> None:
    for end in ends:
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


@contextmanager
def proxied(url: str) -> Iterator[tuple[Proxy, str]]:
    """A proxy before the server of a Postgres or Redis URL, and the URL that leads through it."""
    direct = make_url(url)
    directory = direct.query.get("host")
    if isinstance(directory, str):  # Postgres on a Unix socket
        proxy = Proxy(f"{directory}/.s.PGSQL.{direct.query.get('port', direct.port or 5432)}")
    else:
        assert direct.host is not None
        proxy = Proxy((direct.host, direct.port or (6379 if direct.drivername.startswith("redis") else 5432)))
    through = URL.create(direct.drivername, direct.username, direct.password, "127.0.0.1", proxy.port, direct.database)
    try:
        yield proxy, through.render_as_string(hide_password=False)
    finally:
        proxy.down()
