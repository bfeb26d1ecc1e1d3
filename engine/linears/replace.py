"""Finding the linear layers of a model and replacing them."""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Collection

from torch import nn

from engine.linears.tiled import TiledLinear


def linear_places(model: nn.Module) -> dict[nn.Linear, list[tuple[nn.Module, str]]]:
    """The linear layers of a model, and where each stands: parents, and its name in each.

    Subclasses of `nn.Linear` do more than a linear layer and are left out, as are layers inside of replaced ones.
    """
    places: dict[nn.Linear, list[tuple[nn.Module, str]]] = defaultdict(list)
    for parent in model.modules():
        if not isinstance(parent, TiledLinear):
            for name, child in parent.named_children():
                if type(child) is nn.Linear:
                    places[child].append((parent, name))
    return dict(places)


def return_memory() -> None:
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
