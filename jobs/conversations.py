"""Conversations as callers send them: messages, the tools that may be called, and which of them have to be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from jobs import patterns
from jobs.errors import InvalidInput
from jobs.strict_model import StrictModel
from jobs.structured_outputs import Schema

MAX_TOOLS = 128  # as many as OpenAI takes
MAX_CALLS = 128  # of one message
_NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}}

FunctionName = Annotated[str, StringConstraints(pattern=patterns.FUNCTION_NAME)]
_Id = Annotated[str, StringConstraints(min_length=1, max_length=256)]

# What the worker gives to the template's renderer itself, or what would replace the template.
_RESERVED = frozenset(
    [
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    ]
)


def _no_reserved_name(options: dict[str, Any]) -> dict[str, Any]:
    taken = next((name for name in options if name in _RESERVED or not name.isidentifier()), None)
    if taken is not None:
        raise ValueError(f"{taken[:64]!r} is no variable that a request can set")
    return options


TemplateOptions = Annotated[dict[str, Any], Field(max_length=32), AfterValidator(_no_reserved_name)]
"""Variables of the model's chat template, such as `enable_thinking`."""


class FunctionCall(StrictModel):
    name: FunctionName
    arguments: Annotated[str, Field(description="a JSON object, as text")]


class ToolCall(StrictModel):
    """A call that the assistant made in an earlier turn."""

    id: _Id
    type: Literal["function"]
    function: FunctionCall


class Message(StrictModel):
    """One turn of a conversation, for the model's chat template."""

    role: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    content: str | None = None
    name: Annotated[str, StringConstraints(max_length=256)] | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(min_length=1, max_length=MAX_CALLS, fail_fast=True)] | None = None
    tool_call_id: _Id | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and self.tool_calls is None:
            raise ValueError("a content is needed where there are no tool_calls")
        return self

    def stored(self) -> dict[str, Any]:
        """What the template sees: no field that was not given, because templates ask whether one is defined."""
        return {"role": self.role, "content": self.content or ""} | self.model_dump(
            exclude_none=True, exclude={"role", "content"}
        )


class Function(StrictModel):
    """A function that the model may call; its arguments keep to `parameters`, a JSON schema."""

    name: FunctionName
    description: Annotated[str, StringConstraints(max_length=65_536)] | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class Tool(StrictModel):
    type: Literal["function"]
    function: Function

    def stored(self) -> dict[str, Any]:
        """As templates read it: with parameters, also where it takes none."""
        function = self.function.model_dump(exclude_none=True, exclude={"strict"})
        tool = {"type": "function", "function": {**function, "parameters": self.function.parameters or _NO_ARGUMENTS}}
        return tool | ({"strict": True} if self.function.strict else {})


class _Named(StrictModel):
    name: FunctionName


class NamedTool(StrictModel):
    """The one function that is to be called."""

    type: Literal["function"]
    function: _Named


class _Allowed(StrictModel):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]


class AllowedTools(StrictModel):
    """Those of the functions that may be called."""

    type: Literal["allowed_tools"]
    allowed_tools: _Allowed


ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedTools


def check_tools(tools: Sequence[Tool], choice: ToolChoice | None) -> None:
    """Raise `InvalidInput` where a function is named twice, or a choice names one that is not there."""
    names: set[str] = set()
    for place, tool in enumerate(tools):
        if tool.function.name in names:
            raise InvalidInput("a function of this name stands before", param=f"tools[{place}].function.name")
        names.add(tool.function.name)
    if choice is None:
        return
    if not names:
        raise InvalidInput("possible with tools only", param="tool_choice")
    wanted: list[str] = []
    if isinstance(choice, NamedTool):
        wanted = [choice.function.name]
    elif isinstance(choice, AllowedTools):
        wanted = [tool.function.name for tool in choice.allowed_tools.tools]
    unknown = next((name for name in wanted if name not in names), None)
    if unknown is not None:
        raise InvalidInput(f"{unknown!r} is none of the tools", param="tool_choice")
