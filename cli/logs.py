"""How our processes log: one line an event, to standard error; `up` puts a label and a colour before it."""

from __future__ import annotations

import logging
import sys
from typing import Literal

from pythonjsonlogger.json import JsonFormatter

# Chatty below a warning; httpx would log the URLs of webhooks, and SQLAlchemy rows of prompts and secrets.
QUIET = ("celery", "kombu", "httpx", "httpcore", "sqlalchemy", "transformers", "urllib3", "uvicorn.access")


def configure(level: str, form: Literal["text", "json"] = "text") -> None:
    """Log from `level` (debug, info, warning, error) on, for people or as one JSON object a line."""
    handler = logging.StreamHandler(sys.stderr)
    if form == "json":
        # What a call gives as `extra`, such as `job_id`, becomes fields of its own.
        fields, renamed = ["levelname", "name", "message", "process"], {"levelname": "level", "name": "logger"}
        handler.setFormatter(JsonFormatter(fields, rename_fields=renamed, timestamp="time"))
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in QUIET:
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))
