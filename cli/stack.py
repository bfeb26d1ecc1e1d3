"""The whole service on one machine: services, schema, key, and our three kinds of process under one supervisor.

`pagemill up`, the demo and the acceptance tests all run it:

    with running_stack(settings, ["demo"]) as stack:
        stack.base_url, stack.api_key, stack.pids()
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import itertools
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import psycopg
from sqlalchemy import create_engine
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from cli import models
from cli.child_logs import ChildLog
from cli.data_dir import DataDir
from cli.embedded import embedded_services
from cli.first_key import ensure_first_key
from cli.running import Running, require_not_running
from cli.supervisor import Child, Supervisor
from cli.worker_child import IMPORT_ROOT, child_environment, command_line, worker_child
from jobs.database import sqlalchemy_url
from jobs.settings import Settings
from migrations.run import upgrade

STOP_MARGIN = 15.0  # seconds that a process has to end


class CannotListen(RuntimeError):
    """The API's address is taken, or none of this machine's. The message says how to mend it."""


@dataclass(frozen=True)
class RunningStack:
    """A running service."""

    base_url: str
    api_key: str
    database_url: str
    redis_url: str
    logs: Path  # a file for each process
    supervisor: Supervisor

    def pids(self) -> dict[str, int]:
        """The present process of each child: postgres, valkey, api, courier, worker, worker-2 ..."""
        return self.supervisor.pids()


@contextlib.contextmanager
def running_stack(
    settings: Settings,
    model_names: Sequence[str] = (),
    *,
    stream: TextIO | None = None,
    colour: bool = False,
    stop_on_signals: bool = False,
) -> Iterator[RunningStack]:
    """Start everything on `settings.data_dir` and wait until it serves; stop it all on leaving.

    A Postgres and a Valkey are started where `settings` names none. One worker runs for each of `model_names`
    (PAGEMILL_MODEL, or the demo model, where there are none), and serves those that are listed with commas in turn.
    `stream` gets the labelled lines of all processes.

    Raises CannotListen, ChildFailed, DataDirError, EmbeddedServiceError, UnsupportedDatabase and UnusableKey where
    something cannot start, and StopRequested if a signal came before that.
    """
    data_dir = DataDir(settings.data_dir)
    require_not_running(data_dir)
    settings = settings.model_copy(update={"data_dir": data_dir.path, "port": _free_port(settings.host, settings.port)})
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(contextlib.closing(ChildLog(data_dir.logs, stream, colour=colour)))
        if settings.database_url is None or settings.redis_url is None:
            log.write("pagemill", f"starting the embedded services on {data_dir.path}")
        services = stack.enter_context(
            embedded_services(
                data_dir,
                log,
                postgres=settings.database_url is None,
                valkey=settings.redis_url is None,
                stop_on_signals=stop_on_signals,
            )
        )
        database_url = settings.database_url or services.database_url
        redis_url = settings.redis_url or services.redis_url
        assert database_url is not None
        assert redis_url is not None
        settings = settings.model_copy(update={"database_url": database_url, "redis_url": redis_url})

        with services.supervisor.stopping_explains(SQLAlchemyError, psycopg.Error):
            upgrade(database_url)
            api_key = ensure_first_key(settings, database_url)
        base_url = f"http://{_reachable(settings.host)}:{settings.port}"
        stack.callback(Running.remove, data_dir.path)
        Running(base_url, database_url, redis_url).write(data_dir.path)

        names = list(model_names) or [settings.model or models.DEMO]
        log.write("pagemill", f"starting on {base_url}, with {', '.join(names)}; it serves once the model is loaded")
        services.supervisor.start(*_children(settings, names))
        yield RunningStack(base_url, api_key, database_url, redis_url, data_dir.logs, services.supervisor)


def _children(settings: Settings, model_names: Sequence[str]) -> list[Child]:
    numbers = itertools.count()

    def with_metrics_port() -> dict[str, str]:
        environment = child_environment(settings)
        if settings.metrics_port:
            environment["PAGEMILL_METRICS_PORT"] = str(settings.metrics_port + next(numbers))
        return environment

    def child(name: str, ready: Callable[[int], bool], grace: float, environment: Mapping[str, str]) -> Child:
        return Child(name, command_line(name), ready, environment=environment, directory=IMPORT_ROOT, grace=grace)

    assert settings.database_url is not None
    database = create_engine(sqlalchemy_url(settings.database_url), poolclass=NullPool)
    children = [
        child("api", _api_is_ready(settings), STOP_MARGIN + 5.0, child_environment(settings)),
        # Serving does not depend on the courier: all that it does is found in Postgres, however late it comes up.
        child("courier", lambda pid: True, STOP_MARGIN, with_metrics_port()),
    ]
    for number, in_turn in enumerate(model_names, start=1):
        name = "worker" if number == 1 else f"worker-{number}"
        sources = [models.resolve(model) for model in models.split(in_turn)]
        children.append(worker_child(name, settings, sources, database, with_metrics_port()))
    return children


def _api_is_ready(settings: Settings) -> Callable[[int], bool]:
    def ready(pid: int) -> bool:
        connection = http.client.HTTPConnection(_reachable(settings.host).strip("[]"), settings.port, timeout=5)
        try:
            connection.request("GET", "/readyz")
            return connection.getresponse().status == http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    return ready


def _free_port(host: str, port: int) -> int:
    """`port`, or one that the kernel chooses where it is 0."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (
        socket.gaierror,
        UnicodeError,
    ) as error:  # UnicodeError: a label of more than 63 characters, or an empty one
        why = error.strerror if isinstance(error, socket.gaierror) else "no name of a machine"
        raise CannotListen(
            f"The API cannot listen on {host!r}: {why}. Give one of this machine's addresses with --host."
        ) from error
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise CannotListen(f"The API cannot listen on {host}:{port}: {error.strerror}. {_remedy(error)}") from error
        return int(probe.getsockname()[1])


def _remedy(error: OSError) -> str:
    if error.errno == errno.EADDRNOTAVAIL:
        return "Give one of this machine's addresses with --host."
    if error.errno == errno.EACCES:
        return "Ports below 1024 need privileges: choose a higher one with --port."
    return "Choose another port with --port, or let the system choose one with --port 0."


def _reachable(host: str) -> str:
    """Where a server that listens on `host` is found from this machine, as it stands in a URL."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    return f"[{host}]" if ":" in host else host
