"""How much a workload has to compute and to read at the very least, on any engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.workload import WorkloadRequest

Shape = tuple[int, int]
"""Inputs and outputs of a linear layer."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """A decoder as far as its arithmetic goes."""

    linears: Mapping[Shape, int]
    """How many linear layers there are of each shape, the head aside."""

    head: Shape
    attention_layers: int
    attention_width: int
    """Of the queries of a layer, over all heads."""

    @property
    def weights(self) -> int:
        """Numbers that every step reads."""
        return sum(inputs * outputs * count for (inputs, outputs), count in self.linears.items()) + _size(self.head)


def geometry(config: Any) -> Geometry:
    """From a transformers configuration, by building the model without memory."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    shapes: Counter[Shape] = Counter()
    for module in model.modules():
        if module is head:
            continue
        if isinstance(module, torch.nn.Linear):
            shapes[module.in_features, module.out_features] += 1
        elif isinstance(module, Conv1D):
            inputs, outputs = module.weight.shape
            shapes[inputs, outputs] += 1
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Geometry(
        dict(shapes),
        (head.in_features, head.out_features),
        config.num_hidden_layers,
        config.num_attention_heads * head_dim,
    )


@dataclass(frozen=True, slots=True)
class Work:
    """What a workload takes with every prefix computed once and every weight read once a step."""

    prompt_tokens: int
    """That run through the model."""

    decode_tokens: int
    """Generated ones that run through it: the last of each request does not."""

    output_tokens: int
    steps: int
    attention_flops: int

    @classmethod
    def of(cls, model: Geometry, requests: Sequence[WorkloadRequest], shared_prefix: int) -> Work:
        looks = sum(
            _triangle(len(request.prompt) + request.max_tokens - 1) - _triangle(shared_prefix) for request in requests
        ) + _triangle(shared_prefix)
        return cls(
            sum(len(request.prompt) for request in requests) - shared_prefix * (len(requests) - 1),
            sum(request.max_tokens - 1 for request in requests),
            sum(request.max_tokens for request in requests),
            max(request.max_tokens for request in requests),
            # A product with a key, and one with a value; each a multiplication and an addition.
            4 * model.attention_width * model.attention_layers * looks,
        )

    def flops(self, model: Geometry) -> int:
        """All of it."""
        linears = model.weights - _size(model.head)
        tokens = self.prompt_tokens + self.decode_tokens
        return 2 * linears * tokens + 2 * _size(model.head) * self.output_tokens + self.attention_flops


def _size(shape: Shape) -> int:
    return shape[0] * shape[1]


def _triangle(tokens: int) -> int:
    """How many positions `tokens` tokens look at, each at itself and all before it."""
    return tokens * (tokens + 1) // 2
