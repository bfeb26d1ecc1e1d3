"""`/tokenize`, `/detokenize` and `/tokenizer_info` in vLLM's shape: a model's own tokenizer, which its workers hold."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from api.deps import Caller, InjectedServices, Services
from api.errors import Unavailable
from api.openai.documents import json_body, read_object
from api.openai.live_models import find_model
from api.openai.requests import translate
from api.tokenizer_calls import InjectedCalls
from jobs.errors import InvalidInput
from jobs.queries import live
from jobs.requests import ModelLimits, Params, TokenId, parse_request, validate
from jobs.strict_model import StrictModel

router = APIRouter(tags=["live"])


class TokenizeText(StrictModel):
    """A text, as a completion's prompt."""

    model: str | None = Field(default=None, description="may be left out where one model is served")
    prompt: str
    add_special_tokens: bool | None = Field(default=None, description="true unless given")
    return_token_strs: bool | None = None


class TokenizeChat(StrictModel):
    """A conversation, through the model's chat template."""

    model: str | None = None
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = Field(default=None, description="false unless given: the template writes them")
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class Detokenize(StrictModel):
    """Token ids that become a text."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


class Tokens(BaseModel):
    """What a text or a conversation is made of."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Text(BaseModel):
    """What tokens say, special tokens too."""

    prompt: str


class TokenizerInfo(BaseModel):
    """Special tokens and the chat template, as `tokenizer_config.json` has them."""

    model_config = ConfigDict(extra="allow")

    tokenizer_class: str
    bos_token: str | None
    eos_token: str | None
    chat_template: str | dict[str, str] | None
    model_max_length: int


def _either_body() -> dict[str, Any]:
    bodies = [json_body(kind)["requestBody"]["content"]["application/json"] for kind in (TokenizeText, TokenizeChat)]
    return {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"anyOf": [body["schema"] for body in bodies]}}},
        }
    }


@router.post("/v1/tokenize", openapi_extra=_either_body())
@router.post("/tokenize", include_in_schema=False)
async def tokenize(request: Request, caller: Caller, services: InjectedServices, calls: InjectedCalls) -> Tokens:
    """The tokens of a text, or of a conversation as the chat template writes it, that a request would run with."""
    body, _ = await read_object(services, request)
    model = await _model(services, body.get("model"))
    line = await asyncio.to_thread(_line, body, model)
    wants_pieces = bool(body.get("return_token_strs"))
    found = await calls.ask(model.name, {"line": orjson.Fragment(line), "return_token_strs": wants_pieces})
    tokens = found["tokens"]
    return Tokens(count=len(tokens), max_model_len=model.max_model_len, tokens=tokens, token_strs=found["pieces"])


@router.post("/v1/detokenize", openapi_extra=json_body(Detokenize))
@router.post("/detokenize", include_in_schema=False)
async def detokenize(request: Request, caller: Caller, services: InjectedServices, calls: InjectedCalls) -> Text:
    """The text of tokens."""
    body, _ = await read_object(services, request)
    model = await _model(services, body.get("model"))
    wanted = await asyncio.to_thread(validate, Detokenize, body)
    for place, token in enumerate(wanted.tokens):
        if token >= model.vocab_size:
            raise InvalidInput(
                f"outside the vocabulary of {model.name} ({model.vocab_size} tokens)", param=f"tokens[{place}]"
            )
    return Text(prompt=(await calls.ask(model.name, {"tokens": wanted.tokens}))["prompt"])


@router.get("/v1/tokenizer_info")
@router.get("/tokenizer_info", include_in_schema=False)
async def tokenizer_info(
    caller: Caller,
    services: InjectedServices,
    calls: InjectedCalls,
    model: Annotated[str | None, Query(max_length=256)] = None,
) -> TokenizerInfo:
    """Special tokens and the chat template of a model; lm-evaluation-harness asks for them."""
    found = await _model(services, model)
    return TokenizerInfo(model_max_length=found.max_model_len, **await calls.ask(found.name, {}))


async def _model(services: Services, name: object) -> ModelLimits:
    """The named model, or the only one that is served. Raises `Unavailable` where no worker could answer."""
    if name is None:
        name = await services.transaction(live.only_live_model)
        if name is None:
            raise InvalidInput("the name of a model is needed, since not exactly one is served now", param="model")
    found = await find_model(services, name)
    if not found.is_served:
        raise Unavailable(f"No worker serves {found.limits.name!r} just now, and only workers hold its tokenizer.")
    return found.limits


def _line(body: dict[str, Any], model: ModelLimits) -> bytes:
    """What is to be tokenized, as the line of a job is stored."""
    given = {name: value for name, value in body.items() if value is not None}
    if "messages" not in given:
        text = validate(TokenizeText, given)
        return orjson.dumps({"prompt": text.prompt, "add_special_tokens": text.add_special_tokens is not False})
    conversation = validate(TokenizeChat, given).model_dump(exclude={"model", "return_token_strs"}, exclude_none=True)
    return parse_request(translate(conversation, "/v1/chat/completions"), 1, Params(), model).body
