"""Retry: a new job of lines of another one that ended. Ended lines never move."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Annotated, Any, Literal
from uuid import UUID

import orjson
from pydantic import Field, model_validator
from sqlalchemy import Connection

from api.deps import Services
from api.parameters import Fingerprint
from api.submission import replay, reserved
from jobs import fingerprints
from jobs.errors import InvalidInput, ModelNotFound, NothingToRetry, SubmissionCollected
from jobs.queries import reading, retrying, submission
from jobs.queries.audit import Actor
from jobs.queries.lines import Filter
from jobs.queries.reading import Job
from jobs.queries.tenants import Principal
from jobs.requests import JobName, JobOptions, ModelLimits, Params, StagedLine, Webhook, Window, validate, window_text
from jobs.strict_model import StrictModel

MAX_LINES_NAMED = 100_000
WITHOUT_ANSWER = ("failed", "expired", "cancelled")

State = Literal["failed", "expired", "cancelled", "truncated"]


LineNumbers = Annotated[
    list[Annotated[int, Field(ge=1, lt=2**31)]], Field(min_length=1, max_length=MAX_LINES_NAMED, fail_fast=True)
]


class Retry(StrictModel):
    """Which lines run again, and how. Without a choice, all that have no answer: failed, expired and cancelled ones."""

    fingerprint: Fingerprint | None = Field(
        default=None, description="a kind of failure, as the job's `failures` have it"
    )
    state: State | Annotated[list[State], Field(min_length=1, max_length=4)] | None = Field(
        default=None, description="truncated: cut by max_tokens"
    )
    lines: (
        Annotated[list[Annotated[int, Field(ge=1, lt=2**31)]], Field(min_length=1, max_length=MAX_LINES_NAMED)] | None
    ) = Field(default=None, description="by their numbers; each has to have ended")
    params: Params = Field(default=Params(), description="that replace those of each line")
    priority: int | None = Field(default=None, ge=-100, le=100, description="the job's unless given")
    name: JobName | None = None
    webhook: Webhook | None = Field(default=None, description="the job's unless given")
    completion_window: Window | None = Field(default=None, description="the job's unless given")

    @model_validator(mode="after")
    def _one_choice(self) -> Retry:
        if sum(choice is not None for choice in (self.fingerprint, self.state, self.lines)) > 1:
            raise ValueError("one of 'fingerprint', 'state' and 'lines', not several")
        return self

    @property
    def filters(self) -> list[Filter]:
        """The lines of each filter follow those of the one before."""
        if self.fingerprint is not None:
            return [Filter(fingerprint=fingerprints.parse(self.fingerprint))]
        states: Sequence[str] = WITHOUT_ANSWER
        if self.state is not None:
            states = [self.state] if isinstance(self.state, str) else list(dict.fromkeys(self.state))
        return [Filter(is_truncated=True) if state == "truncated" else Filter(state=state) for state in states]


async def retry(
    services: Services, caller: Principal, parent: Job, wanted: Retry, key: str | None, *, by: Actor | None = None
) -> Job:
    """Make the child and publish it. Raises `NothingToRetry`, `PromptsGone`, and `InvalidInput` for parameters."""
    owner = replace(caller, id=parent.tenant_id)
    options = _options(parent, wanted)
    overrides = wanted.params.stored()
    model = await services.transaction(submission.find_model, parent.model)
    if model is None:
        raise ModelNotFound(parent.model)
    fingerprint = hashlib.sha256(
        b"retry\n" + parent.id.bytes + orjson.dumps(wanted.model_dump(exclude_unset=True), option=orjson.OPT_SORT_KEYS)
    ).digest()
    async with reserved(services, owner, options, key) as reservation:
        if reservation is not None and not reservation.is_ours:
            return await replay(services, owner, reservation, fingerprint)
        child = None if reservation is None else reservation.job_id
        count = 0
        try:
            async with aclosing(_chunks(services, parent, wanted)) as chunks:
                async for lines in chunks:
                    if child is None:
                        child = await services.transaction(submission.open_job, owner.id, options)
                    await _stage(services, parent, child, lines, count + 1, overrides, model)
                    count += len(lines)
            if count == 0 or child is None:
                raise NothingToRetry
            sha256 = None if reservation is None else fingerprint
            job = await services.transaction(_publish, parent, child, count, sha256, by or caller.actor)
        except BaseException:  # cancelled, too
            if child is not None:
                await asyncio.shield(services.quietly(submission.abandon, child))
            raise
    services.notifier.notify(job.model, job.id)
    return job


def _options(parent: Job, wanted: Retry) -> JobOptions:
    window = None if parent.completion_window is None else window_text(parent.completion_window)
    return JobOptions(
        model=parent.model,
        priority=parent.priority if wanted.priority is None else wanted.priority,
        metadata=parent.metadata,
        name=parent.name if wanted.name is None else wanted.name,
        webhook=wanted.webhook,
        completion_window=window if wanted.completion_window is None else wanted.completion_window,
    )


async def _chunks(services: Services, parent: Job, wanted: Retry) -> AsyncGenerator[list[int]]:
    """The wanted lines, as many at a time as a transaction copies."""
    limit = services.settings.sweep_chunk
    if wanted.lines is not None:
        lines = sorted(set(wanted.lines))
        for start in range(0, len(lines), limit):
            chunk = lines[start : start + limit]
            settled = await services.transaction(retrying.settled_of, parent.id, chunk)
            if missing := sorted(set(chunk).difference(settled)):
                raise InvalidInput(f"line {missing[0]} has not ended, or is none of this job's", param="lines")
            yield chunk
        return
    for which in wanted.filters:
        after = 0
        # Lines that fail later than this are not waited for.
        while picked := await services.transaction(
            retrying.pick, parent.id, which, after=after, last_seq=parent.last_seq, limit=limit
        ):
            after = picked[-1][0]
            yield [line for _, line in picked]


async def _stage(
    services: Services,
    parent: Job,
    child: UUID,
    lines: Sequence[int],
    first: int,
    overrides: dict[str, Any],
    model: ModelLimits,
) -> None:
    if not overrides:
        if not await services.transaction(retrying.copy, parent.id, child, lines, first=first):
            raise SubmissionCollected
        return
    size = services.settings.stage_chunk_lines
    for start in range(0, len(lines), size):
        source = await services.transaction(retrying.read, parent.id, lines[start : start + size])
        staged = await asyncio.to_thread(_overridden, source, first + start, overrides, model)
        if not await services.transaction(submission.stage_lines, child, staged):
            raise SubmissionCollected


def _overridden(
    source: Sequence[retrying.SourceLine], first: int, overrides: dict[str, Any], model: ModelLimits
) -> list[StagedLine]:
    staged = []
    for number, line in enumerate(source, first):
        body = orjson.loads(line.body) | overrides
        try:
            validate(Params, {name: body[name] for name in ("min_tokens", "max_tokens") if name in body})
            prompt = body.get("prompt")
            length = len(prompt) if isinstance(prompt, list) else 1
            if length + (body.get("max_tokens") or 1) > model.max_model_len:
                raise InvalidInput(
                    f"line {line.line}: {length} prompt tokens and max_tokens exceed the context of {model.name} "
                    f"({model.max_model_len} tokens)",
                    param="params.max_tokens",
                )
        except InvalidInput as error:
            error.param = error.param or "params"
            raise
        staged.append(StagedLine(number, line.custom_id, line.prefix, orjson.dumps(body)))
    return staged


def _publish(connection: Connection, parent: Job, child: UUID, count: int, body_sha256: bytes | None, by: Actor) -> Job:
    retrying.bind(connection, parent.tenant_id, parent.id, child, lines=count, by=by)
    if not submission.publish(connection, child, body_sha256=body_sha256):
        raise SubmissionCollected
    job = reading.get_job(connection, parent.tenant_id, child)
    assert job is not None
    return job
