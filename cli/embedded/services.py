"""Run the embedded services under a supervisor."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import psycopg

from cli.child_logs import ChildLog
from cli.data_dir import DataDir
from cli.embedded.postgres import EmbeddedPostgres
from cli.embedded.valkey import EmbeddedValkey
from cli.supervisor import ChildFailed, RestartPolicy, Supervisor

PORT_ATTEMPTS = 3


@dataclass(frozen=True)
class EmbeddedServices:
    """The running services, and the supervisor that more children can be started under."""

    database_url: str | None  # None where no Postgres was asked for
    redis_url: str | None
    supervisor: Supervisor


@contextlib.contextmanager
def embedded_services(
    data_dir: DataDir,
    log: ChildLog,
    *,
    postgres: bool = True,
    valkey: bool = True,
    durable: bool = True,
    stop_on_signals: bool = False,
    restart: RestartPolicy | None = None,
) -> Iterator[EmbeddedServices]:
    """Hold a data directory and run the services on it for the length of a `with` block.

    `durable=False` forgoes fsync: only for data that may be lost. `stop_on_signals` makes SIGINT, SIGTERM and
    SIGHUP requests to the supervisor (main thread only).

    Raises DataDirError if the directory is in use, EmbeddedServiceError or ChildFailed if a service cannot run, and
    StopRequested.
    """
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(data_dir.hold())
        supervisor = Supervisor(log, restart, pass_fds=(lock,))
        if stop_on_signals:
            # From before the first process until after the last: what comes while Postgres makes its cluster is kept.
            stack.enter_context(supervisor.stop_on_signals())
        server = stack.enter_context(EmbeddedPostgres(data_dir.postgres, durable=durable)) if postgres else None
        stack.enter_context(supervisor)
        if server is not None:
            supervisor.start(server.child())
            with supervisor.stopping_explains(psycopg.Error):
                server.create_database()
        redis_url = _start_valkey(supervisor, data_dir) if valkey else None
        yield EmbeddedServices(server.url if server else None, redis_url, supervisor)


def _start_valkey(supervisor: Supervisor, data_dir: DataDir) -> str:
    valkey = EmbeddedValkey(data_dir.valkey)
    for attempts_left in reversed(range(PORT_ATTEMPTS)):
        valkey.prepare()
        try:
            supervisor.start(valkey.child())
        except ChildFailed as failure:
            # Between our look and its bind another process may have taken the port.
            if not attempts_left or not any("already in use" in line for line in failure.last_lines):
                raise
        else:
            break
    return valkey.url
