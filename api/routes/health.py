"""Whether this process lives, and whether it can do its work."""

from __future__ import annotations

from fastapi import APIRouter

from api.deps import InjectedServices
from api.errors import Unavailable
from api.schemas import Alive, Readiness
from jobs.queries import reading

router = APIRouter(tags=["health"])


@router.get("/healthz")
async def healthz() -> Alive:
    """The event loop turns. Nothing else is asked, so that a sick database does not restart the API."""
    return Alive()


@router.get("/readyz")
async def readyz(services: InjectedServices) -> Readiness:
    """Postgres answers and has the tables. Redis is looked at, but jobs are taken without it."""
    if not await services.transaction(reading.is_reachable):
        raise Unavailable("The database has no tables yet: run `pagemill migrate`.")
    is_heard = await services.bell.is_reachable()
    return Readiness(
        redis="ok" if is_heard else "unreachable", bells_sent=services.bell.sent, bells_lost=services.bell.failed
    )
