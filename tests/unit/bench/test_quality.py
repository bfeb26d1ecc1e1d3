"""The measures of quality, on distributions whose differences are known."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader

from bench.quality.__main__ import PRECISIONS, table
from bench.quality.float8_cache import rounded_to_float8
from bench.quality.gguf_files import requantize
from bench.quality.measures import Difference, LogProbabilities, greedy_answers
from engine import Engine, EngineConfig
from tests.support.gguf_files import CASES, write_pair

WINDOWS = [[0, 1, 2], [2, 0]]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama of two layers in Q8_0, without a tokenizer."""
    return write_pair(CASES[0], Type.Q8_0, tmp_path_factory.mktemp("model"))[0]


def engine_of(file: Path, quantization: str | None = None) -> Engine:
    config = EngineConfig(device="cpu", dtype="float32", num_kv_blocks=64, quantization=quantization)
    return Engine.from_pretrained(file, config)


def test_difference_counts_tokens_behind_the_first_of_each_window() -> None:
    before = [torch.tensor([[0.25, 0.5, 0.25], [0.25, 0.25, 0.5]]).log(), torch.tensor([[0.5, 0.25, 0.25]]).log()]
    after = [before[0], torch.tensor([[0.25, 0.5, 0.25]]).log()]
    same, found = (Difference.over(WINDOWS, before, these) for these in (before, after))
    assert same.perplexity == pytest.approx(2.0)
    assert (same.tokens, same.perplexity_change, same.mean_change, same.mean_kl, same.same_top) == (3, 0, 0, 0, 1)
    assert found.perplexity == pytest.approx(2 * 2 ** (1 / 3))
    assert found.perplexity_change == pytest.approx(2 ** (1 / 3) - 1)
    assert found.mean_change == pytest.approx(math.log(2) / 3)
    assert found.mean_kl == pytest.approx((0.5 * math.log(2) - 0.25 * math.log(2)) / 3)
    assert found.same_top == pytest.approx(2 / 3)


def test_log_probabilities_are_those_that_the_engine_reports(file: Path, tmp_path: Path) -> None:
    windows = [[5, 9, 1, 7], [3, 2]]
    engine = engine_of(file)
    kept = LogProbabilities(engine, windows, tmp_path)
    same = kept.difference(engine_of(file), windows)
    assert (same.tokens, same.same_top) == (4, 1.0)
    assert same.mean_change < 1e-6
    rounded = kept.difference(engine_of(file, quantization="int8"), windows)
    assert 1e-5 < rounded.mean_change < 0.05
    assert 0 < rounded.mean_kl < 0.01
    assert greedy_answers(engine, windows) == greedy_answers(engine, windows)


def test_requantized_file_holds_the_values_of_the_type(file: Path, tmp_path: Path) -> None:
    windows = [[5, 9, 1, 7]]
    kept = LogProbabilities(engine_of(file), windows, tmp_path)
    changes = []
    for name in ("F16", "Q4_0"):
        target = tmp_path / f"{name}.gguf"
        requantize(file, target, name)
        matrices = [tensor for tensor in GGUFReader(target).tensors if len(tensor.shape) == 2]
        assert {tensor.tensor_type for tensor in matrices} == {Type[name]}
        changes.append(kept.difference(engine_of(target), windows).mean_kl)
    assert 0 <= changes[0] < 1e-5 < 1e-4 < changes[1]


def test_cache_rounding_is_that_of_float8() -> None:
    numbers = torch.tensor([[[1.0, 1.06, -3.3, 0.01]]])
    assert torch.equal(rounded_to_float8(numbers), torch.tensor([[[1.0, 1.0, -3.25, 0.009765625]]]))


def test_table_has_a_line_for_each_precision() -> None:
    difference = Difference(
        tokens=3, perplexity=2.0, perplexity_change=0.001, mean_change=0.02, mean_kl=0.003, same_top=0.99
    )
    text = table({"int8": {**asdict(difference), "answers": 24, "same_answers": 20}})
    assert text.splitlines()[-1] == (
        f"| {PRECISIONS['int8'].title} | 2.000 | +0.10% | 0.0200 | 0.00300 | 99.0% | 20 of 24 |"
    )
