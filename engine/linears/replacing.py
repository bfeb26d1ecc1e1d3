"""Finding the linear layers of a model and exchanging them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection

from torch import nn


def replace_linears(model: nn.Module, make: Callable[[nn.Linear], nn.Module | None]) -> None:
    """Put `make(linear)` in the place of each linear layer, unless it is None.

    A layer that stands in several places is made once. Subclasses of `nn.Linear` do more than a linear layer and stay.
    """
    made: dict[nn.Module, nn.Module | None] = {}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not nn.Linear:
                continue
            if child not in made:
                made[child] = make(child)
            replacement = made[child]
            if replacement is not None:
                setattr(parent, name, replacement)
                _return_memory()


def _return_memory() -> None:
    """Let the C library give freed weights back at once: what it keeps would count beside the packed ones."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
    if trim is not None:
        trim(0)


def tied_embeddings(model: nn.Module, linear: nn.Linear) -> list[nn.Embedding]:
    """The embeddings that use the layer's weight too."""
    return [module for module in model.modules() if isinstance(module, nn.Embedding) and module.weight is linear.weight]


def replace_embeddings(model: nn.Module, embeddings: Collection[nn.Module], replacement: nn.Module) -> None:
    """Put one module in the place of each of the embeddings."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in embeddings:
                setattr(parent, name, replacement)
