"""What rounding costs on real weights: precisions beside the same engine in float32, as `bench.quality` measures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from bench.quality.float8_cache import Float8Rounding
from bench.quality.measures import Difference, LogProbabilities
from bench.quality.text import windows
from engine import Engine
from engine.execution.model_runner import ModelRunner
from tests.real.conftest import RealModel, engine_of

pytestmark = pytest.mark.slow

Windows = Sequence[Sequence[int]]


@pytest.fixture(scope="module")
def smollm2_windows(smollm2: RealModel) -> Windows:
    """1,024 tokens of English and 512 of code."""
    return windows(smollm2.tokenizer)[1:6:2]


@pytest.fixture(scope="module")
def smollm2_in_float32(
    smollm2: RealModel, smollm2_windows: Windows, tmp_path_factory: pytest.TempPathFactory
) -> LogProbabilities:
    return LogProbabilities(smollm2.engine, smollm2_windows, tmp_path_factory.mktemp("float32"))


def assert_keeps_answers(found: Difference, *, change: float, kl: float) -> None:
    assert abs(found.perplexity_change) <= 0.01, "a share of so few tokens"
    assert found.mean_change <= change
    assert found.mean_kl <= kl


def test_int8_keeps_what_smollm2_says(
    smollm2: RealModel, smollm2_in_float32: LogProbabilities, smollm2_windows: Windows
) -> None:
    found = smollm2_in_float32.difference(engine_of(smollm2.path, quantization="int8"), smollm2_windows)
    assert_keeps_answers(found, change=0.05, kl=0.003)


def test_int8_keeps_what_gemma3_says(gemma3: RealModel, tmp_path: Path) -> None:
    texts = windows(gemma3.tokenizer)[1:6:4]
    reference = LogProbabilities(gemma3.engine, texts, tmp_path)
    found = reference.difference(engine_of(gemma3.path, quantization="int8"), texts)
    assert_keeps_answers(found, change=0.05, kl=0.003)


def test_float8_cache_keeps_what_smollm2_says(
    smollm2: RealModel, smollm2_in_float32: LogProbabilities, smollm2_windows: Windows
) -> None:
    engine = engine_of(smollm2.path)
    round_cache(engine)
    found = smollm2_in_float32.difference(engine, smollm2_windows)
    assert found.mean_kl > 1e-6, "the cache was rounded"
    assert_keeps_answers(found, change=0.15, kl=0.02)


def round_cache(engine: Engine) -> None:
    assert isinstance(engine.runner, ModelRunner)
    engine.runner.backend = Float8Rounding(engine.runner.backend)
