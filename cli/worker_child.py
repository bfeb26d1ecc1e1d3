"""A worker as a child of a supervisor."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pydantic import SecretStr
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError

from cli.models import ModelSource
from cli.supervisor import Child
from jobs.queries import workers
from jobs.settings import Settings

IMPORT_ROOT = Path(__file__).parent.parent
MODEL_TIMEOUT = 3600.0  # seconds; a large model may have to be downloaded first
WORKER_STOP_MARGIN = 27.0  # seconds that a worker has to end, beyond the work that it may finish


def worker_child(
    name: str, settings: Settings, sources: Sequence[ModelSource], database: Engine, environment: Mapping[str, str]
) -> Child:
    """A worker that serves `sources` in turn. It is ready once Postgres knows it by its pid."""
    return Child(
        name,
        command_line("worker", *(argument for source in sources for argument in _served(source))),
        _is_registered(database),
        environment=environment,
        directory=IMPORT_ROOT,
        grace=settings.drain_deadline + WORKER_STOP_MARGIN,
        ready_timeout=MODEL_TIMEOUT,
        may_end=True,  # an operator drains or stops it
    )


def command_line(*arguments: str) -> list[str]:
    """How a child runs a command of ours, from `IMPORT_ROOT`."""
    # `-m` looks into the working directory first: what a user keeps there is not ours to import.
    return [sys.executable, "-m", "cli", *arguments]


def child_environment(settings: Settings) -> dict[str, str]:
    """Our environment, with exactly these settings in it: what was set in the shell and what the caller changed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PAGEMILL_")}
    for name in settings.model_fields_set:
        value = getattr(settings, name)
        if value is not None:
            environment[f"PAGEMILL_{name.upper()}"] = _written(value)
    return environment


def _written(value: object) -> str:
    match value:
        case SecretStr():
            return value.get_secret_value()
        case bool() | tuple() | list():
            return json.dumps(value)
        case _:
            return str(value)


def _served(source: ModelSource) -> list[str]:
    location = str(Path(source.location).absolute()) if Path(source.location).exists() else source.location
    return ["--model", location, "--served-name", source.served_name]


def _is_registered(database: Engine) -> Callable[[int], bool]:
    def ready(pid: int) -> bool:
        try:
            with database.connect() as connection:
                return workers.is_live(connection, socket.gethostname(), pid)
        except OperationalError:
            return False

    return ready
