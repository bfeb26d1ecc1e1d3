"""Which files of a directory are the model, and which are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import InvalidWeights, ModelNotFound
from engine.loading.hub import resolve_model, weight_files
from tests.unit.engine.loading.checkpoint import assert_same_as_transformers, edit_config, load, rewrite


@pytest.mark.parametrize("other", ["adapter_model.safetensors", "consolidated.safetensors", "extra.safetensors"])
def test_model_safetensors_is_chosen_over_other_files(directory: Path, other: str) -> None:
    rewrite(directory)
    save_file({"model.norm.weight": torch.full((24,), 7.0), "lora_A": torch.ones(2)}, directory / other)
    assert [path.name for path in weight_files(directory)] == ["model.safetensors"]
    assert_same_as_transformers(directory)


def test_model_safetensors_is_chosen_over_an_index(directory: Path) -> None:
    """As in transformers."""
    tensors = {name: value for path in weight_files(directory) for name, value in load_file(path).items()}
    save_file({name: value * 0.5 for name, value in tensors.items()}, directory / "model.safetensors")
    assert_same_as_transformers(directory)


def test_configuration_may_name_the_weights(directory: Path) -> None:
    rewrite(directory)
    (directory / "model.safetensors").rename(directory / "mine.safetensors")
    save_file({"model.norm.weight": torch.zeros(24)}, directory / "model.safetensors")
    edit_config(directory, transformers_weights="mine.safetensors")
    assert_same_as_transformers(directory)


def test_directory_with_only_an_adapter_is_refused(directory: Path) -> None:
    rewrite(directory)
    (directory / "model.safetensors").rename(directory / "adapter_model.safetensors")
    with pytest.raises(ModelNotFound, match="of a whole model"):
        load(directory)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/outside.safetensors", "a/../../outside.safetensors"])
def test_files_outside_of_the_directory_are_refused(directory: Path, name: str) -> None:
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(InvalidWeights, match="outside of the model's directory"):
        weight_files(directory)
    edit_config(directory, transformers_weights=name)
    with pytest.raises(InvalidWeights, match="outside of the model's directory"):
        weight_files(directory)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {"model.norm.weight": 1}}'])
def test_damaged_index_is_refused(directory: Path, text: str) -> None:
    (directory / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InvalidWeights, match=r"model\.safetensors\.index\.json"):
        weight_files(directory)


def test_pickled_checkpoints_are_never_opened(directory: Path) -> None:
    for path in weight_files(directory):
        path.unlink()
    (directory / "model.safetensors.index.json").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"not even a pickle")
    with pytest.raises(ModelNotFound, match=r"pytorch_model\.bin only.*not loaded"):
        load(directory)


def test_missing_shard_of_an_index_is_named(directory: Path) -> None:
    path = weight_files(directory)[0]
    path.unlink()
    with pytest.raises(ModelNotFound, match=path.name):
        load(directory)


@pytest.mark.parametrize(
    ("path_or_id", "says"),
    [
        ("/no/such/directory", "there is no directory"),
        ("./nowhere", "there is no directory"),
        ("a/b/c", "there is no directory"),
        ("not an id!", "neither a directory nor the id"),
    ],
)
def test_directory_without_a_model_is_refused_by_name(path_or_id: str, says: str) -> None:
    with pytest.raises(ModelNotFound, match=says):
        resolve_model(path_or_id)


def test_directory_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        resolve_model(tmp_path)
