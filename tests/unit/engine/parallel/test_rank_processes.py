"""Ranks that are processes, joined by gloo: what they compute, and how they end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from engine import Engine, EngineConfig, RequestOutput, SamplingParams
from engine.errors import EngineFailed
from engine.parallel.processes import RankProcesses
from engine.parallel.runner import TensorParallelRunner
from tests.parity.comparing import ragged_prompts
from tests.parity.tiny_models import NATIVE
from tests.support.processes import await_gone

PROMPTS = ragged_prompts(lengths=(5, 30))
GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    next(model for model in NATIVE if model.name == "llama").save(directory)
    return directory


def config(ranks: int) -> EngineConfig:
    return EngineConfig(device="cpu", num_kv_blocks=256, tensor_parallel_size=ranks)


def rank_pids(engine: Engine) -> list[int]:
    assert isinstance(engine.runner, TensorParallelRunner)
    assert isinstance(engine.runner._ranks, RankProcesses)
    return engine.runner._ranks.pids


@pytest.fixture
def engine(model: Path) -> Iterator[Engine]:
    made = Engine.from_pretrained(model, config(2))
    yield made
    made.close()


def token_ids(outputs: list[RequestOutput]) -> list[tuple[int, ...]]:
    return [tuple(output.token_ids) for output in outputs]


def finish(engine: Engine) -> None:
    while engine.has_unfinished:
        engine.step()


def test_rank_process_computes_its_part_and_its_death_is_engine_failed(model: Path, engine: Engine) -> None:
    expected = Engine.from_pretrained(model, config(1)).generate(PROMPTS, GREEDY)
    assert token_ids(engine.generate(PROMPTS, GREEDY)) == token_ids(expected)
    engine.raise_if_broken()
    [pid] = rank_pids(engine)
    rank = psutil.Process(pid)
    engine.add("again", PROMPTS[0], GREEDY)
    engine.step()
    rank.kill()
    with pytest.raises(EngineFailed, match="rank 1 ended: by signal 9"):
        finish(engine)
    with pytest.raises(EngineFailed, match="rank 1 ended"):
        engine.raise_if_broken()
    await_gone([rank])
