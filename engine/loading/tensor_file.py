"""Tensors in one file that can be mapped: written once, read without a copy.

    magic | header's length | header's SHA-256 | header, as JSON | padding | tensors, each at a multiple of 64 bytes

The header says where each tensor lies and how long the file is, so a file that was cut or overwritten is noticed before
a tensor is looked at. The tensors themselves have no checksum, because to compute it would read all of them.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.integers import ceil_div

_MAGIC = b"PAGEMILL"
_PREFIX = struct.Struct("<8sQ32s")
_ALIGNMENT = 64
_PAGE = 4096


class DamagedFile(Exception):
    """The file is not as it was written; the message says how it differs."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write a new file, down to the disk, with `meta` (JSON) in its header. Raises `OSError`, before anything but the
    header is written where the disk is too full."""
    entries: dict[str, dict[str, Any]] = {}
    end = 0
    for name, tensor in tensors.items():
        offset = ceil_div(end, _ALIGNMENT) * _ALIGNMENT
        dtype = str(tensor.dtype).removeprefix("torch.")
        entries[name] = {"dtype": dtype, "shape": list(tensor.shape), "offset": offset}
        end = offset + tensor.nbytes
    header = json.dumps({"meta": meta, "tensors": entries, "data_bytes": end}).encode()
    start = _data_start(len(header))
    with path.open("xb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, start + end)
        file.write(_PREFIX.pack(_MAGIC, len(header), hashlib.sha256(header).digest()) + header)
        for name, tensor in tensors.items():
            file.seek(start + entries[name]["offset"])
            file.write(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
        file.truncate(start + end)
        file.flush()
        os.fsync(file.fileno())


def map_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file, and its `meta`. Raises `DamagedFile` and `OSError`.

    Processes that map one file share its memory; what one writes to a tensor is a copy of its own.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        header, start = _read_header(file.read(_PREFIX.size), file, size)
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    if hasattr(mmap, "MADV_WILLNEED"):
        data.madvise(mmap.MADV_WILLNEED)
    tensors = {}
    for name, entry in header["tensors"].items():
        shape = torch.Size(entry["shape"])
        offset, dtype = start + entry["offset"], getattr(torch, entry["dtype"])
        tensors[name] = torch.frombuffer(data, dtype=dtype, count=shape.numel(), offset=offset).view(shape)
    return tensors, header["meta"]


def _read_header(prefix: bytes, file: Any, size: int) -> tuple[dict[str, Any], int]:
    """The header, and where the tensors begin."""
    if len(prefix) < _PREFIX.size:
        raise DamagedFile(f"it has {size} bytes only")
    magic, length, digest = _PREFIX.unpack(prefix)
    if magic != _MAGIC:
        raise DamagedFile("it does not begin as these files do")
    encoded = file.read(length) if length <= size else b""
    if hashlib.sha256(encoded).digest() != digest:
        raise DamagedFile("its header does not have its checksum")
    header: dict[str, Any] = json.loads(encoded)
    start = _data_start(length)
    if start + header["data_bytes"] != size:
        raise DamagedFile(f"it has {size} bytes instead of {start + header['data_bytes']}")
    return header, start


def _data_start(header_bytes: int) -> int:
    return ceil_div(_PREFIX.size + header_bytes, _PAGE) * _PAGE
