"""`/v1/webhook_endpoints`: where events of batches and jobs go, and `/v1/webhook_event_types`."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from api.deps import Caller, InjectedServices, Services
from api.errors import Unavailable
from api.openai.documents import read_document
from jobs import patterns
from jobs.errors import InvalidInput, WebhookEndpointMissing
from jobs.ids import ENDPOINT_PREFIX, parse_id, public_id
from jobs.keys import new_webhook_secret
from jobs.queries import delivery_log, webhook_endpoints
from jobs.queries.delivery_log import LoggedDelivery
from jobs.queries.tenants import Principal
from jobs.queries.webhook_endpoints import EVENT_TYPES, Endpoint
from jobs.requests import Webhook, validate
from jobs.strict_model import FewComplaints

router = APIRouter(prefix="/v1", tags=["webhooks"])

HINT_CHARACTERS = 10  # of a secret, "whsec_" among them
LOOK = 0.1  # seconds between two looks at a test's delivery
COURIER_SECONDS = 5.0  # beyond an attempt's own limit, in which a courier begins it

_Name = Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=patterns.PRINTABLE)]
_Url = Annotated[
    str,
    StringConstraints(min_length=1, max_length=2048),
    Field(json_schema_extra={"pattern": patterns.HTTP_URL}),  # `Webhook` says what else a URL must be
]
_EventType = Literal[
    "batch.completed",
    "batch.failed",
    "batch.expired",
    "batch.cancelled",
    "job.completed",
    "job.cancelled",
    "job.expired",
    "job.first_result",
    "job.progress_25",
    "job.progress_50",
    "job.progress_75",
    "job.stalled",
]
_EventTypes = Annotated[list[_EventType], Field(min_length=1, max_length=32, fail_fast=True)]


class _Body(FewComplaints):
    model_config = ConfigDict(extra="forbid", strict=True)


class CreateEndpoint(_Body):
    name: _Name
    url: _Url
    event_types: _EventTypes


class UpdateEndpoint(_Body):
    """What is missing or null stays as it is."""

    name: _Name | None = None
    url: _Url | None = None
    event_types: _EventTypes | None = None


class RotateSecret(_Body):
    keep_old_secret_active_for_24_hours: bool | None = None


class TestEndpoint(_Body):
    event_type: _EventType


class EndpointObject(BaseModel):
    id: str
    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    name: str
    url: str
    event_types: list[str]
    signing_secret_hint: str
    created_at: int
    updated_at: int
    disabled_at: int | None = Field(description="the receiver answered 410; an update enables it again")

    @classmethod
    def fields_of(cls, endpoint: Endpoint) -> dict[str, Any]:
        return {
            "id": public_id(ENDPOINT_PREFIX, endpoint.id),
            "name": endpoint.name,
            "url": endpoint.url,
            "event_types": endpoint.event_types,
            "signing_secret_hint": endpoint.secret[:HINT_CHARACTERS] + "…",
            "created_at": int(endpoint.created_at.timestamp()),
            "updated_at": int(endpoint.updated_at.timestamp()),
            "disabled_at": None if endpoint.disabled_at is None else int(endpoint.disabled_at.timestamp()),
        }


class EndpointWithSecret(EndpointObject):
    """Only a new secret is shown, once."""

    signing_secret: str


class EndpointList(BaseModel):
    """Newest first. The next page is asked for with `after` and the id of the last item."""

    object: Literal["list"] = "list"
    data: list[EndpointObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class EndpointDeleted(BaseModel):
    id: str
    object: Literal["webhook_endpoint.deleted"] = "webhook_endpoint.deleted"
    deleted: Literal[True] = True


class EndpointTested(BaseModel):
    """The receiver answered; `status_code` says what."""

    object: Literal["webhook_endpoint.test"] = "webhook_endpoint.test"
    webhook_endpoint_id: str
    event_type: str
    status_code: int
    success: Literal[True] = True


class EventTypes(BaseModel):
    object: Literal["list"] = "list"
    data: list[str]


class EndpointsQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    after: str | None = Field(default=None, description="id of the last endpoint that you have")
    limit: int = Field(default=20, ge=1, le=100)


def _schema(body: type[BaseModel]) -> dict[str, Any]:
    schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


@router.get("/webhook_event_types")
async def list_event_types(caller: Caller) -> EventTypes:
    """What an endpoint may subscribe to."""
    return EventTypes(data=list(EVENT_TYPES))


@router.post("/webhook_endpoints", openapi_extra=_schema(CreateEndpoint))
async def create_endpoint(request: Request, caller: Caller, services: InjectedServices) -> EndpointWithSecret:
    """Send events of these types to a URL from now on. The secret is shown here alone."""
    asked, _ = await read_document(services, request, CreateEndpoint)
    validate(Webhook, {"url": asked.url})
    endpoint = await services.transaction(
        webhook_endpoints.create,
        caller.id,
        name=asked.name,
        url=asked.url,
        event_types=asked.event_types,
        secret=new_webhook_secret(),
        by=caller.actor,
    )
    return _with_secret(endpoint)


@router.get("/webhook_endpoints")
async def list_endpoints(
    caller: Caller, services: InjectedServices, query: Annotated[EndpointsQuery, Query()]
) -> EndpointList:
    """Your endpoints, newest first."""
    after = None
    if query.after is not None and (after := parse_id(ENDPOINT_PREFIX, query.after)) is None:
        raise InvalidInput("not an endpoint's id", param="after")
    found = await services.transaction(webhook_endpoints.list_endpoints, caller.id, after=after, limit=query.limit + 1)
    page = [EndpointObject(**EndpointObject.fields_of(endpoint)) for endpoint in found[: query.limit]]
    return EndpointList(
        data=page,
        first_id=page[0].id if page else None,
        last_id=page[-1].id if page else None,
        has_more=len(found) > query.limit,
    )


@router.get("/webhook_endpoints/{endpoint_id}")
async def retrieve_endpoint(endpoint_id: str, caller: Caller, services: InjectedServices) -> EndpointObject:
    """One endpoint, without its secret."""
    return EndpointObject(**EndpointObject.fields_of(await _find(services, caller, endpoint_id)))


@router.post("/webhook_endpoints/{endpoint_id}", openapi_extra=_schema(UpdateEndpoint))
async def update_endpoint(
    endpoint_id: str, request: Request, caller: Caller, services: InjectedServices
) -> EndpointObject:
    """Change an endpoint, and enable it again if the receiver had answered 410."""
    asked, _ = await read_document(services, request, UpdateEndpoint)
    if asked.url is not None:
        validate(Webhook, {"url": asked.url})
    found = await _find(services, caller, endpoint_id)
    endpoint = await services.transaction(
        webhook_endpoints.update,
        caller.id,
        found.id,
        name=asked.name,
        url=asked.url,
        event_types=asked.event_types,
        by=caller.actor,
    )
    return EndpointObject(**EndpointObject.fields_of(_require(endpoint, endpoint_id)))


@router.delete("/webhook_endpoints/{endpoint_id}")
async def delete_endpoint(endpoint_id: str, caller: Caller, services: InjectedServices) -> EndpointDeleted:
    """Forget an endpoint, with its deliveries."""
    endpoint = await _find(services, caller, endpoint_id)
    if not await services.transaction(webhook_endpoints.delete, caller.id, endpoint.id, by=caller.actor):
        raise WebhookEndpointMissing(endpoint_id)
    return EndpointDeleted(id=endpoint_id)


@router.post("/webhook_endpoints/{endpoint_id}/rotate_secret", openapi_extra=_schema(RotateSecret))
async def rotate_secret(
    endpoint_id: str, request: Request, caller: Caller, services: InjectedServices
) -> EndpointWithSecret:
    """A new secret. Deliveries are signed with the old one beside it for a day, where that is asked for."""
    asked, _ = await read_document(services, request, RotateSecret)
    found = await _find(services, caller, endpoint_id)
    endpoint = await services.transaction(
        webhook_endpoints.rotate_secret,
        caller.id,
        found.id,
        secret=new_webhook_secret(),
        keeps_old=bool(asked.keep_old_secret_active_for_24_hours),
        by=caller.actor,
    )
    return _with_secret(_require(endpoint, endpoint_id))


@router.post("/webhook_endpoints/{endpoint_id}/test", openapi_extra=_schema(TestEndpoint))
async def test_endpoint(
    endpoint_id: str, request: Request, caller: Caller, services: InjectedServices
) -> EndpointTested:
    """Send an event of nothing, once, and say what the receiver answered."""
    asked, _ = await read_document(services, request, TestEndpoint)
    endpoint = await _find(services, caller, endpoint_id)
    delivery_id = await services.transaction(webhook_endpoints.announce_test, caller.id, endpoint.id, asked.event_type)
    delivery = await _attempted(services, caller, delivery_id)
    if delivery.last_status is None:
        raise InvalidInput(f"no answer came: {delivery.last_error}", param="url")
    return EndpointTested(
        webhook_endpoint_id=endpoint_id, event_type=asked.event_type, status_code=delivery.last_status
    )


async def _attempted(services: Services, caller: Principal, delivery_id: int) -> LoggedDelivery:
    """A delivery after its attempt, which a courier makes."""
    patience = time.monotonic() + services.settings.webhook_timeout + COURIER_SECONDS
    while time.monotonic() < patience:
        await asyncio.sleep(LOOK)
        found = await services.transaction(
            delivery_log.list_deliveries, caller.id, after=None, limit=1, delivery_id=delivery_id
        )
        if found and found[0].status != "pending":
            return found[0]
    raise Unavailable("No courier has sent the event yet. It is sent as soon as one runs.")


def _with_secret(endpoint: Endpoint) -> EndpointWithSecret:
    return EndpointWithSecret(**EndpointObject.fields_of(endpoint), signing_secret=endpoint.secret)


def _require(endpoint: Endpoint | None, endpoint_id: str) -> Endpoint:
    if endpoint is None:
        raise WebhookEndpointMissing(endpoint_id[:100])
    return endpoint


async def _find(services: Services, caller: Principal, endpoint_id: str) -> Endpoint:
    identity = parse_id(ENDPOINT_PREFIX, endpoint_id)
    found = None if identity is None else await services.transaction(webhook_endpoints.get, caller.id, identity)
    return _require(found, endpoint_id)
