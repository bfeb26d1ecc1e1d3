"""A model's files: in a directory, or from the Hugging Face hub.

Only safetensors are ever loaded (pickled checkpoints can run code), and no Python from a model's repository runs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.errors import ModelNotFound, UnsupportedModel

_INDEX = "model.safetensors.index.json"

# Weights for the whole model at the top of the repository, its configuration and its tokenizer.
_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
_UNWANTED = ["*/*", "consolidated*"]


def resolve_model(path_or_id: str | Path) -> Path:
    """The directory that holds the model's files, downloaded into the hub's cache where it is no directory yet.

    Honours `HF_ENDPOINT`, `HF_HOME`, `HF_TOKEN`, `HF_HUB_OFFLINE`. Raises `ModelNotFound`.
    """
    directory = Path(path_or_id).expanduser()
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise ModelNotFound(f"{directory} holds no config.json")
        return directory
    name = str(path_or_id)
    if directory.exists():
        raise ModelNotFound(f"{name} is a file: give the directory that holds config.json and the weights")
    if directory.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelNotFound(f"there is no directory {name}")
    return _download(name)


def _download(model_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        directory = Path(snapshot_download(model_id, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except HFValidationError as error:
        raise ModelNotFound(f"{model_id!r} is neither a directory nor the id of a model on the hub") from error
    except GatedRepoError as error:
        raise ModelNotFound(f"access to {model_id} on the hub is restricted: set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise ModelNotFound(f"the hub has no model {model_id}, or it is private: set HF_TOKEN") from error
    except LocalEntryNotFoundError as error:
        raise ModelNotFound(
            f"{model_id} is not a directory, is not in the hub's cache, and the hub cannot be reached"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise ModelNotFound(f"downloading {model_id} from the hub failed: {error}") from error
    if not (directory / "config.json").is_file():
        raise ModelNotFound(f"{model_id} on the hub holds no config.json")
    return directory


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that hold the model's weights, each to be read once. Raises `ModelNotFound`."""
    index = directory / _INDEX
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise ModelNotFound(f"{_INDEX} names files that are not in {directory}: {', '.join(missing)}")
        return [directory / name for name in names]
    files = sorted(path for path in directory.glob("*.safetensors") if not path.name.startswith("consolidated"))
    if files:
        return files
    pickled = sorted(path.name for path in directory.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickled:
        raise ModelNotFound(
            f"{directory} has its weights in {pickled[0]} only: pickled checkpoints can run code and are not loaded; "
            "convert them to safetensors"
        )
    raise ModelNotFound(f"{directory} holds no *.safetensors file")


def load_config(directory: Path) -> Any:
    """transformers' configuration of the model. Raises `UnsupportedModel`."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:
        raise UnsupportedModel(f"the configuration in {directory} cannot be read: {error}") from error
    return config


def eos_token_ids(directory: Path, config: Any) -> frozenset[int]:
    """Tokens that end a completion: of generation_config.json, or else of config.json."""
    path = directory / "generation_config.json"
    generation = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    ids = generation.get("eos_token_id")
    if ids is None:
        ids = config.eos_token_id
    if ids is None:
        return frozenset()
    return frozenset(ids) if isinstance(ids, list) else frozenset({ids})
