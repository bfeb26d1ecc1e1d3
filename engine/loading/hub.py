"""A model's files: in a directory, in one GGUF file, or from the Hugging Face hub.

Only safetensors and GGUF are ever loaded (pickled checkpoints can run code), and no Python from a model's repository
runs.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.errors import InvalidWeights, ModelNotFound, UnsupportedModel
from engine.loading.configurations import auto_config

logger = logging.getLogger(__name__)

_INDEX_SUFFIX = ".safetensors.index.json"

# Adapters, and the same weights once more in Mistral's own format.
_NO_MODEL = ("adapter_", "consolidated")

# Weights for the whole model at the top of the repository, its configuration and its tokenizer.
_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
_UNWANTED = ["*/*", "consolidated*"]


_GGUF = ".gguf"


def is_gguf(path: str | Path) -> bool:
    """Whether a name is that of a GGUF file, by its ending."""
    return str(path).lower().endswith(_GGUF)


def resolve_model(path_or_id: str | Path) -> Path:
    """The directory that holds the model's files, or its GGUF file.

    `org/name` and `org/name:file.gguf` are downloaded into the hub's cache, unless there is such a directory or file.

    Honours `HF_ENDPOINT`, `HF_HOME`, `HF_TOKEN`, `HF_HUB_OFFLINE`. Raises `ModelNotFound`.
    """
    directory = Path(path_or_id).expanduser()
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise ModelNotFound(f"{directory} holds no config.json")
        return directory
    name = str(path_or_id)
    if directory.exists():
        if is_gguf(directory):
            return directory
        raise ModelNotFound(f"{name} is a file: give the directory that holds config.json and the weights, or a GGUF")
    repository, colon, file = name.partition(":")
    if colon and is_gguf(file) and not Path(repository).is_absolute() and not repository.startswith((".", "~")):
        return _download_file(repository, file)
    if is_gguf(name):
        raise ModelNotFound(f"there is no file {name}")
    if directory.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelNotFound(f"there is no directory {name}")
    return _download(name)


def _download(model_id: str) -> Path:
    from huggingface_hub import snapshot_download

    with _hub_errors(model_id):
        directory = Path(snapshot_download(model_id, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    if not (directory / "config.json").is_file():
        raise ModelNotFound(f"{model_id} on the hub holds no config.json")
    return directory


def _download_file(model_id: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    with _hub_errors(model_id, file):
        return Path(hf_hub_download(model_id, file))


@contextmanager
def _hub_errors(model_id: str, file: str | None = None) -> Iterator[None]:
    """Turn what goes wrong with a download into `ModelNotFound`."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    name = model_id if file is None else f"{model_id}:{file}"
    try:
        yield
    except HFValidationError as error:
        raise ModelNotFound(f"{model_id!r} is neither a directory nor the id of a model on the hub") from error
    except GatedRepoError as error:
        raise ModelNotFound(f"access to {model_id} on the hub is restricted: set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise ModelNotFound(f"the hub has no model {model_id}, or it is private: set HF_TOKEN") from error
    except LocalEntryNotFoundError as error:
        raise ModelNotFound(
            f"{name} is no local path, is not in the hub's cache, and the hub cannot be reached"
        ) from error
    except EntryNotFoundError as error:
        raise ModelNotFound(f"{model_id} on the hub holds no {file}") from error
    except (HfHubHTTPError, OSError) as error:
        raise ModelNotFound(f"downloading {name} from the hub failed: {error}") from error


def weight_files(directory: Path) -> list[Path]:
    """Return the safetensors files that hold the model's weights, each to be read once.

    The choice is transformers': the file that config.json's `transformers_weights` names, else model.safetensors, else
    the files of model.safetensors.index.json. Where there is none of them, all other *.safetensors but adapters and
    Mistral's own format. Raises `ModelNotFound` and `InvalidWeights`.
    """
    named = _json(directory / "config.json").get("transformers_weights")
    if named is not None and not str(named).endswith((".safetensors", _INDEX_SUFFIX)):
        raise InvalidWeights(f"config.json's transformers_weights names {named!r}, which is no safetensors file")
    names = [str(named)] if named is not None else ["model.safetensors", "model.safetensors.index.json"]
    for name in names:
        if named is None and not (directory / name).is_file():
            continue
        (path,) = _inside(directory, [name], "config.json")
        if not name.endswith(_INDEX_SUFFIX):
            return [path]
        places = _json(path).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
            raise InvalidWeights(f"{name} has no weight_map from tensors to files")
        return _inside(directory, sorted(set(places.values())), name)
    files = sorted(path for path in directory.glob("*.safetensors") if not path.name.startswith(_NO_MODEL))
    if files:
        return files
    pickled = sorted(path.name for path in directory.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickled:
        raise ModelNotFound(
            f"{directory} has its weights in {pickled[0]} only: pickled checkpoints can run code and are not loaded; "
            "convert them to safetensors"
        )
    raise ModelNotFound(f"{directory} holds no *.safetensors file of a whole model")


def _inside(directory: Path, names: Sequence[str], said_by: str) -> list[Path]:
    """Return the paths of files in the directory. A link in it may lead elsewhere, as in the hub's cache."""
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise InvalidWeights(f"{said_by} names {name!r}, which is outside of the model's directory")
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise ModelNotFound(f"{said_by} names files that are not in {directory}: {', '.join(missing)}")
    return [directory / name for name in names]


def _json(path: Path) -> dict[str, Any]:
    """Return the object in a file, an empty one where there is no such file; raises `InvalidWeights`."""
    if not path.is_file():
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidWeights(f"{path.name} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise InvalidWeights(f"{path.name} is no JSON object")
    return document


def load_config(path: Path) -> Any:
    """transformers' configuration of the model in a directory or a GGUF file. Raises `ModelError`."""
    if is_gguf(path):
        from engine.loading.gguf.config import model_config
        from engine.loading.gguf.file import GGUFFile

        return model_config(GGUFFile(path))
    try:
        config = auto_config().from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        raise UnsupportedModel(f"the configuration in {path} cannot be read: {error}") from error
    return config


def eos_token_ids(path: Path, config: Any, vocab_size: int) -> frozenset[int]:
    """Return the tokens that end a completion: of generation_config.json, or else of config.json or its text part.

    What is no token of the vocabulary is left out with a warning, as it can never be generated.
    """
    ids = _json(path / "generation_config.json").get("eos_token_id")
    for source in (config, config.get_text_config()):
        if ids is None:
            ids = getattr(source, "eos_token_id", None)
    given = ids if isinstance(ids, list | tuple) else [] if ids is None else [ids]
    known = frozenset(token for token in given if type(token) is int and 0 <= token < vocab_size)
    if len(known) < len(set(map(repr, given))):
        logger.warning("eos_token_id of %s names what is no token of the %d: %s", path, vocab_size, given)
    return known
