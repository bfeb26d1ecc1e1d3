"""A KV cache of float8 in the engine: the tokens of plain torch that rounds keys and values as it does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import Engine, EngineConfig, SamplingParams
from engine.attention import make_backend, plain
from engine.errors import ModelError
from engine.execution.model_runner import ModelRunner
from kernels import device as kernels_device
from kernels.float8 import dequantize_reference, quantize_reference
from tests.parity.tiny_models import NATIVE

ON_GPU = torch.cuda.is_available() and not kernels_device.interprets()
PROMPTS = [list(range(3, 20)), [7], [*range(3, 12), 99]]
# Rotations that round otherwise may take a key to the neighbour of its float8 number.
TOLERANCE = 0.005


def generate(directory: Path, **options: Any) -> tuple[list[list[int]], Tensor]:
    """Tokens, and their log-probabilities."""
    config = EngineConfig(device="cuda" if ON_GPU else "cpu", num_kv_blocks=64, block_size=8, **options)
    engine = Engine.from_pretrained(directory, config)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=0)
    outputs = engine.generate(PROMPTS, params)
    assert all(output.error is None for output in outputs)
    logprobs = [[entry.logprob for entry in output.completions[0].logprobs or ()] for output in outputs]
    return [list(output.token_ids) for output in outputs], torch.tensor(logprobs)


def rounding(write: Callable[..., None]) -> Callable[..., None]:
    """The write to a cache, of what float8 leaves."""

    def through_float8(numbers: Tensor) -> Tensor:
        rounded, exponents = quantize_reference(numbers)
        return dequantize_reference(rounded[:, None], exponents[..., None])[:, 0].to(numbers.dtype)

    def run(key: Tensor, value: Tensor, *rest: Any) -> None:
        write(through_float8(key), through_float8(value), *rest)

    return run


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_tokens_are_those_of_rounded_keys_and_values(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    next(model for model in NATIVE if model.name == name).save(tmp_path)
    tokens, logprobs = generate(tmp_path, attention="triton", kv_cache_dtype="float8_e4m3", max_num_batched_tokens=16)
    _, exact = generate(tmp_path, attention="torch")
    monkeypatch.setattr(plain, "write_kv_reference", rounding(plain.write_kv_reference))
    expected_tokens, expected = generate(tmp_path, attention="torch")
    assert tokens == expected_tokens
    torch.testing.assert_close(logprobs, expected, atol=TOLERANCE, rtol=0)
    # Rounding is seen, or all this would show nothing.
    assert float((exact - expected).abs().max()) > 10 * TOLERANCE


def test_float8_blocks_take_one_byte_a_number(tmp_path: Path) -> None:
    next(model for model in NATIVE if model.name == "llama").save(tmp_path)

    def runner(**options: Any) -> ModelRunner:
        config = EngineConfig(
            device="cpu", attention="triton", dtype="bfloat16", cpu_kv_cache_bytes=2**20, block_size=8, **options
        )
        return ModelRunner.from_pretrained(tmp_path, config)

    whole, half = runner(), runner(kv_cache_dtype="float8_e4m3")
    # Keys and values take half as much, and scales a byte for each head of either. One block more is there for padding.
    sizes = {(layer.head_dim, layer.value_dim) for layer in whole.model.attention_layers}
    assert len(sizes) == 1
    numbers = sum(sizes.pop())
    assert half.num_blocks + 1 == pytest.approx(2 * numbers / (numbers + 2) * (whole.num_blocks + 1), abs=2)
    taken = [sum(part.nbytes for layer in made.cache.layers for part in layer.tensors) for made in (whole, half)]
    assert min(taken) > 0.9 * 2**20
    assert max(taken) <= 2**20


@pytest.mark.parametrize(
    "options",
    [{"attention": "torch"}, {"attention": "cpu"}, {"device": "cpu"}, {"deterministic": True}],
    ids=lambda options: "-".join(f"{name}-{value}" for name, value in options.items()),
)
def test_float8_cache_is_refused_with_other_attention(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Triton attention only"):
        EngineConfig(kv_cache_dtype="float8_e4m3", **options)


def test_kv_cache_dtype_is_refused_when_unknown() -> None:
    with pytest.raises(ValueError, match="kv_cache_dtype must be one of"):
        EngineConfig(kv_cache_dtype="float8_e5m2")


def test_float8_cache_is_refused_without_a_gpu() -> None:
    with pytest.raises(ModelError, match="Triton attention only"):
        make_backend(EngineConfig(kv_cache_dtype="float8_e4m3"), torch.device("cpu"))
