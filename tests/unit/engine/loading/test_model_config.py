"""A checkpoint's configuration: the context, the end tokens, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.errors import InvalidWeights, ModelError, UnsupportedModel
from engine.loading.hub import eos_token_ids, load_config
from tests.unit.engine.loading.checkpoint import edit_config, load


def test_unreadable_config_is_refused(directory: Path) -> None:
    edit_config(directory, model_type="perpetuum_mobile", auto_map={"AutoConfig": "evil.Config"})
    with pytest.raises(UnsupportedModel, match="cannot be read"):
        load_config(directory)


def test_context_longer_than_the_model_is_refused(directory: Path) -> None:
    assert load(directory).max_model_len == 64
    assert load(directory, max_model_len=10).max_model_len == 10
    with pytest.raises(ModelError, match="made for 64 positions"):
        load(directory, max_model_len=65)


def test_end_tokens_come_from_the_generation_config_first(directory: Path) -> None:
    edit_config(directory, eos_token_id=7)
    (directory / "generation_config.json").unlink(missing_ok=True)
    assert load(directory).eos_token_ids == {7}
    (directory / "generation_config.json").write_text('{"eos_token_id": [8, 9]}')
    assert load(directory).eos_token_ids == {8, 9}


@pytest.mark.parametrize(
    ("given", "expected"),
    [(-1, set()), (50, set()), ([49, 50, -1, 10**20], {49}), ([True, 3.0, "7", None], set()), ([], set())],
    ids=str,
)
def test_end_tokens_outside_of_the_vocabulary_are_left_out(directory: Path, given: object, expected: set[int]) -> None:
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": given}))
    assert load(directory).eos_token_ids == expected


def test_end_tokens_of_a_multimodal_model_are_those_of_its_text_part(tmp_path: Path) -> None:
    from transformers import Gemma3Config

    config = Gemma3Config(text_config={"eos_token_id": [5, 6], "num_hidden_layers": 1})
    assert eos_token_ids(tmp_path, config, 10) == {5, 6}


def test_damaged_generation_config_is_refused(directory: Path) -> None:
    (directory / "generation_config.json").write_text("{")
    with pytest.raises(InvalidWeights, match=r"generation_config\.json is not JSON"):
        load(directory)
