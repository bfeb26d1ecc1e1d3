"""A request of any endpoint of OpenAI's face as the line of a job: translated, then checked by the one parser."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import orjson

from api.openai.requests import translate
from api.openai.response_requests import ResponseRequest
from jobs.errors import InvalidInput
from jobs.requests import ModelLimits, Params, StagedLine, parse_request

Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/responses"]
ENDPOINTS: tuple[Endpoint, ...] = get_args(Endpoint)


@dataclass(frozen=True, slots=True)
class Asked:
    """A checked request. `repeated`: what its answer repeats of it, which only a response does."""

    line: StagedLine
    repeated: Mapping[str, Any] = field(default_factory=dict)

    def with_repeated(self) -> StagedLine:
        """The line, for an answer that is made later."""
        if not self.repeated:
            return self.line
        added = orjson.dumps({"repeated": self.repeated})[1:-1]
        return replace(self.line, body=self.line.body[:-1] + b"," + added + b"}")


def read_request(
    body: Mapping[str, Any], endpoint: Endpoint, number: int, model: ModelLimits, *, custom_id: str | None = None
) -> Asked:
    """Raises `InvalidInput` that names the field as the request has it. `model` and `stream` are left to the caller."""
    own_id = {} if custom_id is None else {"custom_id": custom_id}
    if endpoint != "/v1/responses":
        return Asked(parse_request(translate(body, endpoint) | own_id, number, Params(), model))
    request = ResponseRequest.of(body)
    try:
        line = translate(request.chat, "/v1/chat/completions")
        return Asked(parse_request(line | own_id, number, Params(), model), request.repeated)
    except InvalidInput as error:
        error.param = request.param(error.param)
        raise
