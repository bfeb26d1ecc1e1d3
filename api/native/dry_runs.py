"""A submission that is only looked at: every wrong line, its tokens, and how long it would take. Nothing is stored.

bytes ──strict_json──▶ documents ──parse_request──▶ `Findings`      a sample of texts ──▶ a worker's tokenizer
"""

from __future__ import annotations

import asyncio
import random
import sqlite3
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import closing
from typing import Any, Literal

import orjson
from pydantic import BaseModel, Field
from sqlalchemy import Connection
from starlette.requests import Request

from api.deps import Services
from api.errors import Unavailable
from api.line_groups import groups_of_lines
from api.native import job_options
from api.native.submissions import find_model, read_document
from api.request_body import LineSplitter, NumberedLine, read_body, read_whole
from api.tokenizer_calls import TokenizerCalls
from jobs import strict_json
from jobs.errors import InvalidInput, TooLarge
from jobs.queries import backlog, throughput
from jobs.queries.backlog import ModelBacklog
from jobs.queries.throughput import Throughput
from jobs.requests import DEFAULT_MAX_TOKENS, JobOptions, ModelLimits, StagedLine, check_priority, parse_request

MAX_ERRORS = 1000  # that an answer lists
SAMPLE = 64  # texts that are tokenized
SAMPLE_CHARACTERS = 1 << 20  # in all


class LineFault(BaseModel):
    """A line that a submission would be refused for."""

    line: int = Field(description="of the body, or of `prompts`, from 1")
    code: str
    message: str
    param: str | None


class DryEstimate(BaseModel):
    """Seconds of work at the model's own pace, once it is this job's turn."""

    seconds: float
    low: float
    high: float
    queued_seconds: float = Field(description="of work that other jobs of the model have open now")
    basis: str


class DryRun(BaseModel):
    """What a submission would come to."""

    object: Literal["job.dry_run"] = "job.dry_run"
    model: str
    live_workers: int
    lines: int = Field(description="right and wrong ones")
    error_count: int
    errors: list[LineFault] = Field(description=f"the first {MAX_ERRORS}")
    prompt_tokens: int | None = Field(description="of the right lines; null where no worker could be asked")
    prompt_tokens_basis: str
    max_completion_tokens: int = Field(description="the most that all answers may have together")
    estimate: DryEstimate | None = Field(description="null where the model did nothing of late, or a part is unknown")


class _CustomIds:
    """Which ids stood before, in a file that is gone with this object: memory stays flat over millions of lines."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("", check_same_thread=False, isolation_level=None)
        self._database.execute("CREATE TABLE ids (id TEXT PRIMARY KEY) WITHOUT ROWID")
        self._database.execute("BEGIN")

    def close(self) -> None:
        self._database.close()

    def add(self, custom_id: str) -> bool:
        """False where it stands already."""
        return self._database.execute("INSERT OR IGNORE INTO ids VALUES (?)", (custom_id,)).rowcount == 1


class Findings:
    """What was found in the lines so far. `check` runs on one thread at a time."""

    def __init__(self, options: JobOptions, model: ModelLimits, max_depth: int) -> None:
        self._options = options
        self._model = model
        self._max_depth = max_depth
        self._ids = _CustomIds()
        self._random = random.Random(0)
        self.lines = 0
        self.error_count = 0
        self.errors: list[LineFault] = []
        self.max_completion_tokens = 0
        self.given_tokens = 0
        """Of prompts that are token ids."""
        self.texts = 0
        self.characters = 0
        """Of texts and conversations."""
        self.sample: list[tuple[int, bytes]] = []
        """`(characters, line as it is stored)` of up to `SAMPLE` texts, each as likely as any other."""

    def close(self) -> None:
        self._ids.close()

    def check(self, lines: Iterable[tuple[int, object]]) -> None:
        """Look at numbered lines: bytes of a stream, or documents."""
        for number, given in lines:
            self.lines += 1
            try:
                document = strict_json.parse(given, max_depth=self._max_depth) if isinstance(given, bytes) else given
                staged = parse_request(document, number, self._options.params, self._model)
            except InvalidInput as error:
                self.add(error, number)
                continue
            if not self._ids.add(staged.custom_id):
                self.add(_duplicate(staged), number)
                continue
            self._measure(staged)

    def add(self, error: InvalidInput, line: int) -> None:
        """Note a fault of a line."""
        self.error_count += 1
        if len(self.errors) < MAX_ERRORS:
            self.errors.append(LineFault(line=line, code=error.code, message=error.message, param=error.param))

    def _measure(self, staged: StagedLine) -> None:
        line = orjson.loads(staged.body)
        prompt = line.get("prompt")
        length = len(prompt) if isinstance(prompt, list) else 1
        fits = max(0, self._model.max_model_len - length)
        self.max_completion_tokens += min(line.get("max_tokens", DEFAULT_MAX_TOKENS), fits) * line.get("n", 1)
        if isinstance(prompt, list):
            self.given_tokens += length
            return
        characters = len(prompt) if isinstance(prompt, str) else _characters(line["messages"])
        self.texts += 1
        self.characters += characters
        place = self.texts - 1 if self.texts <= SAMPLE else self._random.randrange(self.texts)
        if place < SAMPLE:
            self.sample[place : place + 1] = [(characters, staged.body)]


def _characters(messages: Sequence[dict[str, Any]]) -> int:
    return sum(len(message["content"]) for message in messages)


def _duplicate(staged: StagedLine) -> InvalidInput:
    error = InvalidInput(f"{staged.custom_id!r} stands on an earlier line too", param="custom_id")
    error.code = "duplicate_custom_id"
    return error


async def look_at_document(services: Services, calls: TokenizerCalls, request: Request) -> DryRun:
    """Look at an inline submission. Raises for what is wrong with the whole of it."""
    settings = services.settings
    raw = await read_whole(request, max_bytes=settings.max_inline_bytes, timeout=settings.body_timeout)
    document, _ = await asyncio.to_thread(read_document, raw, settings.max_json_depth)
    options, prompts = job_options.from_document(document)
    if len(prompts) > settings.max_lines:
        raise TooLarge(f"More than {settings.max_lines} prompts in one job.", param="prompts")

    async def groups(findings: Findings) -> AsyncIterator[list[tuple[int, object]]]:
        size = settings.stage_chunk_lines
        for start in range(0, len(prompts), size):
            yield list(enumerate(prompts[start : start + size], start + 1))

    return await _look(services, calls, options, groups)


async def look_at_lines(services: Services, calls: TokenizerCalls, request: Request) -> DryRun:
    """Look at an NDJSON upload as it comes in."""
    settings = services.settings
    options = job_options.from_query(request.scope["query_string"], max_depth=settings.max_json_depth)
    pieces = read_body(request, max_bytes=settings.max_body_bytes, timeout=settings.body_timeout)

    async def groups(findings: Findings) -> AsyncIterator[list[tuple[int, object]]]:
        splitter = LineSplitter(max_line_bytes=settings.max_line_bytes, max_lines=settings.max_lines)
        try:
            async for group in groups_of_lines(pieces, lambda piece: None, splitter, settings.stage_chunk_lines):
                yield _numbered(group)
        except TooLarge as error:
            if error.line is None:
                raise
            # The rest of the body cannot be told into lines.
            findings.add(error, error.line)

    return await _look(services, calls, options, groups)


def _numbered(group: Sequence[NumberedLine]) -> list[tuple[int, object]]:
    return [(line.number, line.raw) for line in group]


async def _look(services: Services, calls: TokenizerCalls, options: JobOptions, groups: Any) -> DryRun:
    check_priority(options.priority, services.settings.max_priority)
    model = await find_model(services, options.model)
    with closing(Findings(options, model, services.settings.max_json_depth)) as findings:
        async for group in groups(findings):
            await asyncio.to_thread(findings.check, group)
        if not findings.lines and not findings.error_count:
            raise InvalidInput("The body has no lines: a job needs at least one prompt.")
        pace, queue = await services.transaction(_pace, model.name)
        tokens, basis = await _tokens(calls, model, findings, has_worker=queue.live_workers > 0)
        return DryRun(
            model=model.name,
            live_workers=queue.live_workers,
            lines=findings.lines,
            error_count=findings.error_count,
            errors=findings.errors,
            prompt_tokens=tokens,
            prompt_tokens_basis=basis,
            max_completion_tokens=findings.max_completion_tokens,
            estimate=_estimate(findings, tokens, pace, queue),
        )


def _pace(connection: Connection, model: str) -> tuple[Throughput | None, ModelBacklog]:
    queue = next(one for one in backlog.read_backlog(connection).models if one.model == model)
    return throughput.read_throughput(connection, model), queue


async def _tokens(
    calls: TokenizerCalls, model: ModelLimits, findings: Findings, *, has_worker: bool
) -> tuple[int | None, str]:
    """Prompt tokens, and what they are known from."""
    if findings.texts == 0:
        return findings.given_tokens, "every line was counted"
    if not has_worker:
        return None, f"no worker serves {model.name!r} just now, and only workers hold its tokenizer"
    sample: list[tuple[int, bytes]] = []
    characters = 0
    for length, body in findings.sample:
        if not sample or characters + length <= SAMPLE_CHARACTERS:
            sample.append((length, body))
            characters += length
    try:
        answer = await calls.ask(model.name, {"count": [orjson.Fragment(body) for _, body in sample]})
    except (Unavailable, InvalidInput) as error:
        return None, str(error)
    known = [(length, count) for (length, _), count in zip(sample, answer["counts"], strict=True) if count is not None]
    if not known:
        return None, "no text of the sample becomes tokens"
    counted = sum(count for _, count in known)
    if len(known) == findings.texts:
        return findings.given_tokens + counted, "every line was counted"
    # Short texts have more tokens a character than long ones, so the sample speaks for its mix of lengths.
    ratio = counted / max(1, sum(length for length, _ in known))
    return findings.given_tokens + round(ratio * findings.characters), f"{len(known)} of {findings.texts} texts counted"


def _estimate(
    findings: Findings, tokens: int | None, pace: Throughput | None, queue: ModelBacklog
) -> DryEstimate | None:
    if tokens is None or pace is None:
        return None
    lines = findings.lines - findings.error_count
    answers = min(float(findings.max_completion_tokens), pace.completion_tokens_per_line * lines)
    work = tokens + answers
    return DryEstimate(
        seconds=round(work / pace.tokens_per_second, 1),
        low=round(work / pace.fast, 1),
        high=round(work / pace.slow, 1),
        queued_seconds=round(queue.pending_tokens / pace.tokens_per_second, 1),
        basis=f"{pace.tokens_per_second:.3g} tokens/s, the mean of the last {pace.minutes} minutes with work",
    )
