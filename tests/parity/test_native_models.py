"""The natively implemented architectures against transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText

from engine import Engine, EngineConfig
from engine.attention.cpu import CpuAttention
from engine.execution.model_runner import ModelRunner
from engine.models.registry import NATIVE as NATIVE_TYPES
from kernels.cpu.library import CpuKernelsUnavailable, library
from tests.parity.comparing import (
    assert_close,
    assert_same,
    generate_with_preemptions,
    greedy,
    ragged_prompts,
    reference_greedy,
)
from tests.parity.conftest import NUM_TOKENS, Saved
from tests.parity.tiny_models import NATIVE, TinyModel

Save = Callable[..., Saved]

every_model = pytest.mark.parametrize("model", NATIVE, ids=lambda model: model.name)


def engine(saved: Saved, **options: Any) -> Engine:
    config = EngineConfig(device="cpu", num_kv_blocks=options.pop("num_kv_blocks", 4096), **options)
    return Engine.from_pretrained(saved.directory, config)


def test_every_native_type_is_compared() -> None:
    # The multimodal Gemma 3 has a test of its own.
    assert {model.model_type for model in NATIVE} | {"gemma3"} == set(NATIVE_TYPES)


@every_model
def test_float32_tokens_are_equal(model: TinyModel, saved: Save) -> None:
    it = saved(model)
    tried = engine(it)
    assert_same(tried.generate(it.prompts, greedy(NUM_TOKENS)), it.references)
    # The second time, prompts come from the prefix cache.
    again = tried.generate(it.prompts, greedy(NUM_TOKENS))
    assert sum(output.cached_tokens for output in again) > 100
    assert_same(again, it.references)


@every_model
def test_last_layer_computes_only_the_last_tokens_of_prompts(model: TinyModel, saved: Save) -> None:
    it = saved(model)
    tried = engine(it, enable_prefix_caching=False)
    assert isinstance(tried.runner, ModelRunner)
    layers = tried.runner.model.get_submodule("layers")
    assert isinstance(layers, torch.nn.ModuleList)
    rows: list[list[int]] = [[] for _ in layers]
    for index, layer in enumerate(layers):
        # Its input, with attention added, and what else it adds.
        layer.register_forward_hook(lambda _, __, output, index=index: rows[index].extend(map(len, output)))
    tried.generate(it.prompts, greedy(1))
    assert [sum(counts) for counts in rows[:-1]] == [2 * sum(map(len, it.prompts))] * (len(layers) - 1)
    assert sum(rows[-1]) == 2 * len(it.prompts)


@every_model
def test_plain_torch_gives_the_same_tokens(model: TinyModel, saved: Save) -> None:
    it = saved(model)
    assert_same(engine(it, attention="torch").generate(it.prompts, greedy(NUM_TOKENS)), it.references)


def test_compared_models_run_the_cpp_kernels(saved: Save) -> None:
    try:
        library()
    except CpuKernelsUnavailable as error:
        pytest.skip(str(error))
    runner = engine(saved(NATIVE[0])).runner
    assert isinstance(runner, ModelRunner)
    assert isinstance(runner.backend, CpuAttention)


@every_model
def test_chunks_preemptions_and_blocks_of_one_change_nothing(model: TinyModel, saved: Save) -> None:
    it = saved(model)
    tried = engine(it, block_size=1, max_num_batched_tokens=8, num_kv_blocks=400, enable_prefix_caching=False)
    assert_same(generate_with_preemptions(tried, it.prompts, greedy(NUM_TOKENS)), it.references)


@every_model
@pytest.mark.slow
@pytest.mark.parametrize("prefix_caching", [False, True], ids=["plain", "prefixes"])
@pytest.mark.parametrize("budget", [8, 512])
@pytest.mark.parametrize("block_size", [1, 16, 64])
def test_every_shape_gives_the_same_tokens(
    model: TinyModel, saved: Save, block_size: int, budget: int, prefix_caching: bool
) -> None:
    it = saved(model)
    tried = engine(
        it,
        block_size=block_size,
        max_num_batched_tokens=budget,
        enable_prefix_caching=prefix_caching,
        num_kv_blocks=-(-1000 // block_size),
    )
    assert_same(generate_with_preemptions(tried, it.prompts, greedy(NUM_TOKENS)), it.references)


@pytest.mark.parametrize(
    "model",
    [
        model if model.name in ("gpt2", "llama", "gemma2") else pytest.param(model, marks=pytest.mark.slow)
        for model in NATIVE
    ],
    ids=lambda model: model.name,
)
def test_bfloat16_parts_only_where_tokens_are_close(model: TinyModel, saved: Save) -> None:
    it = saved(model, torch.bfloat16)
    tried = engine(it)
    assert isinstance(tried.runner, ModelRunner)
    assert tried.runner.dtype is torch.bfloat16
    assert_close(tried.generate(it.prompts, greedy(NUM_TOKENS)), it.references)


def test_text_part_of_a_multimodal_gemma_runs(tmp_path: Path) -> None:
    text = next(model for model in NATIVE if model.name == "gemma3").make_config()
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = AutoConfig.for_model("gemma3", text_config=text.to_dict(), vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.02 if "embed" in name else 2 / parameter.shape[-1] ** 0.5)
        model.save_pretrained(tmp_path)
        references = reference_greedy(model, ragged_prompts(lengths=(5, 30)), NUM_TOKENS)
    assert any("vision" in name for name in load_file(tmp_path / "model.safetensors"))
    tried = Engine.from_pretrained(tmp_path, EngineConfig(device="cpu", num_kv_blocks=64))
    outputs = tried.generate([reference.prompt for reference in references], greedy(NUM_TOKENS))
    assert_same(outputs, references)
