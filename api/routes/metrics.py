"""`GET /metrics`, for Prometheus."""

from __future__ import annotations

import asyncio
import hmac
from typing import Annotated

import psycopg
from fastapi import APIRouter, Depends, Request, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from sqlalchemy.exc import SQLAlchemyError

from api.deps import InjectedServices
from api.metrics import BacklogCollector, HttpMetrics
from jobs.errors import InvalidKey
from jobs.queries.backlog import Backlog, read_backlog

POSTGRES_PATIENCE = 3.0  # seconds; Prometheus gives up after 10 unless told otherwise

router = APIRouter(tags=["health"])
_bearer = HTTPBearer(auto_error=False, scheme_name="MetricsToken", description="PAGEMILL_METRICS_TOKEN")


@router.get("/metrics", response_class=Response)
async def metrics(
    request: Request,
    services: InjectedServices,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> Response:
    """Requests, notifications and the backlog by model, as Prometheus or OpenMetrics text. Wants the operator's
    `PAGEMILL_METRICS_TOKEN`; without one nothing is shown, since model names and load are the operator's business."""
    token = services.settings.metrics_token
    given = credentials.credentials if credentials is not None else ""
    if token is None or not hmac.compare_digest(token.get_secret_value().encode(), given.encode()):
        raise InvalidKey
    http: HttpMetrics = request.app.state.http_metrics
    looked = CollectorRegistry()
    looked.register(BacklogCollector(await _backlog(services), services.notifier))
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    text = encode(http.registry).removesuffix(b"# EOF\n") + encode(looked)
    return Response(text, media_type=content_type)


async def _backlog(services: InjectedServices) -> Backlog | None:
    try:
        async with asyncio.timeout(POSTGRES_PATIENCE):
            return await services.transaction(read_backlog)
    except (TimeoutError, SQLAlchemyError, psycopg.Error):
        return None
