"""A result for people: what was said, how it ended, how long it took, in the shape of a table's row."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

import orjson

from jobs import fingerprints
from jobs.queries.lines import LineResult

COLUMNS = (
    "custom_id",
    "line",
    "seq",
    "state",
    "text",
    "finish_reason",
    "prompt_tokens",
    "completion_tokens",
    "error_code",
    "error_message",
)


def summary(result: LineResult, length: int | None) -> dict[str, Any]:
    """The fields of `api.native.views.ResultSummary`; texts are cut after `length` characters."""
    text, finish_reason, usage, error = read_body(result.body)
    took = None
    if result.settled_at is not None and result.claimed_at is not None and result.worker_id is not None:
        took = max(0, round(1000 * (result.settled_at - result.claimed_at).total_seconds()))
    return {
        "seq": result.seq,
        "line": result.line,
        "custom_id": result.custom_id,
        "state": result.state,
        "text": cut(text, length),
        "is_cut": text is not None and length is not None and len(text) > length,
        "finish_reason": finish_reason,
        "prompt_tokens": usage.get("prompt_tokens", 0),
        "cached_tokens": (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0),
        "completion_tokens": usage.get("completion_tokens", 0),
        "error_code": error.get("code"),
        "error_message": cut(error.get("message"), length),
        "fingerprint": None if result.fingerprint is None else fingerprints.public(result.fingerprint),
        "settled_at": None if result.settled_at is None else int(result.settled_at.timestamp()),
        "took_ms": took,
        "worker": None if result.worker_id is None else str(result.worker_id),
    }


def read_body(body: bytes) -> tuple[str | None, str | None, dict[str, Any], dict[str, Any]]:
    """`(text, finish_reason, usage, error)` of a stored result; text and reason are those of the first choice."""
    document = orjson.loads(body)
    response = document.get("response") or {}
    said = response.get("body") or {}
    error = document.get("error") or said.get("error") or {}
    choices = said.get("choices") or []
    if not choices:
        return None, None, {}, error
    first = choices[0]
    return _text(first), first.get("finish_reason"), said.get("usage") or {}, error


def _text(choice: dict[str, Any]) -> str | None:
    """What a choice says; the calls of a message that has no content, as JSON."""
    if "message" not in choice:
        return choice.get("text")
    message = choice["message"]
    if message.get("content") is None and message.get("tool_calls"):
        return orjson.dumps(message["tool_calls"]).decode()
    content: str | None = message.get("content")
    return content


def cut(text: str | None, length: int | None) -> str | None:
    return text if text is None or length is None else text[:length]


def as_json_lines(results: Sequence[LineResult], length: int | None) -> bytes:
    """A summary a line."""
    return b"".join(orjson.dumps(summary(result, length)) + b"\n" for result in results)


def as_csv(results: Iterable[LineResult], length: int | None) -> bytes:
    """Rows of `COLUMNS` in RFC 4180's form, without a header."""
    rows = [summary(result, length) for result in results]
    return _csv([row[column] for column in COLUMNS] for row in rows)


def csv_header() -> bytes:
    return _csv([COLUMNS])


def _csv(rows: Iterable[Sequence[object]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\r\n").writerows(rows)
    return text.getvalue().encode("utf-8", "replace")
