"""Lines of a batch's input and output: `{"custom_id", "method", "url", "body"}` in, answers out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import orjson

from api.openai.lines import Endpoint, read_request
from api.openai.responses import ResponseShape
from api.request_body import NumberedLine
from jobs import strict_json
from jobs.errors import InvalidInput, InvalidJson
from jobs.queries.batches import OnError
from jobs.queries.reading import StoredResult
from jobs.requests import ModelLimits, StagedLine, refused_line

MAX_ERRORS = 1000  # that a failed batch lists
_FIELDS = frozenset({"custom_id", "method", "url", "body"})
_ENDED = {"job_cancelled": "batch_cancelled", "job_expired": "batch_expired"}


class LineError(Exception):
    """A line that makes its batch fail, or that is left out where the batch skips errors."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.param = code, param


@dataclass(slots=True)
class Complaints:
    """The errors of a batch's input, the first `MAX_ERRORS` of them."""

    errors: list[dict[str, Any]] = field(default_factory=list)
    count: int = 0

    def add(self, code: str, message: str, *, line: int | None = None, param: str | None = None) -> None:
        self.count += 1
        if len(self.errors) < MAX_ERRORS:
            self.errors.append({"code": code, "line": line, "message": message, "param": param})


@dataclass(frozen=True, slots=True)
class LineReader:
    """What all lines of one batch have in common."""

    endpoint: Endpoint
    model: ModelLimits
    on_error: OnError
    max_depth: int

    def read(self, lines: Sequence[NumberedLine], complaints: Complaints) -> list[StagedLine]:
        """Stage what can be staged. A body that is wrong is staged as that line's 400; other faults are complaints.

        With `on_error` "skip" every fault is the line's own.
        """
        staged = []
        for line in lines:
            try:
                staged.append(self._staged(line))
            except LineError as error:
                if self.on_error == "skip":
                    staged.append(refused_line(line.number, f"line-{line.number}", str(error), error.code, error.param))
                else:
                    complaints.add(error.code, str(error), line=line.number, param=error.param)
        return staged

    def _staged(self, line: NumberedLine) -> StagedLine:
        document = parse_line(line, self.max_depth)
        custom_id = document.get("custom_id")
        if not isinstance(custom_id, str) or not custom_id:
            raise LineError("missing_required_parameter", "a custom_id is needed", "custom_id")
        if document.get("method") != "POST":
            raise LineError("invalid_method", "the method is POST", "method")
        if document.get("url") != self.endpoint:
            raise LineError("url_mismatch", f"the batch's endpoint is {self.endpoint}", "url")
        unknown = next((name for name in document if name not in _FIELDS), None)
        if unknown is not None:
            raise LineError("unknown_parameter", "no such field", unknown[:100])
        body = document.get("body")
        if not isinstance(body, dict):
            raise LineError("missing_required_parameter", "a JSON object is expected here", "body")
        if body.get("model") != self.model.name:
            raise LineError(
                "model_mismatch", f"all lines of a batch have one model, here {self.model.name!r}", "body.model"
            )
        try:
            if body.get("stream"):
                raise InvalidInput("a batch does not stream", param="stream")
            asked = read_request(body, self.endpoint, line.number, self.model, custom_id=custom_id)
            return asked.with_repeated()
        except InvalidInput as error:
            if error.param == "custom_id":
                raise LineError("invalid_custom_id", error.message, "custom_id") from None
            return refused_line(line.number, custom_id, str(error), error.code, error.param)


def parse_line(line: NumberedLine, max_depth: int) -> dict[str, Any]:
    """A line as an object. Raises `LineError`."""
    try:
        document = strict_json.parse(line.raw, max_depth=max_depth)
    except InvalidJson as error:
        raise LineError("invalid_json_line", error.message) from None
    if not isinstance(document, dict):
        raise LineError("invalid_json_line", "a JSON object is expected on each line")
    return document


def model_of(line: NumberedLine, max_depth: int) -> str | None:
    """The model that a line names, if it does."""
    try:
        body = parse_line(line, max_depth).get("body")
    except LineError:
        return None
    model = body.get("model") if isinstance(body, dict) else None
    return model if isinstance(model, str) else None


def output_line(batch_id: UUID, result: StoredResult) -> tuple[bool, bytes]:
    """A line of a file of results, and whether it is an answer with status 200."""
    document = orjson.loads(result.body)
    response, error = document["response"], document["error"]
    is_answered = response is not None and response["status_code"] == 200
    if is_answered and result.request is not None:
        response["body"] = _response(response["body"], orjson.loads(result.request)["repeated"])
    if error is not None:
        error = {"code": _ENDED.get(error["code"], error["code"]), "message": error["message"]}
    line = {
        "id": f"batch_req_{batch_id.hex}-{result.line}",
        "custom_id": result.custom_id,
        "response": response,
        "error": error,
    }
    return is_answered, orjson.dumps(line) + b"\n"


def _response(body: dict[str, Any], repeated: dict[str, Any]) -> dict[str, Any]:
    """A stored chat completion as a response."""
    name = body["id"].removeprefix("chatcmpl-")
    return ResponseShape(name, body["model"], body["created"], "default", repeated).whole({1: body})
