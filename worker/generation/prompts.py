"""From stored lines to what the engine takes: parse → tokens → sampling parameters.

Needs a tokenizer and the model's limits, and neither a thread nor an engine.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import orjson

from engine import SamplingParams, StructuredOutputs
from engine.errors import InvalidParams, InvalidPrompt
from jobs.queries.claiming import ClaimedRequest
from jobs.queries.settling import Outcome
from jobs.requests import DEFAULT_MAX_TOKENS, ModelLimits
from worker.generation import responses

logger = logging.getLogger(__name__)

Message = Mapping[str, Any]
Tokens = list[int] | InvalidPrompt


class PromptTokenizer(Protocol):
    """The part of `engine.tokenization` that prompts need. A bad item's place in a result holds its error."""

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]: ...
    def encode_chat_batch(self, conversations: Sequence[Sequence[Message]]) -> list[Tokens]: ...


class ContextExceeded(Exception):
    """A prompt and its answer are longer than the model's context."""


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request as the engine takes it."""

    request: ClaimedRequest
    token_ids: list[int]
    params: SamplingParams
    is_chat: bool


@dataclass(frozen=True, slots=True)
class Preparation:
    """What a group of claimed requests came to; each is in exactly one of the two."""

    prepared: list[PreparedRequest]
    refused: list[Outcome]


class PromptPreparer:
    """Turns claimed requests into tokens and parameters for one model. `tokenizer` is None where it has none."""

    def __init__(self, model: ModelLimits, tokenizer: PromptTokenizer | None) -> None:
        self._model = model
        self._tokenizer = tokenizer

    def prepare(self, requests: Sequence[ClaimedRequest]) -> Preparation:
        """Never raises for one request's sake: what cannot be prepared is refused, in the order of `requests`."""
        bodies = [_parsed(request.body) for request in requests]
        result = Preparation([], [])
        for request, body, token_ids in zip(requests, bodies, self._tokens(bodies), strict=True):
            if "refused" in body:
                # The API refused it when the rest of its batch was valid.
                result.refused.append(responses.refused(request, **body["refused"]))
                continue
            try:
                if isinstance(token_ids, InvalidPrompt):
                    raise token_ids
                params = self._params(request, body, len(token_ids))
            except (InvalidPrompt, InvalidParams) as error:
                result.refused.append(responses.refused(request, error.message, code="invalid_request"))
            except ContextExceeded as error:
                result.refused.append(responses.refused(request, str(error), code="context_length_exceeded"))
            except Exception as error:  # noqa: BLE001 - one line must end neither this worker nor its neighbours
                kind = type(error).__name__  # the message may quote the prompt
                logger.error("request %s cannot be prepared: %s", request.name, kind)
                message = f"this worker cannot prepare the request: {kind}"
                result.refused.append(responses.broken(request, message))
            else:
                result.prepared.append(PreparedRequest(request, token_ids, params, is_chat="messages" in body))
        return result

    def _tokens(self, bodies: Sequence[dict[str, Any]]) -> list[Tokens]:
        tokens: dict[int, Tokens] = {
            place: body["prompt"] for place, body in enumerate(bodies) if isinstance(body.get("prompt"), list)
        }
        prompts = {place: body["prompt"] for place, body in enumerate(bodies) if isinstance(body.get("prompt"), str)}
        chats = {place: body["messages"] for place, body in enumerate(bodies) if "messages" in body}
        if self._tokenizer is None:
            refusal = InvalidPrompt(f"{self._model.name} has no tokenizer: send token ids as the prompt")
            tokens |= dict.fromkeys([*prompts, *chats], refusal)
        else:
            tokens |= zip(prompts, self._tokenizer.encode_batch(list(prompts.values())), strict=True)
            tokens |= zip(chats, self._tokenizer.encode_chat_batch(list(chats.values())), strict=True)
        neither = InvalidPrompt("the stored line holds neither a prompt nor messages that this worker understands")
        return [tokens.get(place, neither) for place in range(len(bodies))]

    def _params(self, request: ClaimedRequest, body: dict[str, Any], prompt_tokens: int) -> SamplingParams:
        options = {name: value for name, value in body.items() if name not in ("prompt", "messages", "live")}
        context = self._model.max_model_len
        max_tokens = options.get("max_tokens", 1)
        if prompt_tokens + max_tokens > context:
            asked = f" and max_tokens {max_tokens}" if "max_tokens" in options else " leave no place for an answer and"
            raise ContextExceeded(f"{prompt_tokens} prompt tokens{asked} exceed the context of {context} tokens")
        options.setdefault("max_tokens", min(DEFAULT_MAX_TOKENS, context - prompt_tokens))
        # A request that runs again, after a crash or elsewhere, draws the same tokens again.
        options.setdefault("seed", _seed(request))
        if "logit_bias" in options:
            options["logit_bias"] = {int(token): bias for token, bias in options["logit_bias"].items()}
        if options.get("echo") and "logprobs" in options:
            options["prompt_logprobs"] = options["logprobs"]
        structure = options.pop("structured_outputs", None)
        return SamplingParams(
            **options, structured_outputs=None if structure is None else StructuredOutputs(**structure)
        )


def _parsed(body: bytes) -> dict[str, Any]:
    """A stored line; empty where it is not what the API writes."""
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _seed(request: ClaimedRequest) -> int:
    source = request.job_id.bytes + request.line.to_bytes(8, "big")
    return int.from_bytes(hashlib.blake2b(source, digest_size=8).digest(), "big") >> 1
