"""An embedded Valkey: a real server from the pip package's program, on a loopback port with a password.

Nothing of it is written to disk. It carries wake-up calls, and what it loses is found in Postgres one poll later
(decision 0001); a disk could only make it slower. Port and password are kept, so that a process which was told the
URL finds the server again after a restart.
"""

from __future__ import annotations

import secrets
import socket
from pathlib import Path

import redis

from cli.data_dir import write_private
from cli.embedded.binaries import find_valkey
from cli.supervisor import Child

HOST = "127.0.0.1"
DATABASES = 64


class EmbeddedValkey:
    """The server of one directory. `prepare()`, then run `child()`; again where its port was taken first."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._port = 0

    @property
    def url(self) -> str:
        return f"redis://:{self._password()}@{HOST}:{self._port}/0"

    def prepare(self) -> None:
        """Choose a free port, the last one if possible, and write the configuration.

        Raises EmbeddedServiceError if there is no program for this machine.
        """
        self._program = find_valkey()
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._port = _free_port(self._remembered_port())
        write_private(self._directory / "port", str(self._port))
        # In a file, since everybody can read a command line.
        settings = {
            "bind": HOST,
            "port": str(self._port),
            "requirepass": self._password(),
            "databases": str(DATABASES),
            "save": '""',
            "appendonly": "no",
            "loglevel": "warning",
        }
        write_private(self._configuration, "".join(f"{name} {value}\n" for name, value in settings.items()))

    def child(self) -> Child:
        return Child(
            name="valkey",
            argv=[str(self._program), self._configuration.name],
            ready=self._answers,
            directory=self._directory,
            ready_timeout=30.0,
        )

    @property
    def _configuration(self) -> Path:
        return self._directory / "valkey.conf"

    def _password(self) -> str:
        path = self._directory / "password"
        if not path.exists():
            write_private(path, secrets.token_urlsafe(24))
        return path.read_text().strip()

    def _remembered_port(self) -> int:
        try:
            return int((self._directory / "port").read_text())
        except (FileNotFoundError, ValueError):
            return 0

    def _answers(self, pid: int) -> bool:
        client = redis.Redis.from_url(self.url, socket_timeout=2.0, socket_connect_timeout=2.0)
        try:
            # The password alone would not tell our server from one of an earlier run on the same port.
            return int(client.info("server")["process_id"]) == pid
        except redis.RedisError:
            return False
        finally:
            client.close()


def _free_port(preferred: int) -> int:
    """`preferred` if it is free, else one that the kernel chooses."""
    for port in (preferred, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise AssertionError("the kernel always has a free port")
