"""`POST /v1/bulk`: one action on all jobs of a search, first counted and then done, a part at a time.

The service keeps nothing of it: each answer says where the next request goes on. So it can be stopped at any moment,
survives every restart, and holds no connection while it waits.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field, model_validator

from api.deps import Caller, InjectedServices, Services
from api.native.actions import body_of
from api.native.finding import find_job, note_foreign, parse_job_id
from api.native.jobs import cancel_one, delete_one
from api.native.retries import Retry, retry
from api.openai.documents import read_document
from jobs import search
from jobs.errors import BulkCountChanged, PagemillError
from jobs.ids import JOB_PREFIX, public_id
from jobs.queries import bulk, changing
from jobs.queries.bulk import Action, Selection, Stake, Target
from jobs.queries.tenants import Principal
from jobs.requests import check_priority
from jobs.strict_model import StrictModel

router = APIRouter(prefix="/v1", tags=["jobs"])

PART = 25  # jobs that one request does it to
TOLERANCE = 0.01  # by which a count may differ from the expected one where nothing is lost
FINAL = frozenset({Action.CANCEL, Action.DELETE})


class Bulk(StrictModel):
    """What to do, and to which jobs: those of `q`, or of `ids`; to an operator's key, those of all tenants."""

    action: Annotated[Action, Field(strict=False)]
    q: str | None = Field(default=None, max_length=2000, description="a search, as GET /v1/jobs takes it")
    ids: Annotated[list[str], Field(max_length=1000)] | None = None
    priority: int | None = Field(default=None, ge=-100, le=100, description="for the action priority")
    expect: int | None = Field(
        default=None, ge=0, description="the count that was shown; without it nothing is done but counting"
    )
    after: str | None = Field(default=None, description="of the answer before: go on behind it")

    @model_validator(mode="after")
    def _is_whole(self) -> Bulk:
        if (self.q is None) == (self.ids is None):
            raise ValueError("either 'q' or 'ids'")
        if (self.action is Action.PRIORITY) != (self.priority is not None):
            raise ValueError("'priority' goes with the action priority")
        return self


class LargeJobObject(BaseModel):
    id: str
    name: str | None
    lines: int


class RefusedJob(BaseModel):
    id: str
    message: str


class BulkObject(BaseModel):
    """What an action touches, and to which jobs this request did it."""

    object: Literal["bulk"] = "bulk"
    action: Action
    jobs: int = Field(description="that match and that it can be done to, when the first request came; up to 10,000")
    lines: int = Field(description="of these: open ones, for retry failed ones, for delete all")
    largest: list[LargeJobObject]
    done: list[str] = Field(description="ids of the jobs that this request did it to; for retry, of the new ones")
    refused: list[RefusedJob] = Field(description="that changed in between")
    after: str | None = Field(description="to be sent with the next request; null where all is done")


@router.post("/bulk", openapi_extra=body_of(Bulk, required=True))
async def act_on_many(request: Request, caller: Caller, services: InjectedServices) -> BulkObject:
    """Count what an action would touch; with `expect`, do it to the first 25 jobs, and say where to go on.

    The answer is 409 where the count is another one than expected by more than 1 %, or at all for cancel and delete.
    """
    wanted, _ = await read_document(services, request, Bulk)
    selection = Selection(
        caller.scope,
        search.parse(wanted.q or ""),
        None if wanted.ids is None else [parse_job_id(job_id) for job_id in wanted.ids],
    )
    if wanted.priority is not None:
        check_priority(wanted.priority, services.settings.max_priority)
    stake = await services.transaction(bulk.read_stake, selection, wanted.action)
    if wanted.expect is None:
        return _answer(wanted, stake)
    after = None if wanted.after is None else parse_job_id(wanted.after)
    if after is None and not _is_expected(wanted, stake.jobs):
        raise BulkCountChanged(wanted.expect, stake.jobs)
    targets = await services.transaction(bulk.find_targets, selection, wanted.action, after=after, limit=PART + 1)
    answer = _answer(wanted, stake)
    for target in targets[:PART]:
        job_id = public_id(JOB_PREFIX, target.id)
        try:
            answer.done.append(await _act(services, caller, wanted, target, job_id))
        except PagemillError as error:
            answer.refused.append(RefusedJob(id=job_id, message=str(error)))
    if len(targets) > PART:
        answer.after = public_id(JOB_PREFIX, targets[PART - 1].id)
    return answer


def _is_expected(wanted: Bulk, jobs: int) -> bool:
    assert wanted.expect is not None
    difference = abs(jobs - wanted.expect)
    return difference == 0 or (wanted.action not in FINAL and difference <= TOLERANCE * wanted.expect)


def _answer(wanted: Bulk, stake: Stake) -> BulkObject:
    return BulkObject(
        action=wanted.action,
        jobs=stake.jobs,
        lines=stake.lines,
        largest=[
            LargeJobObject(id=public_id(JOB_PREFIX, job.id), name=job.name, lines=job.lines) for job in stake.largest
        ],
        done=[],
        refused=[],
        after=None,
    )


async def _act(services: Services, caller: Principal, wanted: Bulk, target: Target, job_id: str) -> str:
    """Do it to one job, as its own route does. Returns the id of the job, or of the one that a retry made."""
    tenant, job = target.tenant_id, target.id
    by = replace(caller.actor, is_bulk=True)
    match wanted.action:
        case Action.PAUSE:
            await services.transaction(changing.pause, tenant, job, by=by)
            note_foreign(caller, tenant, job, "paused")
        case Action.RESUME:
            await services.transaction(changing.resume, tenant, job, by=by)
            services.notifier.notify((await find_job(services, caller, job_id)).model, job)
            note_foreign(caller, tenant, job, "resumed")
        case Action.PRIORITY:
            await services.transaction(changing.change, tenant, job, priority=wanted.priority, name=None, by=by)
            note_foreign(caller, tenant, job, "changed")
        case Action.RETRY:
            parent = await find_job(services, caller, job_id)
            made = await retry(services, caller, parent, Retry(state="failed"), None, by=by)
            note_foreign(caller, tenant, job, "retried")
            return public_id(JOB_PREFIX, made.id)
        case Action.CANCEL:
            await cancel_one(services, caller, tenant, job, by=by)
        case Action.DELETE:
            await delete_one(services, caller, tenant, job, by=by)
    return job_id
