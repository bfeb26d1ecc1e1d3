"""What parameters are refused, and that the refusal names the field."""

from __future__ import annotations

import math
from typing import Any

import pytest

from engine import SamplingParams
from engine.errors import EngineError, InvalidParams

BAD: list[tuple[str, Any]] = [
    ("n", 0),
    ("n", 1.5),
    ("n", True),
    ("n", 10**5000),
    ("temperature", -0.1),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("temperature", 10**5000),
    ("temperature", "1"),
    ("top_k", -2),
    ("top_p", 0.0),
    ("top_p", 1.1),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("frequency_penalty", 2.5),
    ("presence_penalty", -2.5),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", 1e-38),
    ("repetition_penalty", 1e38),
    ("max_tokens", -1),
    ("max_tokens", 1.0),
    ("min_tokens", -1),
    ("seed", 2**64),
    ("seed", "7"),
    ("logprobs", 21),
    ("logprobs", True),
    ("prompt_logprobs", -1),
    ("stop", [""]),
    ("stop", ["x" * 1025]),
    ("stop", ["x"] * 65),
    ("stop", [1]),
    ("stop", 5),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", ["a"]),
    ("banned_token_ids", 3),
    ("allowed_token_ids", []),
    ("allowed_token_ids", [1.0]),
    ("logit_bias", [1]),
    ("logit_bias", {1: math.inf}),
    ("logit_bias", {1: 1e38}),
    ("logit_bias", {1: -1e38}),
    ("logit_bias", {"1": 1.0}),
    ("ignore_eos", 1),
    ("echo", None),
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=[f"{name}-{n}" for n, (name, _) in enumerate(BAD)])
def test_parameter_out_of_range_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidParams, match=f"^{name}") as caught:
        SamplingParams(**{name: value})
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, EngineError)
    assert len(caught.value.message) < 200


def test_min_tokens_above_max_tokens_is_refused() -> None:
    with pytest.raises(InvalidParams, match="min_tokens"):
        SamplingParams(min_tokens=5, max_tokens=4)
    SamplingParams(min_tokens=5, max_tokens=None)


def test_parameters_accept_shorthands() -> None:
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(top_k=-1).top_k == 0
    assert SamplingParams(stop_token_ids={3}).stop_token_ids == (3,)  # type: ignore[arg-type]
    assert SamplingParams(temperature=1e-6).greedy
    assert SamplingParams(top_p=5e-324).top_p > 1e-38  # in float32 it would be 0, which keeps no token
    assert not SamplingParams().penalized
