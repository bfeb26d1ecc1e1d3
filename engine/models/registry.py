"""Which class runs which architecture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engine.errors import UnsupportedModel
from engine.models.decoder import Decoder


def _gpt2(config: Any) -> Decoder:
    from engine.models.gpt2 import GPT2

    return GPT2(config)


def _llama(config: Any) -> Decoder:
    from engine.models.llama import Llama

    return Llama(config)


def _gemma(config: Any) -> Decoder:
    from engine.models.gemma import Gemma

    return Gemma(config)


NATIVE: dict[str, Callable[[Any], Decoder]] = {
    "gemma2": _gemma,
    "gemma3": _gemma,
    "gemma3_text": _gemma,
    "gpt2": _gpt2,
    "llama": _llama,
    "mistral": _llama,
    "mixtral": _llama,
    "phi3": _llama,
    "qwen2": _llama,
    "qwen3": _llama,
    "qwen3_moe": _llama,
}


def build_model(config: Any) -> Decoder:
    """The model for transformers' configuration, without weights; raises `UnsupportedModel`."""
    build = NATIVE.get(config.model_type)
    if build is None:
        raise UnsupportedModel(f"models of the type {config.model_type!r} are not supported")
    return build(config)
