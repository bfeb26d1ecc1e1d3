"""The application: routes, and the services that live as long as the process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import TypeVar

from fastapi import FastAPI
from sqlalchemy import Connection

from api import errors, interface
from api.anthropic import batches as message_batches
from api.batching import Batcher
from api.dashboard import routes as dashboard
from api.dashboard import session
from api.deps import Services
from api.feed_hub import Feed
from api.long_poll import JobWatch
from api.metrics import HttpMetrics
from api.middleware import RequestMiddleware
from api.native import (
    actions,
    audit,
    bulk,
    deliveries,
    detail,
    events,
    feed,
    feed_look,
    jobs,
    keys,
    open_jobs,
    overview,
    results,
    suggestions,
    workers,
)
from api.notifier import Notifier
from api.openai import batches, files, live, tokenizing, uploads, webhook_endpoints
from api.openai.batch_runner import BatchRunner
from api.openai.live_hub import LiveHub
from api.request_spans import RequestSpans
from api.routes import health, metrics, models
from api.schemas import ErrorAnswer
from api.session_cookie import Cookies
from api.tokenizer_calls import TokenizerCalls
from api.transactions import Transactions
from api.upload_locks import UploadLocks
from api.wrong_keys import WrongKeys
from jobs.database import connect_async
from jobs.file_store import FileStore
from jobs.keys import load_pepper
from jobs.queries import explaining, reading, tenants
from jobs.queries import live as live_queries
from jobs.settings import Settings
from jobs.tracing import start_tracer

A = TypeVar("A")
T = TypeVar("T")

ROUTERS = (
    jobs.router,
    open_jobs.router,
    detail.router,
    actions.router,
    events.router,
    results.router,
    live.router,
    tokenizing.router,
    batches.router,
    message_batches.router,
    files.router,
    uploads.router,
    webhook_endpoints.router,
    deliveries.router,
    models.router,
    keys.router,
    audit.router,
    workers.router,
    overview.router,
    feed.router,
    suggestions.router,
    bulk.router,
    session.router,
    dashboard.router,
    health.router,
    metrics.router,
)


def create_app(settings: Settings) -> FastAPI:
    """An application that serves from Postgres and notifies workers over Redis. Neither has to be up yet."""

    spans = RequestSpans(start_tracer("api"))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        transactions = Transactions(connect_async(settings, "pagemill-api"), settings.database_pool_size)
        notifier = Notifier(settings)
        upload_locks = UploadLocks(settings)

        def in_transaction(query: Callable[[Connection, A], T]) -> Callable[[A], Awaitable[T]]:
            async def look(asked: A) -> T:
                return await transactions.run(query, asked)

            return look

        pepper = load_pepper(settings)
        services = app.state.services = Services(
            settings,
            transactions,
            pepper,
            notifier,
            JobWatch(in_transaction(reading.no_longer_running)),
            upload_locks,
            FileStore(settings),
            Batcher(in_transaction(tenants.find_keys)),
            Batcher(in_transaction(tenants.find_principals)),
            Cookies(pepper),
            WrongKeys(),
            Batcher(in_transaction(live_queries.find_models)),
            Batcher(in_transaction(reading.get_jobs)),
            Batcher(
                in_transaction(
                    partial(
                        explaining.read_model_queues,
                        limit=settings.claim_limit,
                        solo_after_deaths=settings.solo_after_deaths,
                    )
                )
            ),
            Feed(
                in_transaction(
                    partial(
                        feed_look.look,
                        limit=settings.claim_limit,
                        solo_after_deaths=settings.solo_after_deaths,
                    )
                )
            ),
            asyncio.Event(),
        )
        hub = app.state.live = LiveHub(services)
        tokenizer_calls = app.state.tokenizer_calls = TokenizerCalls(settings)
        batch_runner = BatchRunner(services, seconds=settings.poll_interval)
        try:
            yield
        finally:
            await batch_runner.close()
            await hub.close()
            await tokenizer_calls.close()
            await upload_locks.close()
            await notifier.close()
            await transactions.close()
            await asyncio.to_thread(spans.close)

    app = FastAPI(
        title="Pagemill",
        description="Batch generation: hand in prompts, poll or wait, read results.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # a redirect of an upload makes the client send it twice
        responses={"4XX": {"model": ErrorAnswer}, "5XX": {"model": ErrorAnswer}},
    )
    http_metrics = app.state.http_metrics = HttpMetrics()
    app.add_middleware(RequestMiddleware, metrics=http_metrics, spans=spans)
    for router in ROUTERS:
        app.include_router(router)
    interface.install(app, jobs.SCHEMAS | message_batches.SCHEMAS)
    errors.install(app, [route for router in ROUTERS for route in router.routes])
    return app
