"""How commands speak to the person at the terminal: answers on standard output, everything else on standard error."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from datetime import datetime
from typing import ParamSpec

from pydantic import ValidationError
from rich.console import Console
from sqlalchemy.exc import SQLAlchemyError

from cli.client import ServiceError
from cli.data_dir import DataDirError
from cli.embedded import EmbeddedServiceError
from cli.first_key import UnusableKey
from cli.packaged_models import PackagedModelError
from jobs.database import DatabaseNotConfigured, UnsupportedDatabase, brief
from jobs.queues import BrokerNotConfigured

P = ParamSpec("P")

# What `pip install .` leaves out: the API and the courier do without.
WORKER_PACKAGES = frozenset({"torch", "transformers", "tokenizers", "safetensors", "gguf", "numpy", "jinja2"})

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def reports_errors(command: Callable[P, int]) -> Callable[P, int]:
    """Turn the errors that a person can mend into one red line and exit code 1."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return command(*args, **kwargs)
        except (
            ServiceError,
            DatabaseNotConfigured,
            UnsupportedDatabase,
            BrokerNotConfigured,
            DataDirError,
            EmbeddedServiceError,
            UnusableKey,
            PackagedModelError,
        ) as error:
            err.print(str(error), style="red", markup=False)
        except SQLAlchemyError as error:
            err.print(f"Postgres: {brief(error)}", style="red", markup=False)
        except ValidationError as error:  # of `Settings`: what a person wrote into the environment
            for complaint in error.errors(include_url=False, include_context=False, include_input=False):
                name = "".join(f"PAGEMILL_{str(part).upper()}: " for part in complaint["loc"][:1])
                err.print(name + complaint["msg"].removeprefix("Value error, "), style="red", markup=False)
        except BrokenPipeError:  # `pagemill results JOB | head`
            # What is still buffered has no reader, and the interpreter flushes it at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except OSError as error:
            where = f"{error.filename}: " if error.filename is not None else ""
            err.print(f"{where}{error.strerror or error}", style="red", markup=False)
        except ModuleNotFoundError as error:
            if error.name not in WORKER_PACKAGES:
                raise
            mend = "pip install -c constraints.txt '.[worker]'"
            err.print(f"This needs {error.name}, which is not installed: {mend}", style="red", markup=False)
        return 1

    return run


def show_json(document: object) -> None:
    """One line that a script can read, however narrow the terminal is. Moments stand as in ISO 8601."""
    sys.stdout.write(json.dumps(document, ensure_ascii=False, default=_as_text) + "\n")
    sys.stdout.flush()


def _as_text(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)
