"""Dependencies of routes: the process's services, and the tenant that asks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Concatenate, ParamSpec, TypeVar
from uuid import UUID

import psycopg
from fastapi import Depends, Request, Response
from fastapi.security import APIKeyCookie, APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from api import session_cookie
from api.batching import Batcher
from api.feed_hub import Feed
from api.long_poll import JobWatch
from api.notifier import Notifier
from api.session_cookie import Cookies
from api.transactions import Transactions
from api.upload_locks import UploadLocks
from api.wrong_keys import WrongKeys
from jobs import keys
from jobs.errors import InvalidKey, RoleTooNarrow
from jobs.file_store import FileStore
from jobs.queries.explaining import ModelQueue
from jobs.queries.live import LiveModel
from jobs.queries.reading import Job
from jobs.queries.tenants import Principal
from jobs.roles import Role
from jobs.settings import Settings

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Services:
    """Objects that live as long as the process."""

    settings: Settings
    transactions: Transactions
    pepper: bytes
    notifier: Notifier
    job_watch: JobWatch
    upload_locks: UploadLocks
    files: FileStore
    keys: Batcher[bytes, Principal]
    principals: Batcher[UUID, Principal]
    cookies: Cookies
    wrong_keys: WrongKeys
    models: Batcher[str, LiveModel]
    jobs: Batcher[tuple[UUID, UUID], Job]
    queues: Batcher[str, ModelQueue]
    """By model. Callers who ask at once for why jobs wait share one look."""

    feed: Feed
    batches_wait: asyncio.Event
    """Set where a batch is to be validated or finalized; see `api.openai.batch_runner`."""

    async def transaction(self, query: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run one query in a transaction of its own. It is committed when this returns."""
        return await self.transactions.run(query, *args, **kwargs)

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
_header = APIKeyHeader(name="x-api-key", auto_error=False, description="The same, as Anthropic's clients send it.")
_session = APIKeyCookie(
    name=session_cookie.COOKIE, auto_error=False, description="A page that is logged in: `POST /session`."
)


async def authenticate(
    request: Request,
    response: Response,
    services: InjectedServices,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
    header: Annotated[str | None, Depends(_header)],
    cookie: Annotated[str | None, Depends(_session)],
) -> Principal:
    """The tenant and role of the key, or of the session, that came with the request.

    This is the one place that holds every route to the key's role: a read-only key changes nothing. Raises
    `InvalidKey`, `RoleTooNarrow`, and `ForeignPage` for a session's write from another site.
    """
    is_write = request.method not in session_cookie.SAFE_METHODS
    if credentials is not None:
        principal = await principal_of(services, credentials.credentials)
    elif header is not None:
        principal = await principal_of(services, header)
    elif cookie is not None:
        principal = await _in_session(request, response, services, cookie)
        if is_write:
            session_cookie.require_own_page(request)
    else:
        raise InvalidKey
    if is_write and not principal.role.may_write:
        raise RoleTooNarrow(principal.role, "it changes nothing")
    return principal


async def principal_of(services: Services, key: str) -> Principal:
    """The principal of a key. Raises `InvalidKey`."""
    if key.startswith(keys.PREFIX) and not keys.is_well_formed(key):
        raise InvalidKey
    principal = await services.keys.get(keys.digest(key, services.pepper))
    if principal is None:
        raise InvalidKey
    return principal


async def _in_session(request: Request, response: Response, services: Services, cookie: str) -> Principal:
    session = services.cookies.read(cookie)
    principal = None if session is None else await services.principals.get(session.key_id)
    if session is None or principal is None:
        raise InvalidKey
    renewed = session.renewed()
    if renewed is not None:
        # Answers that a route makes itself do not take this header along; the page gets it with the next JSON.
        services.cookies.set(request, response, renewed)
    return principal


Caller = Annotated[Principal, Depends(authenticate)]


async def require_operator(caller: Caller) -> Principal:
    """The caller, who runs the service. Raises `RoleTooNarrow`."""
    if caller.role is not Role.OPERATOR:
        raise RoleTooNarrow(caller.role, "this wants a key of the role operator")
    return caller


Operator = Annotated[Principal, Depends(require_operator)]
