"""From stored lines to what the engine takes: parse → tokens → sampling parameters.

Needs a tokenizer and the model's limits, and neither a thread nor an engine.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from uuid import UUID

import orjson

from engine import SamplingParams, StructuredOutputs
from engine.errors import InvalidParams, InvalidPrompt
from jobs.ids import JOB_PREFIX, public_id
from jobs.queries.claiming import ClaimedRequest
from jobs.queries.settling import Outcome
from jobs.requests import DEFAULT_MAX_TOKENS, ModelLimits
from worker.generation import chat_prompt, responses
from worker.generation.answer_grammar import answer_grammar
from worker.generation.answer_parts import AnswerForm
from worker.generation.chat_prompt import ChatRenderer
from worker.generation.time_limit import TimeLimitExceeded

logger = logging.getLogger(__name__)

Tokens = list[int] | InvalidPrompt

PLAIN = AnswerForm()
_OF_TEMPLATE = frozenset(
    [
        "prompt",
        "messages",
        "live",
        "repeated",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "chat_template_kwargs",
        "add_generation_prompt",
        "continue_final_message",
        "add_special_tokens",
    ]
)
"""Fields of a stored line that are no sampling parameters."""

BEYOND = 4  # times the context
LARGE_TEXT = 64 * 1024  # characters; larger texts are tokenized one at a time, which bounds memory and names the guilty


class PromptTokenizer(ChatRenderer, Protocol):
    """The part of `engine.tokenization` that prompts need."""

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[Tokens]:
        """Tokens of each text; a bad one's place holds its error."""

    def least_tokens(self, text: str) -> int:
        """A cheap lower bound."""


class ContextExceeded(Exception):
    """A prompt and its answer are longer than the model's context."""


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request as the engine takes it."""

    request: ClaimedRequest
    token_ids: list[int]
    params: SamplingParams
    is_chat: bool
    form: AnswerForm = PLAIN
    """What its answers are taken apart into."""

    taken_at: float = 0.0
    """When its preparation began, by `time.monotonic`."""


@dataclass(frozen=True, slots=True)
class Preparation:
    """What a group of claimed requests came to; each is in exactly one of the three."""

    prepared: list[PreparedRequest] = field(default_factory=list)
    refused: list[Outcome] = field(default_factory=list)
    postponed: list[ClaimedRequest] = field(default_factory=list)
    """To be claimed again later: others of their job took too long."""


class PromptPreparer:
    """Turns claimed requests into tokens and parameters for one model. `tokenizer` is None where it has none.

    `on_progress` is called before each piece of work that may hang.
    """

    def __init__(
        self,
        model: ModelLimits,
        tokenizer: PromptTokenizer | None,
        *,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._on_progress = on_progress
        self.in_work: tuple[ClaimedRequest, ...] = ()
        """The requests that are rendered or tokenized now: if that hangs, one of these is to blame."""

    def prepare(self, requests: Sequence[ClaimedRequest]) -> Preparation:
        """Never raises for one request's sake: what cannot be prepared is refused, in the order of `requests`."""
        taken_at = time.monotonic()
        bodies = [_parsed(request.body) for request in requests]
        result = Preparation()
        forms: dict[int, AnswerForm] = {}
        tokens = self._tokens(requests, bodies, forms)
        for place, (request, body, token_ids) in enumerate(zip(requests, bodies, tokens, strict=True)):
            if "refused" in body:
                # The API refused it when the rest of its batch was valid.
                result.refused.append(responses.refused(request, **body["refused"]))
                continue
            if token_ids is None:
                result.postponed.append(request)
                continue
            try:
                if isinstance(token_ids, Exception):
                    raise token_ids
                form = forms.get(place, PLAIN)
                params, form = self._params(request, body, len(token_ids), form)
            except (InvalidPrompt, InvalidParams) as error:
                result.refused.append(responses.refused(request, error.message, code="invalid_request"))
            except ContextExceeded as error:
                result.refused.append(responses.refused(request, str(error), code="context_length_exceeded"))
            except Exception as error:  # noqa: BLE001 - one line must end neither this worker nor its neighbours
                kind = type(error).__name__  # the message may quote the prompt
                logger.error(
                    "request %s cannot be prepared: %s",
                    request.name,
                    kind,
                    extra={"job_id": public_id(JOB_PREFIX, request.token.job_id), "line": request.token.line},
                )
                message = f"this worker cannot prepare the request: {kind}"
                result.refused.append(responses.broken(request, message))
            else:
                result.prepared.append(PreparedRequest(request, token_ids, params, "messages" in body, form, taken_at))
        return result

    def _tokens(
        self, requests: Sequence[ClaimedRequest], bodies: Sequence[dict[str, Any]], forms: dict[int, AnswerForm]
    ) -> list[Tokens | ContextExceeded | None]:
        """By request: its tokens, why it has none, or None where it is postponed. Fills `forms` for chats."""
        neither = InvalidPrompt("the stored line holds neither a prompt nor messages that this worker understands")
        tokens: list[Tokens | ContextExceeded | None] = [neither] * len(bodies)
        prompts: dict[int, str] = {}
        chats: list[int] = []
        for place, body in enumerate(bodies):
            if isinstance(body.get("prompt"), list):
                tokens[place] = body["prompt"]
            elif self._tokenizer is None and (isinstance(body.get("prompt"), str) or "messages" in body):
                tokens[place] = InvalidPrompt(f"{self._model.name} has no tokenizer: send token ids as the prompt")
            elif isinstance(body.get("prompt"), str):
                prompts[place] = body["prompt"]
            elif "messages" in body:
                chats.append(place)
        if self._tokenizer is None:
            return tokens
        rendered: dict[int, str] = {}
        slow_jobs: set[UUID] = set()
        for place in chats:
            request = requests[place]
            if request.job_id in slow_jobs:
                # One line a claim, so that a template that hangs for all of a job holds up other jobs only so long.
                tokens[place] = None
                continue
            try:
                self._begin(request)
                rendered[place], forms[place] = chat_prompt.render(self._tokenizer, bodies[place])
            except InvalidPrompt as error:
                tokens[place] = error
            except TimeLimitExceeded:
                slow_jobs.add(request.job_id)
                tokens[place] = InvalidPrompt(f"the chat template took more than {chat_prompt.TEMPLATE_LIMIT:g} s")
        for adds in (True, False):
            # A chat template writes special tokens itself.
            texts = {
                place: text for place, text in prompts.items() if bodies[place].get("add_special_tokens", True) is adds
            }
            texts |= {
                place: text
                for place, text in rendered.items()
                if bodies[place].get("add_special_tokens", False) is adds
            }
            self._encode(self._tokenizer, requests, texts, tokens, add_special_tokens=adds)
        self.in_work = ()
        return tokens

    def _encode(
        self,
        tokenizer: PromptTokenizer,
        requests: Sequence[ClaimedRequest],
        texts: Mapping[int, str],
        tokens: list[Tokens | ContextExceeded | None],
        *,
        add_special_tokens: bool,
    ) -> None:
        small: list[int] = []
        groups: list[list[int]] = [small]
        for place, text in texts.items():
            if len(text) <= LARGE_TEXT:
                small.append(place)
                continue
            self._begin(requests[place])
            context = self._model.max_model_len
            if len(text) > context and (least := tokenizer.least_tokens(text)) > context:
                tokens[place] = ContextExceeded(
                    f"at least {least} prompt tokens exceed the context of {context} tokens"
                )
            elif begins_beyond(text, context, tokenizer, add_special_tokens=add_special_tokens):
                tokens[place] = ContextExceeded(f"the prompt is far longer than the context of {context} tokens")
            else:
                groups.append([place])
        for group in groups:
            self._begin(*(requests[place] for place in group))
            encoded = tokenizer.encode_batch([texts[place] for place in group], add_special_tokens=add_special_tokens)
            for place, token_ids in zip(group, encoded, strict=True):
                tokens[place] = token_ids

    def _begin(self, *requests: ClaimedRequest) -> None:
        self.in_work = requests
        self._on_progress()

    def _params(
        self, request: ClaimedRequest, body: dict[str, Any], prompt_tokens: int, form: AnswerForm
    ) -> tuple[SamplingParams, AnswerForm]:
        options = {name: value for name, value in body.items() if name not in _OF_TEMPLATE}
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
        if form != PLAIN:
            structure, form = _structure(structure, form)
        if form.tools is not None and form.tools.format == "mistral":
            options["skip_special_tokens"] = False  # the mark of its calls is one
        params = SamplingParams(
            **options, structured_outputs=None if structure is None else StructuredOutputs(**structure)
        )
        return params, form


def _structure(wanted: dict[str, Any] | None, form: AnswerForm) -> tuple[dict[str, Any] | None, AnswerForm]:
    """The demanded form, and what answers are taken apart into: a regex or a grammar of the caller's is all content."""
    is_forced = form.tools is not None and form.tools.is_forced
    if wanted is not None and not is_forced and not wanted.keys() & {"json", "json_object"}:
        return wanted, PLAIN
    schema = None if wanted is None or is_forced else wanted.get("json", {"type": "object"})
    grammar = answer_grammar(form, schema)
    return (wanted if grammar is None else {"grammar": grammar}), form


def begins_beyond(text: str, context: int, tokenizer: PromptTokenizer, *, add_special_tokens: bool) -> bool:
    """Whether a beginning of the text has `BEYOND` times as many tokens as the context alone.

    For tokenizers without a bound. More of a text changes the tokens of what stands before only near the cut, because
    they are made word by word or by merging neighbours.
    """
    size = max(LARGE_TEXT, context)
    while size < len(text):
        (beginning,) = tokenizer.encode_batch([text[:size]], add_special_tokens=add_special_tokens)
        if isinstance(beginning, InvalidPrompt):
            return False
        if len(beginning) > BEYOND * context:
            return True
        size *= 4
    return False


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
