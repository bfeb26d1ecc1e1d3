"""Which architectures have an implementation of their own; all others go through `GenericDecoder`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engine.device.collectives import Group
from engine.models.decoder import NativeDecoder


def _gpt2(config: Any, group: Group) -> NativeDecoder:
    from engine.models.gpt2 import GPT2

    return GPT2(config, group)


def _gptj(config: Any, group: Group) -> NativeDecoder:
    from engine.models.gptj import GPTJ

    return GPTJ(config, group)


def _falcon(config: Any, group: Group) -> NativeDecoder:
    from engine.models.falcon import Falcon

    return Falcon(config, group)


def _llama(config: Any, group: Group) -> NativeDecoder:
    from engine.models.llama import Llama

    return Llama(config, group)


def _gemma(config: Any, group: Group) -> NativeDecoder:
    from engine.models.gemma import Gemma

    return Gemma(config, group)


# By transformers' `model_type`, for a configuration and the ranks that share the model. Classes are imported when
# they are needed.
NATIVE: dict[str, Callable[[Any, Group], NativeDecoder]] = {
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
