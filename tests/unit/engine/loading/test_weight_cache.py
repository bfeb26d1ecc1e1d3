"""Packed weights that are kept: the second start maps them, and what goes wrong with them is a start without them."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("gguf", reason="gguf is not installed: pip install -c constraints.txt -e '.[worker]'")

from engine.batch import Batch, BatchEntry
from engine.config import EngineConfig
from engine.errors import InvalidConfig
from engine.loading import packed_model, weight_cache
from engine.loading.tensor_file import DamagedFile, map_tensors, write_tensors
from engine.loading.weight_cache import KeptWeights, WeightCache, finish_writes
from tests.support.gguf_files import CASES as GGUF_CASES
from tests.support.gguf_files import Type, write_pair
from tests.unit.engine.loading.checkpoint import SIZES, TOKENS, load, rewrite
from tests.unit.kernels.cpu_variants import cpu_library

MIB = 2**20
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_head": 2, "n_layer": 2, "n_positions": 64, "vocab_size": 130},
    "gptj": {"n_embd": 64, "n_head": 2, "n_layer": 2, "n_positions": 64, "vocab_size": 130, "rotary_dim": 16},
    "falcon": SIZES | {"hidden_size": 96, "vocab_size": 130},
    "llama": SIZES | {"hidden_size": 96, "vocab_size": 130, "intermediate_size": 160},
    "gemma2": SIZES | {"head_dim": 32, "vocab_size": 130, "intermediate_size": 160},
    "mixtral": SIZES | {"hidden_size": 96, "vocab_size": 130, "num_local_experts": 3},
}


@pytest.fixture(autouse=True)
def _kernels_and_small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_library("native")
    monkeypatch.setattr(weight_cache, "LEAST_BYTES", 0)
    monkeypatch.setattr(weight_cache, "_LEFT_FREE", 0)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The checkpoints that were read, one entry a time."""
    read: list[Path] = []
    original = packed_model.load_model

    def counted(path: Path, *arguments: Any, **options: Any) -> Any:
        read.append(path)
        return original(path, *arguments, **options)

    monkeypatch.setattr(packed_model, "load_model", counted)
    return read


def logits(path: Path, cache: Path, **options: Any) -> Tensor:
    """Of a new start, once all that it keeps is kept."""
    runner = load(path, weight_cache_bytes=2**30, weight_cache_dir=cache, **options)
    finish_writes()
    return runner.run(Batch([BatchEntry(TOKENS, 0, [0], num_logits=len(TOKENS))])).clone()


def files(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if path.name != ".lock")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "options",
    [{}, {"quantization": "int8"}, {"dtype": "bfloat16"}, {"deterministic": True}],
    ids=["float32", "int8", "bfloat16", "deterministic"],
)
def test_second_start_maps_what_the_first_packed(
    tmp_path: Path, cache: Path, loads: list[Path], model: str, options: dict[str, Any]
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    path = tmp_path / "model"
    AutoModelForCausalLM.from_config(AutoConfig.for_model(model, **MODELS[model])).save_pretrained(path)
    first = logits(path, cache, **options)
    assert len(files(cache)) == 1
    second = logits(path, cache, **options)
    assert loads == [path]
    assert torch.equal(first, second)


def test_second_start_maps_a_gguf_file(tmp_path: Path, cache: Path, loads: list[Path]) -> None:
    path, _ = write_pair(next(case for case in GGUF_CASES if case.name == "llama"), Type.Q4_0, tmp_path)
    assert torch.equal(logits(path, cache), logits(path, cache))
    assert loads == [path]


def test_head_that_differs_from_its_embedding_is_kept_as_it_is(directory: Path, cache: Path, loads: list[Path]) -> None:
    config = directory / "config.json"
    config.write_text(config.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    assert '"tie_word_embeddings": true' in config.read_text()
    first = logits(directory, cache)
    assert torch.equal(first, logits(directory, cache))
    assert loads == [directory]


def test_precisions_and_changed_checkpoints_have_files_of_their_own(
    directory: Path, cache: Path, loads: list[Path]
) -> None:
    rewrite(directory, model__norm__weight=torch.full([SIZES["hidden_size"]], 1.0))
    plain = logits(directory, cache)
    logits(directory, cache, dtype="bfloat16")
    rewrite(directory, model__norm__weight=torch.full([SIZES["hidden_size"]], 2.0))
    torch.testing.assert_close(logits(directory, cache), 2 * plain)
    assert len(loads) == len(files(cache)) == 3


def test_nothing_is_kept_unless_asked_for(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: directory)
    load(directory)
    finish_writes()
    assert not (directory / ".cache").exists()
    load(directory, weight_cache_bytes=2**30)
    finish_writes()
    assert len(files(directory / ".cache/pagemill/weights")) == 1
    with pytest.raises(InvalidConfig, match="weight_cache_bytes"):
        EngineConfig(weight_cache_bytes=-1)


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _cut_to_nothing(path: Path) -> None:
    os.truncate(path, 0)


def _lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def _flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(100)
        byte = file.read(1)
        file.seek(100)
        file.write(bytes([byte[0] ^ 1]))


def _fill_with_zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("damage", [_cut, _cut_to_nothing, _lengthen, _flip, _fill_with_zeros])
def test_damaged_file_is_found_and_made_anew(
    directory: Path, cache: Path, loads: list[Path], damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    first = logits(directory, cache)
    (path,) = files(cache)
    whole = path.read_bytes()
    damage(path)
    assert torch.equal(logits(directory, cache), first)
    assert "are damaged and made anew" in caplog.text
    assert path.read_bytes() == whole
    assert torch.equal(logits(directory, cache), first)
    assert loads == [directory] * 2


def test_file_of_another_model_by_the_same_name_is_not_taken(directory: Path, cache: Path) -> None:
    first = logits(directory, cache)
    (path,) = files(cache)
    tensors, meta = map_tensors(path)
    path.unlink()
    write_tensors(path, {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, meta | {"identity": "x"})
    assert torch.equal(logits(directory, cache), first)


def test_start_goes_on_where_nothing_can_be_written(
    directory: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.write_text("a file where the directory would be")
    with caplog.at_level(logging.INFO, "engine.loading.weight_cache"):
        logits(directory, cache)
    (line,) = (record.message for record in caplog.records if record.name == weight_cache.logger.name)
    assert line.startswith("packed weights are not kept for the next start: ")


def test_files_in_a_read_only_directory_are_mapped(
    directory: Path, cache: Path, loads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = logits(directory, cache)

    def refuse(*arguments: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(weight_cache.os, "utime", refuse)
    assert torch.equal(logits(directory, cache), first)
    assert loads == [directory]


@pytest.mark.parametrize("when", ["known before", "found while space is taken", "found while it is written"])
def test_full_disk_leaves_nothing_behind(
    directory: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, when: str
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, caplog.at_level(logging.INFO, "engine.loading.weight_cache"):
        if when == "known before":
            patch.setattr(weight_cache, "_LEFT_FREE", 2**62)
        else:
            patch.setattr(os, "posix_fallocate" if "taken" in when else "fsync", full)
        first = logits(directory, cache)
    assert files(cache) == []
    assert [record.message for record in caplog.records if "No space left" in record.message][1:] == []
    assert "are not kept for the next start: [Errno 28] No space left" in caplog.text
    assert torch.equal(logits(directory, cache), first)
    assert len(files(cache)) == 1


def weights(value: float, size: int = MIB) -> KeptWeights:
    return KeptWeights({"a": torch.full([size // 4], value)}, is_tied=False)


def test_starters_at_once_write_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []
    are_started = threading.Event()
    original = weight_cache.write_tensors

    def counted(path: Path, *arguments: Any) -> None:
        written.append(path)
        are_started.wait()
        original(path, *arguments)

    monkeypatch.setattr(weight_cache, "write_tensors", counted)
    # A cache each, as in a process each: every one has opened the lock's file for itself.
    caches = [WeightCache(cache, 2**30) for _ in range(8)]
    for one in caches:
        one.keep("model", "0" * 64, weights(1.0), lambda: True)
    are_started.set()
    finish_writes()
    assert len(written) == 1
    kept = caches[0].open("model", "0" * 64)
    assert kept is not None
    assert torch.equal(kept.tensors["a"], weights(1.0).tensors["a"])


def test_what_a_killed_writer_left_is_cleared_away(cache: Path) -> None:
    cache.mkdir()
    (cache / ".writing-1").write_bytes(b"half of it")
    WeightCache(cache, 2**30).keep("model", "0" * 64, weights(1.0), lambda: True)
    finish_writes()
    assert [path.name for path in files(cache)] == [f"model-{'0' * 16}.weights"]


def test_least_recently_used_weights_make_room(cache: Path) -> None:
    kept = WeightCache(cache, 3 * MIB)
    for place, name in enumerate(("first", "second"), 1):
        kept.keep(name, "0" * 64, weights(1.0), lambda: True)
        finish_writes()
        os.utime(kept._path(name, "0" * 64), (place, place))
    assert kept.open("first", "0" * 64) is not None
    kept.keep("third", "0" * 64, weights(1.0), lambda: True)
    finish_writes()
    assert kept.open("second", "0" * 64) is None
    assert all(kept.open(name, "0" * 64) is not None for name in ("first", "third"))


def test_weights_that_are_larger_than_the_limit_push_nothing_out(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = WeightCache(cache, 3 * MIB)
    kept.keep("small", "0" * 64, weights(1.0), lambda: True)
    finish_writes()
    with caplog.at_level(logging.INFO):
        kept.keep("large", "0" * 64, weights(1.0, 4 * MIB), lambda: True)
        finish_writes()
    assert kept.open("small", "0" * 64) is not None
    assert "4194304 bytes are more than the 3145728" in caplog.text


def test_weights_of_a_checkpoint_that_changed_meanwhile_are_not_kept(directory: Path, cache: Path) -> None:
    kept = WeightCache(cache, 2**30)
    kept.keep("model", "0" * 64, weights(1.0), lambda: False)
    finish_writes()
    assert files(cache) == []


def test_mapped_weights_are_shared_until_written_to(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_tensors(path, {"a": torch.arange(5.0), "b": torch.ones(3, dtype=torch.bfloat16)}, {})
    one, _ = map_tensors(path)
    other, _ = map_tensors(path)
    one["a"][2] = 7.0
    assert other["a"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert map_tensors(path)[0]["b"].tolist() == [1.0, 1.0, 1.0]
    assert one["a"].data_ptr() % 64 == one["b"].data_ptr() % 64 == 0
    (tmp_path / "short").write_bytes(b"PAGEMILL")
    with pytest.raises(DamagedFile, match="8 bytes only"):
        map_tensors(tmp_path / "short")
