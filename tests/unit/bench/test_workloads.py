"""The workloads are what they say, and no two requests share anything by accident."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from bench.models import CONFIGS, save_tokenizer
from bench.workload import Workload, workloads
from cli.packaged_models import PACKAGED, cached_file

ROUNDS = (-1, 0, 1)
SHARED = 8  # tokens in a row that two prompts do not share by chance

every_workload = pytest.mark.parametrize("workload", workloads().values(), ids=list(workloads()))


def test_comparison_has_its_six_workloads() -> None:
    assert {"W1", "W1s", "W2", "W3", "W4", "W5"} <= workloads().keys()
    article = workloads()["W1"].requests(0)
    assert [(len(request.prompt), request.max_tokens) for request in article] == [(8, 50)] * 50


@pytest.fixture(autouse=True)
def _only_models_that_are_here(request: pytest.FixtureRequest) -> None:
    """Chat prompts are made by their model's tokenizer, which these tests do not download."""
    callspec = getattr(request.node, "callspec", None)
    if callspec is not None and callspec.params["workload"].model in PACKAGED and cached_file("smollm2") is None:
        pytest.skip("SmolLM2 has not been fetched")


@every_workload
def test_rounds_have_the_same_lengths_and_other_tokens(workload: Workload) -> None:
    rounds = [workload.requests(number) for number in ROUNDS]
    shapes = [[(len(request.prompt), request.max_tokens) for request in requests] for requests in rounds]
    assert shapes[0] == shapes[1] == shapes[2]
    assert workload.requests(0) == rounds[1]
    # English repeats itself, so prompts of it are told apart as a whole.
    head = workload.shared_prefix + SHARED if workload.prompts is None else None
    heads = [tuple(request.prompt[:head]) for requests in rounds for request in requests]
    assert len(set(heads)) == len(heads)
    prefixes = {tuple(request.prompt[: workload.shared_prefix]) for requests in rounds for request in requests}
    assert len(prefixes) == (len(ROUNDS) if workload.shared_prefix else 1)


@every_workload
def test_requests_fit_into_the_model(workload: Workload) -> None:
    config = CONFIGS[workload.model]()
    for request in workload.requests(0):
        assert len(request.prompt) + request.max_tokens <= config.max_position_embeddings
        assert max(request.prompt) < config.vocab_size


def test_every_token_has_a_text_of_its_own(tmp_path: Path) -> None:
    save_tokenizer(16_000, tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 16_000
    assert tokenizer.decode([token for byte in b"plain" for token in tokenizer.encode(chr(byte)).ids]) == "plain"
    assert all(tokenizer.decode([token]) for token in range(1, 16_000, 97))
