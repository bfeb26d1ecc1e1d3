"""Contents of files, outside of Postgres: a directory, or a bucket that speaks S3, GCS or Azure.

    PAGEMILL_FILES_URL     file:///var/lib/pagemill/files   s3://bucket/prefix   (credentials as its SDK reads them)
    files/<id>             a whole file
    parts/<id>             a part of an upload that is not complete yet

An object appears at once and whole, when it is closed. Nothing here reads or writes more than a piece at a time.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cached_property
from pathlib import Path
from typing import Protocol, cast
from uuid import UUID

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, ObjectStore, from_url

from jobs.settings import Settings

PIECE = 256 * 1024  # bytes read at a time

STORE_ERRORS = (BaseError, OSError)
"""What a store raises: it is away, full, or refuses."""


class Writer(Protocol):
    """Takes the bytes of one object."""

    async def write(self, data: bytes) -> object: ...


class FileStore:
    """Objects by name, in the store that the settings name."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    @cached_property
    def _store(self) -> ObjectStore:
        # Made on first use, because a process that serves no files needs no place for them.
        url = self._settings.files_url
        if url is None:
            return cast(ObjectStore, LocalStore(self._settings.data_dir / "files", mkdir=True))
        if url.startswith("file://"):
            return from_url(url, mkdir=True)
        return from_url(url)

    @asynccontextmanager
    async def writing(self, name: str) -> AsyncIterator[Writer]:
        """Write an object. It exists once the block has ended, and never where the block raises."""
        async with obstore.open_writer_async(self._store, name) as writer:
            yield cast(Writer, writer)

    async def read(self, name: str, start: int, end: int) -> AsyncIterator[bytes]:
        """Bytes `start` to `end`, the latter left out, in pieces. Raises FileNotFoundError."""
        if start >= end:
            return
        found = await obstore.get_async(self._store, name, options={"range": (start, end)})
        async for piece in found.stream(min_chunk_size=PIECE):
            yield bytes(piece)

    async def delete(self, name: str) -> None:
        """Remove an object; one that is not there is removed already."""
        try:
            await obstore.delete_async(self._store, name)
        except FileNotFoundError:
            return

    def delete_now(self, name: str) -> None:
        """As `delete`, for threads; also what a process that was killed had written of the object."""
        if isinstance(self._store, LocalStore):
            # A directory's store writes to `<name>#<number>` until the object is whole.
            whole = Path(str(self._store.prefix)) / name
            for part in whole.parent.glob(f"{whole.name}#*"):
                part.unlink(missing_ok=True)
        try:
            obstore.delete(self._store, name)
        except FileNotFoundError:
            return


def file_name(file_id: UUID) -> str:
    """Where a file's content lies."""
    return f"files/{file_id.hex}"


def part_name(part_id: UUID) -> str:
    """Where a part of an upload lies."""
    return f"parts/{part_id.hex}"
