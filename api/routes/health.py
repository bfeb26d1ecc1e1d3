"""Whether this process lives, and whether it can do its work."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter

from api.deps import InjectedServices
from api.errors import Unavailable
from api.schemas import Alive, Readiness
from jobs.queries import reading

POSTGRES_PATIENCE = 1.5  # seconds; with `redis_probe.PATIENCE` less than the 3 s of compose.yaml

router = APIRouter(tags=["health"])


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz")
async def healthz() -> Alive:
    """The event loop turns. Nothing else is asked, so that a sick database does not restart the API."""
    return Alive()


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz")
async def readyz(services: InjectedServices) -> Readiness:
    """Postgres answers and has the tables. Redis is looked at, but jobs are taken without it: workers poll."""
    notifier = services.notifier
    try:
        async with asyncio.timeout(POSTGRES_PATIENCE):
            is_migrated = await services.transaction(reading.is_reachable)
    except TimeoutError:
        raise Unavailable("The database does not answer.") from None
    if not is_migrated:
        raise Unavailable("The database has no tables yet: run `pagemill migrate`.")
    redis = await notifier.probe.state()
    return Readiness(
        status="ok" if redis == "ok" else "degraded: polling",
        redis=redis,
        notifications_sent=notifier.sent,
        notifications_lost=notifier.failed,
        bells_sent=notifier.sent,
        bells_lost=notifier.failed,
    )
