"""Dependencies of routes: the process's services, and the tenant that asks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Concatenate, ParamSpec, TypeVar
from uuid import UUID

import psycopg
from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from api.batching import Batcher
from api.long_poll import JobWatch
from api.notifier import Notifier
from api.upload_locks import UploadLocks
from jobs import keys
from jobs.errors import InvalidKey
from jobs.file_store import FileStore
from jobs.queries.reading import Job
from jobs.queries.tenants import Tenant
from jobs.settings import Settings

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Services:
    """Objects that live as long as the process."""

    settings: Settings
    database: AsyncEngine
    pepper: bytes
    notifier: Notifier
    job_watch: JobWatch
    upload_locks: UploadLocks
    files: FileStore
    tenants: Batcher[bytes, Tenant]
    jobs: Batcher[tuple[UUID, UUID], Job]
    batches_wait: asyncio.Event
    """Set where a batch is to be validated or finalized; see `api.openai.batch_runner`."""

    async def transaction(self, query: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run one query in a transaction of its own. It is committed when this returns."""
        async with self.database.begin() as connection:
            return await connection.run_sync(query, *args, **kwargs)

    async def quietly(self, query: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> None:
        """Run a clean-up after a failure. The caller hears of that failure; what stays behind is the courier's."""
        try:
            await self.transaction(query, *args, **kwargs)
        except (SQLAlchemyError, psycopg.Error) as error:
            logger.warning("%s fails now, and is left to the courier: %s", query.__name__, type(error).__name__)


def services(request: Request) -> Services:
    """The services that the lifespan of `api.app` made."""
    found = request.app.state.services
    assert isinstance(found, Services)
    return found


InjectedServices = Annotated[Services, Depends(services)]

_bearer = HTTPBearer(auto_error=False, bearerFormat="pm_…", description="An API key: `pagemill keys create`.")


async def authenticate(
    services: InjectedServices, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> Tenant:
    """The tenant whose key came with the request. Raises `InvalidKey`."""
    if credentials is None:
        raise InvalidKey
    key = credentials.credentials
    if key.startswith(keys.PREFIX) and not keys.is_well_formed(key):
        raise InvalidKey
    tenant = await services.tenants.get(keys.digest(key, services.pepper))
    if tenant is None:
        raise InvalidKey
    return tenant


Caller = Annotated[Tenant, Depends(authenticate)]
