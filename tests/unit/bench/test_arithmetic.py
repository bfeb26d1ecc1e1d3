"""The least work of a workload, counted token by token."""

from __future__ import annotations

import pytest

from bench.arithmetic import Work, geometry
from bench.ceilings import Ceilings
from bench.models import CONFIGS
from bench.workload import WorkloadRequest

PREFIX = [7, 7, 7]
REQUESTS = [
    WorkloadRequest([*PREFIX, 1, 2], 4),
    WorkloadRequest([*PREFIX, 3], 2),
    WorkloadRequest([*PREFIX, 4, 5, 6], 1),
]


def test_geometry_of_the_articles_model() -> None:
    model = geometry(CONFIGS["gpt2-large"]())
    assert model.linears == {(1280, 3840): 36, (1280, 1280): 36, (1280, 5120): 36, (5120, 1280): 36}
    assert model.head == (1280, 50257)
    assert model.attention_width == 1280
    assert model.weights == 12 * 1280 * 1280 * 36 + 1280 * 50257


def test_geometry_of_grouped_queries() -> None:
    model = geometry(CONFIGS["qwen3-0.6b"]())
    assert model.attention_width == 16 * 128
    assert sum(inputs * outputs * count for (inputs, outputs), count in model.linears.items()) == 28 * (
        1024 * (16 + 2 * 8) * 128 + 16 * 128 * 1024 + 3 * 1024 * 3072
    )


@pytest.mark.parametrize("shared", [0, 3])
def test_work_counts_each_token_once(shared: int) -> None:
    model = geometry(CONFIGS["tiny"]())
    looks = prompt_tokens = decode_tokens = 0
    for place, request in enumerate(REQUESTS):
        for position in range(shared if place else 0, len(request.prompt) + request.max_tokens - 1):
            looks += position + 1
            is_prompt = position < len(request.prompt)
            prompt_tokens += is_prompt
            decode_tokens += not is_prompt
    work = Work.of(model, REQUESTS, shared)
    assert (work.prompt_tokens, work.decode_tokens) == (prompt_tokens, decode_tokens)
    assert (work.output_tokens, work.steps) == (7, 4)
    assert work.attention_flops == looks * model.attention_layers * 2 * 2 * model.attention_width


def test_ceiling_is_the_slower_of_compute_and_memory() -> None:
    model = geometry(CONFIGS["tiny"]())
    work = Work.of(model, REQUESTS, 0)
    rates = {f"{inputs}x{outputs}": 10.0 for inputs, outputs in [*model.linears, model.head]}
    fast_memory, slow_memory = Ceilings(rates, rates, 1e6), Ceilings(rates, rates, 1e-3)
    assert fast_memory.seconds(model, work, "float32") == pytest.approx(work.flops(model) / 10e9)
    assert slow_memory.seconds(model, work, "float32") == pytest.approx(work.steps * model.weights * 4 / 1e6)
    assert slow_memory.seconds(model, work, "int8") == pytest.approx(work.steps * model.weights / 1e6)
