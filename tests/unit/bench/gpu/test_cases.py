"""The end-to-end cases and the shapes of their models."""

from __future__ import annotations

import pytest
import torch

from bench.gpu.cases import CASES, case
from bench.models import CONFIGS


def test_cases_have_the_requests_of_their_titles() -> None:
    counts = {one.name: one.round(0) for one in CASES}
    assert {name: len(requests) for name, requests in counts.items()} == {
        "article": 50,
        "article-4096": 4096,
        "ragged": 256,
        "long": 512,
        "shared-prefix": 8192,
    }
    assert all(100 <= len(one.prompt) <= 1024 and 100 <= one.max_tokens <= 1024 for one in counts["ragged"])
    assert len({tuple(one.prompt) for one in counts["shared-prefix"]}) == 8
    assert len({tuple(one.prompt) for one in counts["article-4096"]}) == 4096
    one = case("article", is_dry=False)
    assert [len(request.prompt) for request in one.round(0)] == [len(request.prompt) for request in one.round(1)]
    assert one.round(0) != one.round(1)
    assert one.round(0) == one.round(0)


@pytest.mark.parametrize(("name", "weights"), [("gpt2-large", 774e6), ("qwen3-0.6b", 596e6), ("llama-3.1-8b", 8.03e9)])
def test_models_have_the_size_of_their_names(name: str, weights: float) -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS[name]())
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(weights, rel=0.002)
