"""Finding what a package's modules offer, so that adding a workload or a rival is adding a file."""

from __future__ import annotations

import importlib
import pkgutil


def offered(package: str, name: str) -> list[object]:
    """The attribute `name` of each module in `package`, in order of the modules' names; raises where one has none."""
    path = importlib.import_module(package).__path__
    modules = sorted(module.name for module in pkgutil.iter_modules(path))
    return [getattr(importlib.import_module(f"{package}.{module}"), name) for module in modules]
