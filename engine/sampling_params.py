"""How one request wants its tokens chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from engine.errors import InvalidParams
from engine.structured_outputs import StructuredOutputs

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 64
MAX_STOP_STRING_LENGTH = 1024
MAX_COMPLETIONS = 1024
_MAX_BIAS = 1e9
_LEAST_TOP_P = 1e-9  # a smaller one is the same: the likeliest token alone; in float32 it could be 0
_SEED_MIN, _SEED_MAX = -(2**63), 2**64 - 1
_FLOAT32_MAX = 3.4028234663852886e38  # a larger number would be infinite beside float32 logits


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling options of one request; names and meanings are those of vLLM and of the OpenAI API.

    Filters apply in this order: logit_bias, penalties, allowed / banned / min_tokens, temperature, top_k, top_p, min_p.
    The last four agree with transformers' logits processors of the same names.

    Raises `InvalidParams`, which names the field, on construction.
    """

    n: int = 1
    """Completions of the prompt; they share its KV cache."""

    temperature: float = 1.0
    """0 is greedy, and so is anything below 1e-5, where logits would overflow."""

    top_k: int = 0
    """Keep the k most likely tokens; 0 or -1 keeps all."""

    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches p."""

    min_p: float = 0.0
    """Keep tokens at least this likely relative to the most likely one."""

    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time the output holds it, -2 to 2."""

    presence_penalty: float = 0.0
    """Subtracted from a token's logit when the output holds it, -2 to 2."""

    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens that prompt or output hold, 0.01 to 100; 1 is off."""

    max_tokens: int | None = 16
    """Most tokens to generate. None: as many as context and cache allow. 0: only read the prompt (for its logprobs)."""

    min_tokens: int = 0
    """End-of-sequence and stop tokens are banned, and stop strings ignored, up to this many."""

    stop: Sequence[str] = ()
    """Strings that end the output and are cut from its text. A single string is accepted too."""

    stop_token_ids: Sequence[int] = ()
    """Tokens that end the output; kept in `token_ids`, not in the text."""

    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    seed: int | None = None
    """64 bits. None: derived from the engine's seed and the request's id."""

    logprobs: int | None = None
    """Log-probabilities of the chosen token and of this many most likely ones (0 to 20), before any filter."""

    prompt_logprobs: int | None = None
    """The same for the prompt's tokens; such a prompt is computed in full, past the prefix cache."""

    echo: bool = False
    """Put the prompt's text before the completion's."""

    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the named tokens' logits, -1e9 to 1e9."""

    allowed_token_ids: Sequence[int] | None = None
    """When given, no other token is ever chosen."""

    banned_token_ids: Sequence[int] = ()
    """Never chosen."""

    structured_outputs: StructuredOutputs | None = None
    """The form that the output must have. It ends where nothing can follow, also before `min_tokens`."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids", "banned_token_ids"):
            object.__setattr__(self, name, _as_tuple(name, getattr(self, name)))
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", _as_tuple("allowed_token_ids", self.allowed_token_ids))
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        self._check_numbers()
        object.__setattr__(self, "top_p", max(self.top_p, _LEAST_TOP_P))
        self._check_collections()

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5

    @property
    def penalized(self) -> bool:
        return self.frequency_penalty != 0.0 or self.presence_penalty != 0.0 or self.repetition_penalty != 1.0

    def _check_numbers(self) -> None:
        _check_int("n", self.n, 1, MAX_COMPLETIONS)
        _check_int("top_k", self.top_k, 0, None)
        _check_int("min_tokens", self.min_tokens, 0, None)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 0, None)
            if self.min_tokens > self.max_tokens:
                raise InvalidParams("min_tokens is above max_tokens")
        if self.seed is not None:
            _check_int("seed", self.seed, _SEED_MIN, _SEED_MAX)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 0, MAX_LOGPROBS)

        _check_float("temperature", self.temperature, 0.0, None)
        _check_float("top_p", self.top_p, 0.0, 1.0, above=True)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("repetition_penalty", self.repetition_penalty, 0.01, 100.0)

        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "echo"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidParams(f"{name} must be true or false")

    def _check_collections(self) -> None:
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidParams(f"stop holds {len(self.stop)} strings; at most {MAX_STOP_STRINGS} are allowed")
        for text in self.stop:
            if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_STRING_LENGTH:
                raise InvalidParams(f"stop must hold strings of 1 to {MAX_STOP_STRING_LENGTH} characters")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise InvalidParams("allowed_token_ids is empty: no token could be chosen")
        for name in ("stop_token_ids", "banned_token_ids", "allowed_token_ids"):
            for token in getattr(self, name) or ():
                _check_int(name, token, 0, None)
        if not isinstance(self.structured_outputs, StructuredOutputs | None):
            raise InvalidParams("structured_outputs must be a StructuredOutputs")
        if not isinstance(self.logit_bias, Mapping):
            raise InvalidParams("logit_bias must map token ids to numbers")
        for token, bias in self.logit_bias.items():
            _check_int("logit_bias", token, 0, None)
            _check_float("logit_bias", bias, -_MAX_BIAS, _MAX_BIAS)


def _as_tuple(name: str, values: object) -> tuple[object, ...]:
    if isinstance(values, Sequence | set | frozenset):
        return tuple(values)
    raise InvalidParams(f"{name} must be a list")


def _check_int(name: str, value: object, low: int, high: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidParams(f"{name} must be an integer")
    # The value is not echoed: it may have thousands of digits.
    if high is None and value < low:
        raise InvalidParams(f"{name} must be at least {low}")
    if high is not None and not low <= value <= high:
        raise InvalidParams(f"{name} must be {low} to {high}")


def _check_float(name: str, value: object, low: float | None, high: float | None, *, above: bool = False) -> None:
    """`above` leaves out the lower bound itself."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _FLOAT32_MAX:
        raise InvalidParams(f"{name} must be a finite number")
    if low is not None and (value < low or (above and value == low)):
        raise InvalidParams(f"{name} must be {'above' if above else 'at least'} {low:g}")
    if high is not None and value > high:
        raise InvalidParams(f"{name} must be at most {high:g}")
