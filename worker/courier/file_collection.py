"""Files whose time is over: first invisible, then without content, then without a row."""

from __future__ import annotations

import logging
import threading

from sqlalchemy import Engine as Database

from jobs.file_store import STORE_ERRORS, FileStore, file_name, part_name
from jobs.queries import files
from jobs.settings import Settings

logger = logging.getLogger(__name__)

CONTENTS_A_ROUND = 100
ABANDONED_AFTER = 86400.0  # seconds that a content may take to come in


class FileCollection:
    """A sweep of the courier, found in Postgres like all others."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._store = FileStore(settings)

    def sweep(self, stopping: threading.Event) -> None:
        """Hide what has expired, then remove hidden contents and their rows. Safe beside another courier's sweep."""
        with self._database.begin() as connection:
            files.expire(connection, abandoned_after=ABANDONED_AFTER)
        while not stopping.is_set():
            with self._database.begin() as connection:
                leaving = files.leaving(connection, limit=CONTENTS_A_ROUND)
            if not leaving.files and not leaving.parts:
                return
            try:
                for name in [*map(file_name, leaving.files), *map(part_name, leaving.parts)]:
                    self._store.delete_now(name)
            except STORE_ERRORS as error:
                # The rows stay, so the next sweep tries again.
                logger.warning("contents of files cannot be removed now: %s", type(error).__name__)
                return
            with self._database.begin() as connection:
                files.forget(connection, leaving)
            logger.info("%d files and %d parts of uploads are removed", len(leaving.files), len(leaving.parts))
