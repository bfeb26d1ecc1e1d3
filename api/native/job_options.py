"""Job options, everything of a submission but its prompts: from an inline document, or from the query of an upload."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qsl

from jobs import strict_json
from jobs.errors import InvalidInput, InvalidJson
from jobs.requests import JobOptions, Params, validate

MAX_FIELDS = 100  # in a query

_TEXT_FIELDS = frozenset({"model", "completion_window", "name"})
_JSON_FIELDS = frozenset({"priority", "metadata"})
_WEBHOOK_FIELDS = frozenset({"webhook_url", "webhook_events"})
_OF_THE_REQUEST = frozenset({"dry_run"})  # not of the job
_REPEATABLE = frozenset({"stop", "stop_token_ids", "webhook_events"})


def from_document(document: object) -> tuple[JobOptions, list[object]]:
    """Split an inline submission into its options and its prompts. The prompts are not looked at yet."""
    if not isinstance(document, dict):
        raise InvalidInput("a JSON object with 'model' and 'prompts' is expected")
    if "prompts" not in document:
        raise InvalidInput("Field required", param="prompts")
    prompts = document.pop("prompts")
    if not isinstance(prompts, list):
        raise InvalidInput("a list is expected here", param="prompts")
    if not prompts:
        raise InvalidInput("a job needs at least one prompt", param="prompts")
    return validate(JobOptions, document), prompts


def from_query(query: bytes, *, max_depth: int) -> JobOptions:
    """Read the options of an NDJSON upload: `?model=…&max_tokens=…&stop=…&stop=…&metadata={"a":"b"}&webhook_url=…`.

    Sampling parameters stand under their own names. Text is taken as it is, everything else is read as JSON; what may
    be a list may stand several times.
    """
    try:
        pairs = parse_qsl(query.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=MAX_FIELDS)
    except UnicodeDecodeError:
        raise InvalidInput("The query is not percent-encoded UTF-8.") from None
    except ValueError:
        raise InvalidInput(f"The query has more than {MAX_FIELDS} fields.") from None
    options: dict[str, Any] = {}
    params: dict[str, Any] = {}
    webhook: dict[str, Any] = {}
    for name, values in _gathered(pairs).items():
        if name in _OF_THE_REQUEST:
            continue
        if name in _TEXT_FIELDS:
            options[name] = values[0]
        elif name in _JSON_FIELDS:
            options[name] = _json(values[0], max_depth)
        elif name in _WEBHOOK_FIELDS:
            webhook[name.removeprefix("webhook_")] = values[0] if name == "webhook_url" else values
        elif name == "stop":
            params[name] = values
        elif name in Params.model_fields:
            read = [_json(value, max_depth) for value in values]
            params[name] = read if name in _REPEATABLE else read[0]
        else:
            raise InvalidInput("no such field", param=name[:100])
    if webhook:
        options["webhook"] = webhook
    try:
        return validate(JobOptions, options | {"params": params})
    except InvalidInput as error:
        # The caller wrote `top_p` and `webhook_url`.
        if error.param is not None:
            error.param = error.param.removeprefix("params.").replace("webhook.", "webhook_", 1)
        raise


def _gathered(pairs: list[tuple[str, str]]) -> dict[str, list[str]]:
    fields: dict[str, list[str]] = {}
    for name, value in pairs:
        values = fields.setdefault(name, [])
        if values and name not in _REPEATABLE:
            raise InvalidInput("stands twice", param=name[:100])
        values.append(value)
    return fields


def _json(value: str, max_depth: int) -> object:
    try:
        return strict_json.parse(value.encode(), max_depth=max_depth)
    except InvalidJson:
        return value  # the schema says what is wrong with it, and calls it by its name
