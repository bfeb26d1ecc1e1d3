"""How our processes log: one line an event, to standard error; `up` puts a label and a colour before it."""

from __future__ import annotations

import logging
import sys

# Chatty below a warning; httpx would log the URLs of webhooks, and SQLAlchemy rows of prompts and secrets.
QUIET = ("celery", "kombu", "httpx", "httpcore", "sqlalchemy", "transformers", "urllib3", "uvicorn.access")


def configure(level: str) -> None:
    """Log from `level` (debug, info, warning, error) on."""
    logging.basicConfig(
        level=level.upper(),
        stream=sys.stderr,
        format="%(asctime)s %(levelname)-7s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    for name in QUIET:
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))
