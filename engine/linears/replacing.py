"""Finding the linear layers of a model and exchanging them."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def replace_linears(model: nn.Module, make: Callable[[nn.Linear], nn.Module | None]) -> int:
    """Put `make(linear)` in the place of each linear layer, unless it is None; returns how many were exchanged.

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
    return sum(replacement is not None for replacement in made.values())


def is_tied(model: nn.Module, linear: nn.Linear) -> bool:
    """Whether an embedding of the model uses the layer's weight too."""
    return any(isinstance(module, nn.Embedding) and module.weight is linear.weight for module in model.modules())
