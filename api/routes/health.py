"""Whether this process lives, and whether it can do its work."""

from __future__ import annotations

from fastapi import APIRouter

from api.deps import InjectedServices
from api.errors import Unavailable
from api.schemas import Alive, Readiness
from jobs.queries import reading

router = APIRouter(tags=["health"])


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz")
async def healthz() -> Alive:
    """The event loop turns. Nothing else is asked, so that a sick database does not restart the API."""
    return Alive()


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz")
async def readyz(services: InjectedServices) -> Readiness:
    """Postgres answers and has the tables. Redis is looked at, but jobs are taken without it."""
    if not await services.transaction(reading.is_reachable):
        raise Unavailable("The database has no tables yet: run `pagemill migrate`.")
    notifier = services.notifier
    return Readiness(
        redis="ok" if await notifier.is_reachable() else "unreachable",
        notifications_sent=notifier.sent,
        notifications_lost=notifier.failed,
        bells_sent=notifier.sent,
        bells_lost=notifier.failed,
    )
