"""transformers' own model code over our paged attention, and what of it is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from engine import Engine, EngineConfig
from engine.errors import InvalidWeights, UnsupportedModel
from engine.execution.model_runner import ModelRunner
from engine.models.generic import GenericDecoder
from tests.parity.comparing import assert_close, assert_same, generate_with_preemptions, greedy
from tests.parity.conftest import NUM_TOKENS, Saved
from tests.parity.tiny_models import GENERIC, MORE_GENERIC, TinyModel

Save = Callable[..., Saved]

SHAPES = [
    (1, 8, False),
    (1, 512, True),
    (16, 8, True),
    (16, 512, False),
    (64, 8, False),
    (64, 512, True),
]
"""Sizes of blocks and steps, and whether prefixes are cached: each value with each value of the other two."""

STARCODER = next(model for model in GENERIC if model.name == "starcoder2")


def engine(directory: Path, **options: Any) -> Engine:
    return Engine.from_pretrained(directory, EngineConfig(device="cpu", **{"num_kv_blocks": 256, **options}))


def model_of(engine: Engine) -> GenericDecoder:
    assert isinstance(engine.runner, ModelRunner)
    assert isinstance(engine.runner.model, GenericDecoder)
    return engine.runner.model


@pytest.mark.parametrize(
    "model",
    [*GENERIC, *(pytest.param(model, marks=pytest.mark.slow) for model in MORE_GENERIC)],
    ids=lambda model: model.name,
)
def test_float32_tokens_are_equal(model: TinyModel, saved: Save) -> None:
    it = saved(model)
    tried = engine(it.directory, max_num_batched_tokens=40)
    model_of(tried)
    assert_same(generate_with_preemptions(tried, it.prompts, greedy(NUM_TOKENS)), it.references)


@pytest.mark.slow
@pytest.mark.parametrize(("block_size", "budget", "prefix_caching"), SHAPES)
@pytest.mark.parametrize("model", [*GENERIC, *MORE_GENERIC], ids=lambda model: model.name)
def test_every_shape_gives_the_same_tokens(
    model: TinyModel, saved: Save, block_size: int, budget: int, prefix_caching: bool
) -> None:
    it = saved(model)
    tried = engine(
        it.directory,
        block_size=block_size,
        max_num_batched_tokens=budget,
        enable_prefix_caching=prefix_caching,
        num_kv_blocks=-(-1000 // block_size),
    )
    model_of(tried)
    assert_same(generate_with_preemptions(tried, it.prompts, greedy(NUM_TOKENS)), it.references)


@pytest.mark.parametrize(
    "model",
    [
        model if model is STARCODER else pytest.param(model, marks=pytest.mark.slow)
        for model in (*GENERIC, *MORE_GENERIC)
    ],
    ids=lambda model: model.name,
)
def test_bfloat16_parts_only_where_tokens_are_close(model: TinyModel, saved: Save) -> None:
    it = saved(model, torch.bfloat16)
    tried = engine(it.directory)
    assert next(model_of(tried).parameters()).dtype is torch.bfloat16
    assert_close(tried.generate(it.prompts, greedy(NUM_TOKENS)), it.references)


def test_engines_in_one_process_do_not_interact(saved: Save) -> None:
    first, second = (saved(model) for model in GENERIC[:2])
    one, two = engine(first.directory), engine(second.directory)
    for place in range(2):
        one.add(f"{place}", first.prompts[place], greedy(NUM_TOKENS))
        two.add(f"{place}", second.prompts[place], greedy(NUM_TOKENS))
    outputs: list[list[Any]] = [[], []]
    while one.has_unfinished or two.has_unfinished:
        outputs[0] += one.step()
        outputs[1] += two.step()
    for found, it in zip(outputs, (first, second), strict=True):
        assert [list(output.token_ids) for output in found] == [it.references[place].token_ids for place in range(2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", [{"sliding_window": None}, {"sliding_window": 8}, {"scale": 0.1}, {"soft_cap": 1.0}])
def test_wrong_reading_of_the_attention_is_caught_at_load(
    change: dict[str, Any], dtype: torch.dtype, saved: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    import engine.models.generic as generic

    read = generic._layer
    monkeypatch.setattr(generic, "_layer", lambda *args, **options: replace(read(*args, **options), **change))
    with pytest.raises(UnsupportedModel, match=r"starcoder2.*differ from its own"):
        engine(saved(STARCODER, dtype).directory)


def test_mask_that_means_more_than_causality_is_caught(tmp_path: Path) -> None:
    # Doge masks out keys by a learned measure.
    TinyModel("doge", "doge").save(tmp_path)
    with pytest.raises(UnsupportedModel, match=r"doge.*differ from its own"):
        engine(tmp_path)


@pytest.mark.parametrize(
    ("model_type", "options", "says"),
    [
        ("mamba", {}, "recurrent"),
        ("rwkv", {}, "recurrent"),
        ("jamba", {}, "recurrent"),
        ("qwen3_next", {}, "recurrent"),
        ("t5", {}, "encoder-decoder"),
        ("whisper", {}, "encoder-decoder"),
        ("bloom", {}, "ALiBi"),
        ("mpt", {}, "ALiBi"),
        ("falcon", {"alibi": True}, "ALiBi"),
        ("codegen", {}, "does not use the attention interface"),
        ("xglm", {}, "does not use the attention interface"),
        ("llama4_text", {}, "chunked_attention"),
        ("clip", {}, "no causal language model"),
        (
            "olmo2",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "depend on the length",
        ),
    ],
)
def test_unsupported_model_is_refused_before_loading(
    model_type: str, options: dict[str, Any], says: str, tmp_path: Path
) -> None:
    AutoConfig.for_model(model_type, **options).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=f"{model_type}.*{says}"):
        engine(tmp_path, random_weights=True)


def test_bidirectional_models_are_refused(tmp_path: Path) -> None:
    TinyModel("bert", "bert", {"num_attention_heads": 3}).make_config().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="looks ahead"):
        engine(tmp_path, random_weights=True)


def test_missing_and_unknown_weights_are_errors(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    STARCODER.save(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(InvalidWeights, match=r"lacks model\.norm\.weight"):
        engine(tmp_path)
    save_file({**tensors, "model.norm.weight": norm, "model.extra.weight": norm.clone()}, path, {"format": "pt"})
    with pytest.raises(InvalidWeights, match=r"does not know: model\.extra\.weight"):
        engine(tmp_path)
