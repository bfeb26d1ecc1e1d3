"""What a compiled launch depends on, as a hash: the kernel's source with all that it calls, and how it is specialized.

It is the same in the interpreter and where Triton compiles, and does not change with comments, docstrings or line
numbers. So a record of compiled launches can be compared with the code without compiling anything.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import triton.language as tl

from kernels.launch import Launch

POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


def fingerprint(launch: Launch) -> str:
    """Twelve hexadecimal digits."""
    parts = (*source_of(launch.kernel), signature_of(launch), launch.num_warps, launch.num_stages)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def signature_of(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], Any]]:
    """Types, constants and attributes of a launch's arguments, as Triton's launcher would specialize them."""
    types: dict[str, str] = {}
    constants: dict[str, Any] = dict(launch.constants)
    attributes: dict[tuple[int, ...], Any] = {}
    refused = _not_specialized(launch.kernel)
    for place, name in enumerate(inspect.signature(launch.kernel.fn).parameters):
        if name in launch.constants:
            types[name] = "constexpr"
            continue
        value = launch.arguments[name]
        if value is None or (isinstance(value, int) and value == 1 and name not in refused):
            types[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            types[name], is_divisible = POINTERS[value.dtype], True
        elif isinstance(value, float):
            types[name], is_divisible = "fp32", False
        else:
            types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            is_divisible = name not in refused and value % 16 == 0
        if is_divisible:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return types, constants, attributes


def _not_specialized(kernel: Any) -> set[str]:
    params = getattr(kernel, "params", None)
    if params is None or isinstance(params, dict):
        return set(kernel.kwargs.get("do_not_specialize") or ())  # the interpreter's
    return {param.name for param in params if param.do_not_specialize}


@cache
def source_of(kernel: Any) -> tuple[str, ...]:
    """The kernel's source and those of the jitted functions that it calls, and the constants that they read."""
    found: dict[str, str] = {}
    _collect(kernel.fn, found)
    return tuple(f"{name}: {text}" for name, text in sorted(found.items()))


def _collect(function: Callable[..., Any], found: dict[str, str]) -> None:
    name = f"{function.__module__}.{function.__qualname__}"
    if name in found:
        return
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef)
    if ast.get_docstring(definition) is not None:
        del definition.body[0]
    found[name] = ast.dump(definition)
    for used in sorted(set(_names(definition)) & function.__globals__.keys()):
        value = function.__globals__[used]
        if callable(getattr(value, "fn", None)):
            _collect(value.fn, found)
        elif isinstance(value, (int, float, tl.constexpr)):
            found[f"{function.__module__}.{used}"] = repr(value)


def _names(tree: ast.AST) -> Iterator[str]:
    return (node.id for node in ast.walk(tree) if isinstance(node, ast.Name))
