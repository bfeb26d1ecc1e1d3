"""Batches at both their ends, in the background of each API process: a file becomes a job, results become files.

    validate   input ──LineSplitter──▶ groups ──LineReader──▶ staged lines ──publish──▶ a job      or errors, and no job
    finalize   results ──output_line──▶ two files in the store

Work is found in Postgres, so it goes on elsewhere where a process dies; `Services.batches_wait` only makes it sooner.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import traceback
from collections.abc import AsyncIterator
from uuid import UUID

import psycopg
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from api.deps import Services
from api.line_groups import groups_of_lines
from api.openai.batch_lines import Complaints, LineReader, model_of, output_line
from api.request_body import LineSplitter, NumberedLine
from api.tasks import end_tasks
from jobs.errors import DuplicateCustomId, PagemillError, TooLarge
from jobs.file_store import STORE_ERRORS, file_name
from jobs.ids import BATCH_PREFIX, new_id, public_id
from jobs.queries import batches, files, reading, submission, traces
from jobs.queries.batches import Batch
from jobs.queries.reading import StoredResult
from jobs.requests import JobOptions, ModelLimits, StagedLine, refused_line
from jobs.tracing import submitted_in

logger = logging.getLogger(__name__)

HOLD = 60.0  # seconds; renewed with each group
RETRY = 10.0  # seconds until what failed is tried again
AT_ONCE = 4  # batches, so that a small one does not wait for a large one
PAGE_ROWS = 500  # results read at a time
PAGE_ROWS_WITH_REQUESTS = 32  # a request may have the size of a line, a result has that of an answer
FAILURES = (SQLAlchemyError, psycopg.Error, *STORE_ERRORS, PagemillError)


class HoldLost(Exception):
    """The batch was cancelled, or another process has it."""


class BatchRunner:
    """Validates and finalizes batches, several side by side. `seconds` between two looks into Postgres."""

    def __init__(self, services: Services, *, seconds: float) -> None:
        self._services = services
        self._seconds = seconds
        self._holder = new_id()
        self._places = asyncio.Semaphore(AT_ONCE)
        self._working: set[asyncio.Task[None]] = set()
        self._task = asyncio.create_task(self._run(), name="batches")

    async def close(self) -> None:
        """Stop. What is held is free again when its hold is over."""
        await end_tasks([self._task])  # it would begin more
        await end_tasks(self._working)

    async def _run(self) -> None:
        is_failing = False
        while True:
            try:
                while await self._begin_next():
                    pass
                is_failing = False
            except (SQLAlchemyError, psycopg.Error) as error:
                if not is_failing:
                    logger.warning("batches wait for the database: %s", type(error).__name__)
                is_failing = True
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._seconds):
                    await self._services.batches_wait.wait()
            self._services.batches_wait.clear()

    async def _begin_next(self) -> bool:
        """Begin one batch's work when there is a place for it. False where there is no batch."""
        await self._places.acquire()
        try:
            batch = await self._services.transaction(batches.take, self._holder, seconds=HOLD)
        except BaseException:
            self._places.release()
            raise
        if batch is None:
            self._places.release()
            return False
        working = asyncio.create_task(self._work(batch), name=public_id(BATCH_PREFIX, batch.id))
        self._working.add(working)
        working.add_done_callback(self._end)
        return True

    def _end(self, working: asyncio.Task[None]) -> None:
        self._working.discard(working)
        self._places.release()

    async def _work(self, batch: Batch) -> None:
        name = public_id(BATCH_PREFIX, batch.id)
        try:
            if batch.job_id is None:
                await self._validate(batch)
            else:
                await self._finalize(batch)
        except HoldLost:
            logger.info("%s is left: it was cancelled or is done elsewhere", name, extra={"batch_id": name})
        except FAILURES as error:
            logger.warning("%s is tried again in %g s: %s", name, RETRY, type(error).__name__, extra={"batch_id": name})
            await self._services.quietly(batches.release, self._holder, batch.id, seconds=RETRY)
        except Exception as error:  # noqa: BLE001 - a fault of ours must not end the batches behind this one
            # Frames and kind, not the message: it can quote prompts.
            frames = "".join(traceback.format_tb(error.__traceback__))
            what = type(error).__name__
            logger.error("%s is tried again in %g s: %s\n%s", name, RETRY, what, frames, extra={"batch_id": name})
            await self._services.quietly(batches.release, self._holder, batch.id, seconds=RETRY)

    # From a file to a job

    async def _validate(self, batch: Batch) -> None:
        complaints = Complaints()
        job_id: UUID | None = None
        model: ModelLimits | None = None
        settings = self._services.settings
        try:
            async for group in self._groups(batch, complaints):
                if model is None:
                    model = await self._model(group, complaints)
                    if model is None:
                        continue
                reader = LineReader(batch.endpoint, model, batch.on_error, settings.max_json_depth)  # type: ignore[arg-type]
                staged = await asyncio.to_thread(reader.read, group, complaints)
                if staged:
                    if job_id is None:
                        job_id = await self._services.transaction(self._open, batch, model)
                    await self._stage(batch, job_id, staged, complaints)
                else:
                    await self._hold(batch)
            if model is None and not complaints.count:
                complaints.add("empty_file", "The file has no lines.")
            if complaints.count or model is None or job_id is None:
                name = public_id(BATCH_PREFIX, batch.id)
                logger.info("%s fails with %d errors", name, complaints.count, extra={"batch_id": name})
                if not await self._services.transaction(batches.fail, self._holder, batch.id, complaints.errors):
                    raise HoldLost
                if job_id is not None:
                    await self._services.quietly(submission.abandon, job_id)
                return
            await self._services.transaction(self._publish, batch, job_id, model.name)
        except BaseException:  # cancelled, too
            if job_id is not None:
                await asyncio.shield(self._services.quietly(submission.abandon, job_id))
            raise
        self._services.notifier.notify(model.name, job_id)

    async def _groups(self, batch: Batch, complaints: Complaints) -> AsyncIterator[list[NumberedLine]]:
        settings = self._services.settings
        file = await self._services.transaction(files.get_file, batch.tenant_id, batch.input_file_id)
        if file is None:
            complaints.add("file_not_found", "The input file is gone.", param="input_file_id")
            return
        splitter = LineSplitter(max_line_bytes=settings.max_line_bytes, max_lines=settings.max_lines)
        pieces = self._services.files.read(file_name(file.id), 0, file.bytes)
        try:
            async for group in groups_of_lines(pieces, lambda piece: None, splitter, settings.stage_chunk_lines):
                yield group
        except TooLarge as error:
            code = "too_many_tasks" if (error.line or 0) > settings.max_lines else "line_too_long"
            complaints.add(code, error.message, line=error.line)

    async def _model(self, group: list[NumberedLine], complaints: Complaints) -> ModelLimits | None:
        """The model of a batch: the first that a line names. None where there is no such model."""
        for line in group:
            name = model_of(line, self._services.settings.max_json_depth)
            if name is None:
                continue
            found = await self._services.transaction(submission.find_model, name)
            if found is None:
                complaints.add(
                    "model_not_found", f"The model {name[:100]!r} does not exist.", line=line.number, param="body.model"
                )
            return found
        first = group[0].number
        complaints.add("invalid_json_line", "no model is named here, nor near here", line=first, param="body.model")
        return None

    async def _stage(self, batch: Batch, job_id: UUID, lines: list[StagedLine], complaints: Complaints) -> None:
        """Store a group. Lines with a custom_id that stood before are complaints, or refused where errors are skipped.

        Staging goes on after complaints, because Postgres finds the duplicates among all lines.
        """
        while lines:
            try:
                await self._services.transaction(self._stage_group, batch, job_id, lines)
                break
            except DuplicateCustomId as error:
                place = next(i for i, line in enumerate(lines) if line.line == error.line)
                duplicate = lines.pop(place)
                if batch.on_error == "skip":
                    lines.insert(place, _renamed(duplicate, error))
                else:
                    complaints.add(error.code, error.message, line=error.line, param="custom_id")

    def _stage_group(self, connection: Connection, batch: Batch, job_id: UUID, lines: list[StagedLine]) -> None:
        """Store lines and renew the hold, by one commit."""
        if not submission.stage_lines(connection, job_id, lines):
            raise HoldLost
        if not batches.hold(connection, self._holder, batch.id, seconds=HOLD):
            raise HoldLost

    def _open(self, connection: Connection, batch: Batch, model: ModelLimits) -> UUID:
        options = JobOptions(model=model.name, metadata=batch.metadata or {})
        with submitted_in(traces.batch_trace(connection, batch.id)):
            return submission.open_job(connection, batch.tenant_id, options)

    def _publish(self, connection: Connection, batch: Batch, job_id: UUID, model: str) -> None:
        if not submission.publish(connection, job_id):
            raise HoldLost
        if not batches.attach_job(connection, self._holder, batch.id, job_id, model):
            raise HoldLost

    async def _hold(self, batch: Batch) -> None:
        if not await self._services.transaction(batches.hold, self._holder, batch.id, seconds=HOLD):
            raise HoldLost

    # From results to files

    async def _finalize(self, batch: Batch) -> None:
        """Store both files in one pass over the results."""
        assert batch.output_file_id is not None
        assert batch.error_file_id is not None
        output_bytes = error_bytes = 0
        store = self._services.files
        async with (
            store.writing(file_name(batch.output_file_id)) as output,
            store.writing(file_name(batch.error_file_id)) as errors,
        ):
            renewed = time.monotonic()
            async for results in _pages(self._services, batch):
                answered, others = await asyncio.to_thread(_parts, batch.id, results)
                output_bytes += len(answered)
                error_bytes += len(others)
                await output.write(answered)
                if others:
                    await errors.write(others)
                if time.monotonic() - renewed > HOLD / 6:
                    await self._hold(batch)
                    renewed = time.monotonic()
        if not await self._services.transaction(
            batches.finalize,
            self._holder,
            batch,
            output_bytes=output_bytes or None,
            error_bytes=error_bytes or None,
        ):
            raise HoldLost


def _renamed(line: StagedLine, error: DuplicateCustomId) -> StagedLine:
    return refused_line(line.line, f"{line.custom_id[:400]}#{line.line}", error.message, error.code, "custom_id")


async def result_pages(services: Services, batch: Batch, *, is_output: bool) -> AsyncIterator[bytes]:
    """The lines of a file of results as they are now, in pages."""
    async for results in _pages(services, batch):
        answered, others = await asyncio.to_thread(_parts, batch.id, results)
        if page := answered if is_output else others:
            yield page


async def _pages(services: Services, batch: Batch) -> AsyncIterator[list[StoredResult]]:
    """A batch's results as they are now; each page is a transaction of its own."""
    assert batch.job_id is not None
    read, limit = reading.read_results, PAGE_ROWS
    if batch.endpoint == "/v1/responses":
        read, limit = reading.read_results_and_requests, PAGE_ROWS_WITH_REQUESTS
    after = 0
    while True:
        results = await services.transaction(read, batch.job_id, after=after, limit=limit)
        if not results:
            return
        after = results[-1].seq
        yield results


def _parts(batch_id: UUID, results: list[StoredResult]) -> tuple[bytes, bytes]:
    """The lines of the two files: answers with status 200, and all others."""
    answered: list[bytes] = []
    others: list[bytes] = []
    for result in results:
        is_answered, line = output_line(batch_id, result)
        (answered if is_answered else others).append(line)
    return b"".join(answered), b"".join(others)
