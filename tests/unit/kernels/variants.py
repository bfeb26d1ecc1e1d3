"""Which launches are compiled ahead of time: every kernel, in shapes for which the tables say different things."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kernels.decode_step import DecodeInputs, RowSampling, advance_launch, prepare_launch
from kernels.device import Device
from kernels.expert_mlp import product_launch, product_tiles, sum_launch
from kernels.expert_routing import Routing, blocks_bound, num_chunks, route_launches
from kernels.gated_activation import ACTIVATIONS, gated_activation_launch
from kernels.launch import Launch
from kernels.layer_norm import layer_norm_launch
from kernels.log_probs import log_probs_launch
from kernels.penalties import penalties_launch
from kernels.quantized_matmul import KINDS, quantized_matmul_launch, quantized_weight
from kernels.rms_norm import rms_norm_launch
from kernels.rotary import rotate_launch
from kernels.sampling_rows import MAX_CANDIDATES, sample_launch
from kernels.sampling_splits import split_launches
from tests.unit.kernels.attention_variants import (
    GPT_OSS,
    LLAMA,
    MODEL_HEADS,
    SHAPES,
    Heads,
    attend_shared,
    decode,
    empty,
    find_shared,
    ints,
    plan,
    plan_blocks,
    prefill,
    write,
)


def rotate(device: Device, interleaved: bool) -> Launch:
    heads, angles = empty(64, 40, 128), empty(64, 1, 64)
    return rotate_launch(heads, angles, angles, heads, interleaved=interleaved, target=device)


def sampling(rows: int) -> tuple[Tensor, ...]:
    """Parameters of so many rows."""
    numbers, whole = empty(rows, dtype=torch.float32), longs(rows)
    return numbers, whole, numbers, numbers, whole, whole, whole


def sample(device: Device, dtype: torch.dtype, random: bool, filtered: bool) -> Launch:
    rows = 64
    return sample_launch(
        empty(rows, 128256, dtype=dtype),
        sampling(rows) if random else None,
        (ints(rows, MAX_CANDIDATES), empty(rows, MAX_CANDIDATES, dtype=torch.float32)) if filtered else None,
        empty(rows, dtype=torch.int64),
        filtered=filtered,
        target=device,
    )


def sample_split(device: Device, random: bool, filtered: bool, which: int) -> Launch:
    logits, parameters = empty(4, 128256), sampling(4) if random else None
    return split_launches(logits, parameters, longs(4), filtered=filtered, parts=8, target=device)[which]


def norm(device: Device, size: int, kind: str, residual: bool) -> Launch:
    x, weight = empty(64, size), empty(size)
    second = x if residual else None
    if kind == "layer":
        return layer_norm_launch(x, second, weight, weight, x, second, eps=1e-5, target=device)
    return rms_norm_launch(x, second, weight, x, second, eps=1e-5, offset=1.0, target=device)


def head_norm(device: Device) -> Launch:
    x = empty(64, 32, 128)
    return rms_norm_launch(x, None, empty(128), x, None, eps=1e-5, offset=0.0, target=device)


def gate(activation: str) -> Launch:
    return gated_activation_launch(empty(64, 8192), empty(64, 4096), activation)


def longs(*shape: int) -> Tensor:
    return empty(*shape, dtype=torch.int64)


def prepare(samples: bool) -> Launch:
    inputs = DecodeInputs(*(longs(64) for _ in range(4)), seq_lens=ints(64))
    real = empty(64, dtype=torch.float32)
    sampling = RowSampling(real, longs(64), real, real, *(longs(64) for _ in range(3))) if samples else None
    return prepare_launch(longs(300, 19), longs(64), ints(64, 512), longs(1), inputs, sampling, 64, 64_000)


def advance() -> Launch:
    goes_on = empty(64, dtype=torch.bool)
    return advance_launch(longs(300, 19), longs(64), longs(64), longs(16, 512), goes_on, longs(1))


def log_probabilities() -> Launch:
    numbers = empty(64, dtype=torch.float32)
    return log_probs_launch(empty(64, 128256, dtype=torch.float32), empty(64, dtype=torch.int64), numbers, numbers)


def penalties() -> Launch:
    entries, numbers = empty(999, dtype=torch.int64), empty(64, dtype=torch.float32)
    return penalties_launch(
        empty(64, 128256, dtype=torch.float32), entries, entries, entries, numbers, numbers, numbers
    )


@dataclass(frozen=True)
class Mixture:
    """A shape of a mixture of experts."""

    tokens: int
    experts: int = 128
    per_token: int = 8
    hidden: int = 2048
    inner: int = 768
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        parts = [f"{self.tokens}x{self.per_token}/{self.experts}", f"{self.hidden}-{self.inner}"]
        parts += [str(self.dtype).removeprefix("torch.")] * (self.dtype is not torch.bfloat16)
        return " ".join(parts)


MANY_HEADS = "gpt2-large, blocks of 64"
"""Whose programs take several heads where rows are many."""

QWEN3_MOE = Mixture(64)
MIXTURES = (
    QWEN3_MOE,
    Mixture(2048),
    Mixture(8192, 8, 2, 4096, 14336),
    Mixture(512, 8, 2, 4096, 14336),
    Mixture(1, 8, 2, 4096, 14336, torch.float16),
    Mixture(100, 60, 4, 1000, 328, torch.float32),
)


def routing(mixture: Mixture, device: Device) -> Routing:
    pairs = mixture.tokens * mixture.per_token
    rows = product_tiles(pairs, mixture.experts, mixture.dtype, device).rows
    bound = blocks_bound(pairs, mixture.experts, rows)
    choices = (mixture.tokens, mixture.per_token)
    return Routing(
        empty(*choices, dtype=torch.float32), ints(*choices), ints(bound * rows), ints(bound), ints(bound), rows
    )


def routes(mixture: Mixture, device: Device, which: int) -> Launch:
    logits = empty(mixture.tokens, mixture.experts, dtype=mixture.dtype)
    counts = ints(num_chunks(mixture.tokens), mixture.experts)
    return route_launches(logits, routing(mixture, device), counts, normalized=True, target=device)[which]


def product(mixture: Mixture, device: Device, gated: bool) -> Launch:
    pairs, hidden, inner = mixture.tokens * mixture.per_token, mixture.hidden, mixture.inner
    x, out = (mixture.tokens, hidden), (pairs, inner)
    if not gated:
        x, out = out, (pairs, hidden)
    return product_launch(
        empty(*x, dtype=mixture.dtype),
        empty(mixture.experts, out[1] * (1 + gated), x[1], dtype=mixture.dtype),
        routing(mixture, device),
        empty(*out, dtype=mixture.dtype),
        product_tiles(pairs, mixture.experts, mixture.dtype, device),
        activation="silu" if gated else None,
        target=device,
    )


def expert_sum(mixture: Mixture, device: Device) -> Launch:
    results = empty(mixture.tokens * mixture.per_token, mixture.hidden, dtype=mixture.dtype)
    out = empty(mixture.tokens, mixture.hidden, dtype=mixture.dtype)
    return sum_launch(results, routing(mixture, device).weights, out)


@dataclass(frozen=True)
class QuantizedProduct:
    """A shape of the product with quantized weights."""

    kind: str
    rows: int = 8
    inputs: int = 4096
    group_size: int = 128
    ordered: bool = False
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        parts = [f"{self.kind}-{self.rows}x{self.inputs}", f"g{self.group_size}"] + ["ordered"] * self.ordered
        return "-".join(parts + [str(self.dtype).removeprefix("torch.")] * (self.dtype is not torch.bfloat16))


QUANTIZED = tuple(QuantizedProduct(kind) for kind in KINDS)
MORE_QUANTIZED = (
    *[QuantizedProduct(kind, rows=2048) for kind in KINDS],
    QuantizedProduct("int4", rows=48, dtype=torch.float16, ordered=True),
    QuantizedProduct("int4", rows=48, inputs=1000, group_size=48),
    QuantizedProduct("int8", rows=48, group_size=32, dtype=torch.float32),
    QuantizedProduct("e4m3", rows=2048, inputs=1000, group_size=1000, dtype=torch.float32),
)


def quantized_product(shape: QuantizedProduct, device: Device) -> Launch:
    groups = -(-shape.inputs // shape.group_size)
    is_float = shape.kind == "e4m3"
    weight = quantized_weight(
        empty(4096, shape.inputs, dtype=torch.uint8),
        empty(groups, 4096, dtype=torch.float32 if is_float else torch.float16),
        None if is_float else empty(groups, 4096, dtype=torch.int16),
        ints(shape.inputs) if shape.ordered else None,
        kind=shape.kind,
        group_size=shape.group_size,
    )
    x, out = empty(shape.rows, shape.inputs, dtype=shape.dtype), empty(shape.rows, 4096, dtype=shape.dtype)
    return quantized_matmul_launch(x, weight, empty(4096, dtype=shape.dtype), out, target=device)


@dataclass(frozen=True)
class Variant:
    """One launch to compile for one device."""

    name: str
    device: str
    make: Callable[[], Launch]

    @property
    def key(self) -> str:
        """Name and device."""
        return f"{self.name}, {self.device}"


def all_variants(devices: Mapping[str, Device]) -> Iterator[Variant]:
    """Every kernel, in every shape, for every device."""
    for device_name, device in devices.items():
        for name, make in _launches(device, SHAPES, MIXTURES, QUANTIZED + MORE_QUANTIZED):
            yield Variant(name, device_name, make)


def recorded_variants(devices: Mapping[str, Device]) -> Iterator[Variant]:
    """Every kernel: on Hopper in every shape, with attention of the benchmarks' models; in one shape elsewhere."""
    yield from all_variants({"sm_90": devices["sm_90"]})
    for name, heads in MODEL_HEADS.items():
        yield Variant(f"decode {name}", "sm_90", partial(decode, heads, devices["sm_90"], 0))
        yield Variant(f"prefill {name}", "sm_90", partial(prefill, heads, devices["sm_90"]))
        for what, make in _sharing(heads, devices["sm_90"]):
            yield Variant(f"{what} {name}", "sm_90", make)
    heads = MODEL_HEADS[MANY_HEADS]
    yield Variant(f"decode {MANY_HEADS}, 4,096 rows", "sm_90", partial(decode, heads, devices["sm_90"], 0, rows=4096))
    for device_name, device in devices.items():
        if device_name != "sm_90":
            for name, make in _launches(device, (GPT_OSS,), (QWEN3_MOE,), QUANTIZED):
                yield Variant(name, device_name, make)
            for what, make in _sharing(LLAMA, device):
                yield Variant(f"{what} {LLAMA.name}", device_name, make)


def _sharing(heads: Heads, device: Device) -> Iterator[tuple[str, Callable[[], Launch]]]:
    """The launches of decodes whose sequences may share a prefix."""
    yield "shared decode", partial(decode, heads, device, 0, shares=True)
    yield "shared join", partial(decode, heads, device, 1, shares=True)
    yield "shared plan", partial(plan, heads, device, shares=True)
    yield "shared prefix", partial(attend_shared, heads, device)
    yield "find shared prefixes", partial(find_shared, heads, device)


def _launches(
    device: Device, shapes: Sequence[Heads], mixtures: Sequence[Mixture], quantized: Sequence[QuantizedProduct]
) -> Iterator[tuple[str, Callable[[], Launch]]]:
    for heads in shapes:
        yield f"decode {heads.name}", partial(decode, heads, device, 0)
        yield f"plan decodes {heads.name}", partial(plan, heads, device)
        yield f"prefill {heads.name}", partial(prefill, heads, device)
        yield f"plan prefills {heads.name}", partial(plan_blocks, heads, device)
        yield f"write {heads.name}", partial(write, heads, device, False)
        yield f"turn and write {heads.name}", partial(write, heads, device, True)
    for shape in quantized:
        yield f"quantized product {shape.name}", partial(quantized_product, shape, device)
    for mixture in mixtures:
        yield f"choose experts {mixture.name}", partial(routes, mixture, device, 0)
        yield f"arrange experts {mixture.name}", partial(routes, mixture, device, 1)
        yield f"experts' gates {mixture.name}", partial(product, mixture, device, True)
        yield f"experts' outputs {mixture.name}", partial(product, mixture, device, False)
        yield f"sum of experts {mixture.name}", partial(expert_sum, mixture, device)
    yield "sample, filtered", partial(sample, device, torch.float32, True, True)
    yield "sample", partial(sample, device, torch.float32, True, False)
    yield "greedy", partial(sample, device, torch.bfloat16, False, False)
    split = partial(partial, sample_split, device)
    yield "maxima of parts, filtered", split(True, True, 0)
    yield "masses of tiles, filtered", split(True, True, 1)
    yield "choose from parts, filtered", split(True, True, 2)
    yield "masses of tiles", split(True, False, 1)
    yield "choose from parts", split(True, False, 2)
    yield "maxima of parts, greedy", split(False, False, 0)
    yield "choose from parts, greedy", split(False, False, 1)
    for size in (768, 4096, 16384):
        yield f"RMS norm of {size}", partial(norm, device, size, "rms", False)
    yield "RMS norm of heads", partial(head_norm, device)
    yield "add and RMS norm", partial(norm, device, 4096, "rms", True)
    yield "layer norm", partial(norm, device, 1280, "layer", False)
    yield "add and layer norm", partial(norm, device, 1280, "layer", True)
    for activation in ACTIVATIONS:
        yield f"gate by {activation}", partial(gate, activation)
    yield "prepare decode, greedy", partial(prepare, False)
    yield "prepare decode", partial(prepare, True)
    yield "advance decode", advance
    yield "log-probabilities", log_probabilities
    yield "penalties", penalties
    yield "turn and write, interleaved", partial(write, LLAMA, device, True, True)
    for heads in (LLAMA, Heads(4, 1, 256, 256), Heads(16, 8, block_size=64, kv_dtype=torch.float8_e4m3fn)):
        yield f"normalize, turn and write {heads.name}", partial(write, heads, device, True, normalizes=True)
    for interleaved in (False, True):
        yield f"turn {'interleaved' if interleaved else 'halves'}", partial(rotate, device, interleaved)
