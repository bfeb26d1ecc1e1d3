"""The schema of jobs and of their lines, inline or in a file, checked without a tokenizer.

caller's line ──strict_json──▶ dict ──parse_request──▶ StagedLine ──COPY──▶ requests + bodies
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

import orjson
from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from jobs import patterns
from jobs.conversations import MAX_TOOLS, Message, TemplateOptions, Tool, ToolChoice, check_tools
from jobs.errors import InvalidInput
from jobs.strict_model import StrictModel, at_most
from jobs.structured_outputs import ResponseFormat, StructuredOutputs

Model = TypeVar("Model", bound=BaseModel)

# An entry of a Postgres index holds 2,704 bytes. Texts that are indexed are bounded in bytes, or in characters of which
# each may take four: 512 of a custom_id, 256 of a model's name.
MAX_CUSTOM_ID = 512
MAX_MODEL_NAME = 256
MAX_URL_BYTES = 2048
PREFIX_BYTES = 256  # of a prompt's beginning, that decide which requests are claimed together
DEFAULT_MAX_TOKENS = 256
MAX_EVENTS = 16  # of a webhook
MAX_JOB_NAME = 128
MAX_METADATA = 16  # pairs
MAX_CHOICES_OF_A_PROMPT = 128
MAX_BIASED_TOKENS = 300  # as many as OpenAI takes
_NAME_SHOWN = 100  # characters of an unknown field's name
_CHAT_ONLY = (
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "chat_template_kwargs",
    "add_generation_prompt",
    "continue_final_message",
)
_PATH_SHOWN = 300  # characters of a field's path

# A custom_id is stored as text and printed in logs and terminals: no control characters, no NUL.
CustomId = Annotated[str, StringConstraints(min_length=1, max_length=MAX_CUSTOM_ID, pattern=patterns.PRINTABLE)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=256)]


def _no_longer(url: str) -> str:
    size = len(url.encode())
    if size > MAX_URL_BYTES:
        raise ValueError(f"{size} bytes; at most {MAX_URL_BYTES} are allowed")
    return url


LogitBias = Annotated[
    dict[
        Annotated[str, StringConstraints(pattern=r"^[0-9]{1,10}$")],
        Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)],
    ],
    at_most(MAX_BIASED_TOKENS),
]
"""Added to the logits of the named tokens; JSON has token ids as strings."""


class Params(StrictModel):
    """Sampling parameters; what is left out is the job's, then the default."""

    max_tokens: int | None = Field(default=None, ge=0, le=1_000_000, description="0: only with `echo`")
    min_tokens: int | None = Field(default=None, ge=0, le=1_000_000)
    temperature: float | None = Field(default=None, ge=0, le=10, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(default=None, ge=0, le=1_000_000, description="0: no limit")
    min_p: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2, allow_inf_nan=False)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2, allow_inf_nan=False)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=10, allow_inf_nan=False)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES_OF_A_PROMPT)
    logit_bias: LogitBias | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=16, fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64, fail_fast=True)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=20, description="how many likely tokens to list beside each")
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    @model_validator(mode="after")
    def _min_tokens_is_not_above_max_tokens(self) -> Params:
        if self.min_tokens is not None and self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens ({self.min_tokens}) is above max_tokens ({self.max_tokens})")
        return self

    @model_validator(mode="after")
    def _one_way_to_ask_for_a_form(self) -> Params:
        if self.response_format is not None and self.structured_outputs is not None:
            raise ValueError("either 'response_format' or 'structured_outputs', not both")
        return self

    def stored(self) -> dict[str, Any]:
        """The stored fields, as the worker reads them. A `response_format` is stored as `structured_outputs`."""
        fields = self.model_dump(exclude_none=True, exclude={"custom_id", "response_format", "structured_outputs"})
        wanted = self.structured_outputs
        if self.response_format is not None:
            wanted = self.response_format.structured_outputs()
            fields["structured_outputs"] = None
        if wanted is not None:
            ((name, value),) = ((n, v) for n, v in wanted if v is not None)
            fields["structured_outputs"] = {name.rstrip("_"): value}
        return fields


class PromptLine(Params):
    """One line of a job: a prompt or messages, and the parameters that differ from the job's."""

    custom_id: CustomId | None = None
    prompt: (
        Annotated[str, StringConstraints(min_length=1)]
        | Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
        | None
    ) = None
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)] | None = None
    tools: Annotated[list[Tool], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = Field(default=None, description="false: at most one call")
    chat_template_kwargs: TemplateOptions | None = Field(default=None, description="variables of the chat template")
    add_generation_prompt: bool | None = Field(
        default=None, description="end the prompt where the assistant's turn begins; true unless a message is continued"
    )
    continue_final_message: bool | None = Field(
        default=None, description="leave the last message open, so that the answer goes on with its text"
    )
    add_special_tokens: bool | None = Field(
        default=None, description="what the tokenizer puts around a text; true for a prompt, false for messages"
    )
    echo: bool | None = Field(default=None, description="put the prompt before the text, and its log-probabilities")

    @model_validator(mode="after")
    def _one_kind_of_input(self) -> PromptLine:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("exactly one of 'prompt' and 'messages' is needed")
        if self.echo and self.messages is not None:
            raise ValueError("'echo' is possible with 'prompt' only")
        return self


class Webhook(StrictModel):
    """The receiver that is called at the job's end, and at the milestones that `events` names."""

    url: Annotated[str, StringConstraints(pattern=patterns.HTTP_URL), AfterValidator(_no_longer)]
    events: (
        Annotated[
            list[
                Literal[
                    "job.completed",
                    "job.cancelled",
                    "job.expired",
                    "job.first_result",
                    "job.progress_25",
                    "job.progress_50",
                    "job.progress_75",
                    "job.stalled",
                ]
            ],
            Field(max_length=MAX_EVENTS, fail_fast=True),
        ]
        | None
    ) = None

    @field_validator("url")
    @classmethod
    def _has_a_host(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            usable = bool(parts.hostname) and parts.port != 0
        except ValueError:  # a port or an IPv6 address that is none
            usable = False
        if not usable:
            raise ValueError("not an absolute http:// or https:// URL")
        return url


Metadata = Annotated[
    dict[
        Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=patterns.WITHOUT_NUL)],
        Annotated[str, StringConstraints(max_length=512, pattern=patterns.WITHOUT_NUL)],
    ],
    Field(max_length=MAX_METADATA),
    at_most(MAX_METADATA),
]

JobName = Annotated[str, StringConstraints(min_length=1, max_length=MAX_JOB_NAME, pattern=patterns.PRINTABLE)]

_WINDOW_UNITS = {"m": 60, "h": 3600, "d": 86400}
Window = Annotated[str, StringConstraints(pattern=patterns.WINDOW)]


def window_seconds(window: str) -> int:
    """'30m', '24h', '7d' in seconds."""
    return int(window[:-1]) * _WINDOW_UNITS[window[-1]]


def window_text(seconds: int) -> str:
    """A window as a caller may write it: in hours where they are whole and of four digits, else in minutes or days."""
    hours = seconds // 3600
    if seconds % 3600 != 0:
        return f"{seconds // 60}m"
    return f"{hours}h" if hours < 10_000 else f"{hours // 24}d"


class JobOptions(StrictModel):
    """A job without its prompts. NDJSON submissions carry it in the query."""

    model: Annotated[str, StringConstraints(min_length=1, max_length=MAX_MODEL_NAME, pattern=patterns.WITHOUT_NUL)]
    params: Params = Params()
    priority: int = Field(default=0, ge=-100, le=100)
    metadata: Metadata = Field(default={})
    name: JobName | None = Field(default=None, description="for people; `name` of the metadata unless given")
    webhook: Webhook | None = None
    completion_window: Window | None = None


def check_priority(priority: int, ceiling: int) -> None:
    """Raise `InvalidInput` if the priority is above the operator's ceiling."""
    if priority > ceiling:
        raise InvalidInput(f"{priority} is above {ceiling}, the most that this server allows", param="priority")


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """The limits of a model, known without loading it."""

    name: str
    max_model_len: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class StagedLine:
    """A checked line, as it is stored."""

    line: int
    custom_id: str
    prefix: int
    body: bytes


def parse_request(document: object, line: int, defaults: Params, model: ModelLimits) -> StagedLine:
    """Check one line. A bare string is a prompt. Raises `InvalidInput` that names the field; `line` is 1-based."""
    if isinstance(document, str):
        document = {"prompt": document}
    elif isinstance(document, dict):
        _check_length(document, model)
    request = validate(PromptLine, document)
    if request.prompt is not None:
        for name in _CHAT_ONLY:
            if getattr(request, name) is not None:
                raise InvalidInput("possible with messages only", param=name)
    check_tools(request.tools or (), request.tool_choice)
    _check_template(request)
    _check_limits(request, defaults, model)
    body = defaults.stored() | request.stored()
    if len(request.model_fields_set & {"min_tokens", "max_tokens"}) == 1:
        validate(Params, {key: body[key] for key in ("min_tokens", "max_tokens") if key in body})
    beginning: object = request.prompt
    if request.messages is not None:
        beginning = body["messages"] = [message.stored() for message in request.messages]
    if request.tools is not None:
        # Templates write them before the conversation.
        body["tools"] = [tool.stored() for tool in request.tools]
        beginning = [body["tools"], beginning]
    return StagedLine(
        line=line,
        custom_id=request.custom_id if request.custom_id is not None else f"request-{line}",
        prefix=_prefix(beginning),
        body=orjson.dumps(body),
    )


def refused_line(line: int, custom_id: str, message: str, code: str, param: str | None) -> StagedLine:
    """A line that is refused already. A worker settles it with this error as its answer, in the order of all lines."""
    refusal = {"message": message, "code": code, "param": param}
    return StagedLine(line=line, custom_id=custom_id, prefix=0, body=orjson.dumps({"refused": refusal}))


def validate(schema: type[Model], document: object) -> Model:
    """Validate a document. Raises `InvalidInput` with the most telling of pydantic's complaints."""
    try:
        return schema.model_validate(document)
    except ValidationError as error:
        complaints = error.errors(include_url=False, include_context=False, include_input=False)
        raise _invalid(max(complaints, key=_telling)) from None


def _telling(complaint: ErrorDetails) -> tuple[int, bool]:
    """A union complains once a branch; the branch that was meant got furthest."""
    return len(complaint["loc"]), not complaint["type"].endswith("_type")


def _invalid(complaint: ErrorDetails) -> InvalidInput:
    kind, where = complaint["type"], complaint["loc"]
    path = ""
    for depth, part in enumerate(where):
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier():  # pydantic also names the branches of a union: "constrained-str", "list[int]"
            path += f".{part}" if path else part
        elif kind == "extra_forbidden" and depth == len(where) - 1:
            path += f"[{part[:_NAME_SHOWN]!r}]"
    message = patterns.message(complaint).removeprefix("Value error, ")
    if kind in ("model_type", "model_attributes_type"):
        message = "a JSON object is expected here"
    elif kind == "extra_forbidden":
        message = "no such field"
    return InvalidInput(message, param=path[:_PATH_SHOWN] or None)


def _check_length(document: dict[str, object], model: ModelLimits) -> None:
    """Refuse what is longer than the context before each of its items is looked at."""
    for name, unit in (("prompt", "prompt tokens"), ("messages", "messages")):
        items = document.get(name)
        if isinstance(items, list) and len(items) > model.max_model_len:
            raise InvalidInput(
                f"{len(items)} {unit} exceed the context of {model.name} ({model.max_model_len} tokens)", param=name
            )


def _check_limits(request: PromptLine, defaults: Params, model: ModelLimits) -> None:
    """Refuse what is certain without a tokenizer; only the worker knows how many tokens a text has."""
    max_tokens = request.max_tokens if request.max_tokens is not None else defaults.max_tokens
    min_tokens = request.min_tokens if request.min_tokens is not None else defaults.min_tokens
    if max_tokens is None and min_tokens is not None and min_tokens > DEFAULT_MAX_TOKENS:
        raise InvalidInput(
            f"min_tokens ({min_tokens}) is above max_tokens, which is {DEFAULT_MAX_TOKENS} where it is not given",
            param="min_tokens",
        )
    if max_tokens == 0 and not request.echo:
        raise InvalidInput("0 is possible with 'echo' only", param="max_tokens")
    biased = max((int(token) for bias in (defaults.logit_bias, request.logit_bias) for token in bias or ()), default=0)
    if biased >= model.vocab_size:
        raise InvalidInput(
            f"token id {biased} is outside the vocabulary of {model.name} ({model.vocab_size} tokens)",
            param="logit_bias",
        )
    # An unset limit shrinks to what fits.
    wanted = max_tokens if max_tokens is not None else max(1, min_tokens or 0)
    prompt = request.prompt if isinstance(request.prompt, list) else None
    if prompt is not None and (largest := max(prompt)) >= model.vocab_size:
        raise InvalidInput(
            f"token id {largest} is outside the vocabulary of {model.name} ({model.vocab_size} tokens)",
            param="prompt",
        )
    length = len(prompt) if prompt is not None else 1
    if length + wanted > model.max_model_len:
        limit = "max_tokens" if max_tokens is not None or not min_tokens else "min_tokens"
        counted = f"{length} prompt tokens and {limit} {wanted}" if prompt is not None else f"{limit} {wanted}"
        raise InvalidInput(f"{counted} exceed the context of {model.name} ({model.max_model_len} tokens)", param=limit)


def _check_template(request: PromptLine) -> None:
    """Refuse what no chat template or tokenizer is asked for."""
    if request.add_special_tokens and isinstance(request.prompt, list):
        raise InvalidInput("possible with texts only: token ids are taken as they are", param="add_special_tokens")
    if not request.continue_final_message or request.messages is None:
        return
    if request.add_generation_prompt:
        raise InvalidInput("not beside add_generation_prompt", param="continue_final_message")
    final = request.messages[-1]
    if final.tool_calls is not None or not (final.content or "").strip():
        raise InvalidInput("a text is needed in the last message", param="continue_final_message")


def _prefix(beginning: object) -> int:
    """Equal for prompts that begin alike; spread over a signed 64-bit column otherwise."""
    raw = beginning.encode() if isinstance(beginning, str) else orjson.dumps(beginning)
    return int.from_bytes(hashlib.blake2b(raw[:PREFIX_BYTES], digest_size=8).digest(), "big", signed=True)
