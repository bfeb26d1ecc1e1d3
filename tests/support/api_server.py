"""The API over real HTTP, in a thread of the test's own process, and clients that have keys for it."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field

import httpx
from sqlalchemy import Engine

from api.app import create_app
from api.server import Server
from jobs import keys
from jobs.database import connect
from jobs.queries import tenants
from jobs.roles import Role
from jobs.settings import Settings
from tests.support.processes import PATIENCE, await_condition

NDJSON = {"content-type": "application/x-ndjson"}


@dataclass
class Api:
    """A running API. `client` has a key of the tenant `default`."""

    settings: Settings
    server: Server
    url: str
    client: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.client = self.client_of("default")

    def client_of(self, tenant: str, role: Role = Role.READ_WRITE) -> httpx.Client:
        """A client with a fresh key of that tenant."""
        return anonymous(self.url, new_key(self.settings, tenant, role))

    def connect(self) -> socket.socket:
        """A bare connection, for what no HTTP client would do."""
        return socket.create_connection((self.settings.host, int(self.url.rpartition(":")[2])), timeout=PATIENCE)

    def upload(
        self, body: bytes | Iterator[bytes], headers: dict[str, str] | None = None, **query: str | int
    ) -> httpx.Response:
        """Submit NDJSON for the model `demo`, unless `query` names another."""
        return self.client.post(
            "/v1/jobs", params={"model": "demo"} | query, content=body, headers=NDJSON | (headers or {})
        )


def anonymous(url: str, key: str | None = None) -> httpx.Client:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    return httpx.Client(base_url=url, headers=headers, timeout=PATIENCE, trust_env=False)


def new_key(settings: Settings, tenant: str, role: Role = Role.READ_WRITE) -> str:
    """A key that the API with these settings accepts."""
    key = keys.new_key()
    database: Engine = connect(settings, "pagemill tests")
    with database.begin() as connection:
        owner = tenants.ensure_tenant(connection, tenant, keys.new_webhook_secret())
        digest = keys.digest(key, keys.load_pepper(settings))
        tenants.add_key(connection, owner.id, name="test", hint=keys.hint(key), digest=digest, role=role)
    database.dispose()
    return key


def address_in(log: str) -> str | None:
    """Where an API process with this log listens, or None before it does."""
    found = re.search(r"Uvicorn running on (http://\S+) \(", log)
    return None if found is None else found[1]


@contextmanager
def running_api(settings: Settings) -> Iterator[Api]:
    """Serve on a free port until the block ends, with a client that has a key."""
    with served(settings) as (server, url):
        api = Api(settings, server, url)
        with closing(api.client):
            yield api


@contextmanager
def served(settings: Settings) -> Iterator[tuple[Server, str]]:
    """Serve on a free port until the block ends: the server and its URL."""
    settings = settings.model_copy(update={"port": 0})
    server = Server(create_app(settings), settings)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        await_condition(lambda: server.started or not thread.is_alive(), "start of the API")
        port = server.servers[0].sockets[0].getsockname()[1]
        yield server, f"http://{settings.host}:{port}"
    finally:
        server.should_exit = True
        thread.join()


def error_of(response: httpx.Response, status: int) -> dict[str, object]:
    """The error in an answer, which must have this status and the one shape of all errors."""
    assert response.status_code == status, (response.status_code, response.text)
    assert response.headers["x-request-id"].startswith("req_")
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    if response.request.url.path.startswith("/v1/messages"):
        assert body.pop("type") == "error"  # Anthropic's shape
        assert response.headers["request-id"] == response.headers["x-request-id"]
    assert set(body) == {"error"}
    assert set(body["error"]) - {"line"} == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    error: dict[str, object] = body["error"]
    return error
