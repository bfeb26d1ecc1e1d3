"""Which architectures have an implementation of their own; all others go through `GenericDecoder`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engine.models.decoder import NativeDecoder


def _gpt2(config: Any) -> NativeDecoder:
    from engine.models.gpt2 import GPT2

    return GPT2(config)


def _gptj(config: Any) -> NativeDecoder:
    from engine.models.gptj import GPTJ

    return GPTJ(config)


def _falcon(config: Any) -> NativeDecoder:
    from engine.models.falcon import Falcon

    return Falcon(config)


def _llama(config: Any) -> NativeDecoder:
    from engine.models.llama import Llama

    return Llama(config)


def _gemma(config: Any) -> NativeDecoder:
    from engine.models.gemma import Gemma

    return Gemma(config)


# By transformers' `model_type`. Classes are imported when they are needed.
NATIVE: dict[str, Callable[[Any], NativeDecoder]] = {
    "falcon": _falcon,
    "gemma2": _gemma,
    "gemma3": _gemma,
    "gemma3_text": _gemma,
    "gpt2": _gpt2,
    "gptj": _gptj,
    "llama": _llama,
    "mistral": _llama,
    "mixtral": _llama,
    "phi3": _llama,
    "qwen2": _llama,
    "qwen3": _llama,
    "qwen3_moe": _llama,
}
