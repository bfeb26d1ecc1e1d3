"""The models that speed is measured with, in their full size, against transformers and against plain torch."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from bench.models import CONFIGS, model_directory
from bench.workload import workloads
from engine import Engine, EngineConfig
from tests.parity.comparing import assert_close, greedy, reference_greedy

pytestmark = pytest.mark.slow

NUM_TOKENS = 12
LENGTHS = (1, 8, 8, 40)


@pytest.fixture(scope="module", params=sorted({workload.model for workload in workloads().values()}))
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_directory(request.param, tmp_path_factory.mktemp("models"))


def prompts(directory: Path) -> list[list[int]]:
    draw = random.Random(0)
    vocab_size = CONFIGS[directory.name]().vocab_size
    return [[draw.randrange(vocab_size) for _ in range(length)] for length in LENGTHS]


def engine(directory: Path, dtype: str, **options: str) -> Engine:
    return Engine.from_pretrained(directory, EngineConfig(device="cpu", dtype=dtype, num_kv_blocks=64, **options))


def test_float32_tokens_are_equal(directory: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    references = reference_greedy(model, prompts(directory), NUM_TOKENS)
    expected = [reference.token_ids for reference in references]
    del model
    for attention in ("auto", "torch"):
        outputs = engine(directory, "float32", attention=attention).generate(prompts(directory), greedy(NUM_TOKENS))
        assert [list(output.token_ids) for output in outputs] == expected
    assert len({token for tokens in expected for token in tokens}) > len(LENGTHS), "always the same token"


def test_bfloat16_parts_only_where_tokens_are_close(directory: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    references = reference_greedy(model, prompts(directory), NUM_TOKENS)
    del model
    assert_close(engine(directory, "bfloat16").generate(prompts(directory), greedy(NUM_TOKENS)), references)
