"""A GGUF file: metadata, and tensors that are dequantized as they are read.

    "GGUF" | version | tensors | pairs | key type value ... | name dims type offset ... | padding | data

Everything that the header says of lengths and places is checked against the file, because the header is read of files
from anywhere. The `gguf` package's own reader takes 27 s for a vocabulary of 262,144 tokens, this one 0.2 s; the
package's dequantization is used.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from engine.errors import InvalidWeights, ModelNotFound, UnsupportedModel
from kernels.integers import ceil_div

READABLE = tuple(
    GGMLQuantizationType[name]
    for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
)
"""Types of tensors that are read."""

_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file."""

    name: str
    shape: tuple[int, ...]
    """As torch has it: the last dimension is contiguous."""

    type: GGMLQuantizationType
    offset: int
    """Bytes from the file's beginning."""

    num_bytes: int


class GGUFFile:
    """The header of a GGUF file, and its tensors by name."""

    def __init__(self, path: Path) -> None:
        """Read the header; raises `InvalidWeights` for a damaged file, `UnsupportedModel` for what is not read."""
        self.path = path
        self.metadata: Mapping[str, Any]
        self.tensors: Mapping[str, TensorEntry]
        with _mapped(path) as data:
            reader = _Reader(data)
            try:
                self.metadata, entries = _header(reader)
            except _Damaged as damage:
                raise InvalidWeights(f"{path.name}: {damage}") from None
        parts = self.metadata.get("split.count", 1)
        if isinstance(parts, int) and parts > 1:
            raise UnsupportedModel(f"{path.name} is one of {parts} parts: join them with `llama-gguf-split --merge`")
        unreadable = sorted({entry.type.name for entry in entries} - {type_.name for type_ in READABLE})
        if unreadable:
            first = next(entry.name for entry in entries if entry.type.name == unreadable[0])
            raise UnsupportedModel(
                f"{path.name} holds {first} as {', '.join(unreadable)}; "
                f"readable types are {', '.join(type_.name for type_ in READABLE)}"
            )
        self.tensors = {entry.name: entry for entry in entries}
        size = path.stat().st_size
        for entry in entries:
            end = entry.offset + entry.num_bytes
            if end > size:
                raise InvalidWeights(f"{path.name} is truncated: {entry.name} ends at byte {end} of {size}")

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])

    def read(self, name: str) -> Tensor:
        """Return a whole tensor, in float32 or in the 16 bits that it has in the file."""
        (tensor,) = self.rows(name, math.inf)
        return tensor

    def rows(self, name: str, at_once: float) -> Iterator[Tensor]:
        """Yield a tensor in pieces of whole rows with about `at_once` numbers each."""
        entry = self.tensors[name]
        *outer, columns = entry.shape
        num_rows = math.prod(outer)
        row_bytes = entry.num_bytes // max(num_rows, 1)
        step = num_rows if at_once >= num_rows * columns else max(1, int(at_once) // max(columns, 1))
        with self.path.open("rb") as file:
            file.seek(entry.offset)
            for start in range(0, num_rows, step):
                count = min(step, num_rows - start)
                raw = np.fromfile(file, dtype=np.uint8, count=count * row_bytes)
                if raw.size < count * row_bytes:
                    raise InvalidWeights(f"{self.path.name} became shorter while {name} was read")
                shape = entry.shape if count == num_rows else (count, columns)
                yield _numbers(raw, entry.type, columns).view(shape)


def _numbers(raw: np.ndarray[Any, np.dtype[np.uint8]], type_: GGMLQuantizationType, columns: int) -> Tensor:
    """`[rows, columns]` of blocks as they are in the file."""
    plain = {
        GGMLQuantizationType.F32: torch.float32,
        GGMLQuantizationType.F16: torch.float16,
        GGMLQuantizationType.BF16: torch.bfloat16,
    }
    if type_ in plain:
        return torch.from_numpy(raw).view(plain[type_]).view(-1, columns)
    block, block_bytes = GGML_QUANT_SIZES[type_]
    return torch.from_numpy(dequantize(raw.reshape(-1, columns // block * block_bytes), type_))


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data
    except FileNotFoundError as error:
        raise ModelNotFound(f"there is no file {path}") from error
    except OSError as error:
        raise ModelNotFound(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise InvalidWeights(f"{path.name} is empty") from error


class _Damaged(Exception):
    """What is wrong with a header."""


class _Reader:
    """Values one after another, never beyond the end of the file."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._size = len(data)
        self.place = 0

    def take(self, count: int) -> bytes:
        end = self.place + count
        if end > self._size:
            raise _Damaged(f"truncated or damaged: the header goes on beyond the file's {self._size} bytes")
        taken = self._data[self.place : end]
        self.place = end
        return taken

    def scalars(self, form: str, count: int = 1) -> tuple[Any, ...]:
        return struct.unpack(f"<{count}{form}", self.take(count * struct.calcsize("<" + form)))

    def scalar(self, form: str) -> Any:
        return self.scalars(form)[0]

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode("utf-8", "replace")

    def value(self) -> Any:
        return self._value(self.scalar("I"))

    def _value(self, type_: int) -> Any:
        if type_ in _SCALARS:
            return self.scalar(_SCALARS[type_])
        if type_ == _STRING:
            return self.string()
        if type_ != _ARRAY:
            raise _Damaged(f"damaged: a value of the unknown type {type_} in the metadata")
        item, count = self.scalar("I"), self.scalar("Q")
        if item in _SCALARS:
            return list(self.scalars(_SCALARS[item], count))
        if item == _STRING:
            # A string has at least its length.
            if count * 8 > self._size - self.place:
                raise _Damaged("truncated or damaged: an array is longer than the file")
            return [self.string() for _ in range(count)]
        raise _Damaged(f"damaged: an array of the unknown type {item} in the metadata")


def _header(reader: _Reader) -> tuple[dict[str, Any], list[TensorEntry]]:
    if reader.take(4) != b"GGUF":
        raise _Damaged("no GGUF file: it does not begin with GGUF")
    version = reader.scalar("I")
    if version not in _VERSIONS:
        raise _Damaged(f"GGUF version {version}; versions {' and '.join(map(str, _VERSIONS))}, little-endian, are read")
    num_tensors, num_pairs = reader.scalars("Q", 2)
    metadata: dict[str, Any] = {}
    for _ in range(num_pairs):
        key = reader.string()
        metadata[key] = reader.value()
    if not isinstance(metadata.get("general.architecture"), str):
        raise _Damaged("the metadata lacks general.architecture")
    found = [_tensor(reader) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise _Damaged(f"damaged: general.alignment is {alignment!r}")
    start = ceil_div(reader.place, alignment) * alignment
    entries = [TensorEntry(name, shape, type_, start + offset, size) for name, shape, type_, offset, size in found]
    if len({entry.name for entry in entries}) < len(entries):
        raise _Damaged("damaged: it holds two tensors of one name")
    return metadata, entries


def _tensor(reader: _Reader) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int, int]:
    name = reader.string()
    num_dimensions = reader.scalar("I")
    if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
        raise _Damaged(f"damaged: {name} has {num_dimensions} dimensions")
    shape = tuple(reversed(reader.scalars("Q", num_dimensions)))
    number, offset = reader.scalar("I"), reader.scalar("Q")
    try:
        type_ = GGMLQuantizationType(number)
    except ValueError:
        raise _Damaged(f"{name} is of a type that is not known, number {number}") from None
    block, block_bytes = GGML_QUANT_SIZES[type_]
    if 0 in shape or shape[-1] % block:
        raise _Damaged(f"damaged: {name} has the shape {list(shape)}, which is no number of {type_.name} blocks")
    return name, shape, type_, offset, math.prod(shape) // block * block_bytes
