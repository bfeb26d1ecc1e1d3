"""Which model a name on the command line means."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

DEMO = "demo"


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model is, and the name that clients ask for it by."""

    location: str  # a directory, or the id of a model on the Hugging Face hub
    served_name: str


def resolve(name: str, served_name: str | None = None) -> ModelSource:
    """`demo` is the model that ships with Pagemill, an existing directory is itself, anything else is a hub id."""
    if name == DEMO:
        return ModelSource(str(files("demo") / "model"), served_name or DEMO)
    directory = Path(name).expanduser()
    if directory.is_dir():
        return ModelSource(str(directory), served_name or directory.resolve().name)
    return ModelSource(name, served_name or name)
