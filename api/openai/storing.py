"""A content comes in: a row is reserved, the bytes go to the store, and then the row becomes visible."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from jobs.errors import StorageFailed, StorageFull
from jobs.file_store import STORE_ERRORS

logger = logging.getLogger(__name__)

# Stores wrap the system's error and keep only its text.
_FULL = ("No space left", "os error 28", "Disk quota", "os error 122")


@asynccontextmanager
async def storing() -> AsyncIterator[None]:
    """Raise what the store raises as `StorageFull` or `StorageFailed`, which callers may read."""
    try:
        yield
    except STORE_ERRORS as error:
        logger.error("the file store fails: %s", type(error).__name__)
        raise (StorageFull if any(sign in str(error) for sign in _FULL) else StorageFailed)() from None
