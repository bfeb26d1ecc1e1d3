"""`/v1/webhooks/deliveries`: what became of your webhooks, and another try of one."""

from __future__ import annotations

from typing import Annotated, Literal
from uuid import UUID

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from api.deps import Caller, InjectedServices
from jobs.errors import InvalidInput, WebhookDeliveryMissing
from jobs.ids import BATCH_PREFIX, DELIVERY_PREFIX, ENDPOINT_PREFIX, EVENT_PREFIX, JOB_PREFIX, parse_id, public_id
from jobs.queries import delivery_log
from jobs.queries.delivery_log import DeliveryStatus, LoggedDelivery

router = APIRouter(prefix="/v1/webhooks/deliveries", tags=["webhooks"])

MAX_ID = 2**63 - 1  # what the column holds


class AttemptObject(BaseModel):
    number: int = Field(description="from 1")
    at: float
    milliseconds: int
    status_code: int | None = Field(description="null: there was no answer")
    error: str | None = Field(description="null: delivered")
    answer: str = Field(description="the first 256 bytes of the receiver's body")


class DeliveryEvent(BaseModel):
    id: str
    type: str
    created_at: int


class DeliveryObject(BaseModel):
    """An event on its way to an endpoint. Times are Unix seconds."""

    id: str
    object: Literal["webhook_delivery"] = "webhook_delivery"
    event: DeliveryEvent
    job_id: str | None
    batch_id: str | None
    endpoint_id: str
    url: str
    status: DeliveryStatus
    next_attempt_at: int | None
    delivered_at: int | None
    last_status_code: int | None
    last_error: str | None
    num_attempts: int
    attempts: list[AttemptObject] = Field(description="those that have ended")

    @classmethod
    def of(cls, delivery: LoggedDelivery) -> DeliveryObject:
        return cls(
            id=public_id(DELIVERY_PREFIX, UUID(int=delivery.id)),
            event=DeliveryEvent(
                id=public_id(EVENT_PREFIX, delivery.event_id),
                type=delivery.event_type,
                created_at=int(delivery.event_created_at.timestamp()),
            ),
            job_id=None if delivery.job_id is None else public_id(JOB_PREFIX, delivery.job_id),
            batch_id=None if delivery.batch_id is None else public_id(BATCH_PREFIX, delivery.batch_id),
            endpoint_id=public_id(ENDPOINT_PREFIX, delivery.endpoint_id),
            url=delivery.url,
            status=delivery.status,
            next_attempt_at=None if delivery.due_at is None else int(delivery.due_at.timestamp()),
            delivered_at=None if delivery.delivered_at is None else int(delivery.delivered_at.timestamp()),
            last_status_code=delivery.last_status,
            last_error=delivery.last_error,
            num_attempts=delivery.num_attempts,
            attempts=[
                AttemptObject(
                    number=attempt.number,
                    at=attempt.at.timestamp(),
                    milliseconds=attempt.milliseconds,
                    status_code=attempt.status,
                    error=attempt.error,
                    answer=attempt.answer.decode("utf-8", "replace"),
                )
                for attempt in delivery.attempts
            ],
        )


class DeliveryList(BaseModel):
    """Newest first. The next page is `?after=<last_id>`."""

    object: Literal["list"] = "list"
    data: list[DeliveryObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeliveriesQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    after: str | None = Field(default=None, description="`last_id` of the page before")
    limit: int = Field(default=20, ge=1, le=100)
    status: DeliveryStatus | None = None
    job: str | None = Field(default=None, description="those of one job, and of its batch")


@router.get("")
async def list_deliveries(
    caller: Caller, services: InjectedServices, query: Annotated[DeliveriesQuery, Query()]
) -> DeliveryList:
    """Deliveries to your endpoints and your jobs' webhooks, newest first, each with its attempts."""
    job_id = None
    if query.job is not None and (job_id := parse_id(JOB_PREFIX, query.job)) is None:
        raise InvalidInput("not a job's id", param="job")
    after = None
    if query.after is not None and (after := _parse(query.after)) is None:
        raise InvalidInput("not a delivery's id", param="after")
    found = await services.transaction(
        delivery_log.list_deliveries,
        caller.id,
        after=after,
        limit=query.limit + 1,
        status=query.status,
        job_id=job_id,
    )
    page = [DeliveryObject.of(delivery) for delivery in found[: query.limit]]
    return DeliveryList(
        data=page,
        first_id=page[0].id if page else None,
        last_id=page[-1].id if page else None,
        has_more=len(found) > query.limit,
    )


@router.post("/{delivery_id}/replay")
async def replay(delivery_id: str, caller: Caller, services: InjectedServices) -> DeliveryObject:
    """Send an event once more, under the same `webhook-id`. Not to an endpoint that is disabled."""
    number = _parse(delivery_id)
    if number is None or not await services.transaction(delivery_log.replay, caller.id, number, by=caller.actor):
        raise WebhookDeliveryMissing(delivery_id[:100])
    found = await services.transaction(delivery_log.list_deliveries, caller.id, after=None, limit=1, delivery_id=number)
    if not found:
        raise WebhookDeliveryMissing(delivery_id[:100])
    return DeliveryObject.of(found[0])


def _parse(text: str) -> int | None:
    identity = parse_id(DELIVERY_PREFIX, text)
    return None if identity is None or identity.int > MAX_ID else identity.int
