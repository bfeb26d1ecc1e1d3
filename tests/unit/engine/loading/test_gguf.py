"""GGUF files against Hugging Face directories with the same weights, and files that are damaged."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("gguf", reason="gguf is not installed: pip install -c constraints.txt -e '.[worker]'")

from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter

from engine import EngineConfig
from engine.batch import Batch, BatchEntry
from engine.errors import InvalidWeights, ModelError, ModelNotFound, UnsupportedModel
from engine.execution.model_runner import ModelRunner
from engine.loading.gguf.config import model_config
from engine.loading.gguf.file import READABLE, GGUFFile
from engine.loading.hub import resolve_model
from tests.support.gguf_files import CASES, VOCAB_SIZE, Case, write_pair

LLAMA = CASES[0]
PROMPT = torch.randint(VOCAB_SIZE, (48,), generator=torch.Generator().manual_seed(0)).tolist()


def logits(path: Path, **options: Any) -> torch.Tensor:
    """`[48, vocab]` of the prompt."""
    config = EngineConfig(**{"device": "cpu", "dtype": "float32", "num_kv_blocks": 8, **options})
    runner = ModelRunner.from_pretrained(path, config)
    return runner.run(Batch([BatchEntry(PROMPT, 0, range(3), num_logits=len(PROMPT))])).float()


def assert_equal_to_twin(case: Case, type_: Type, directory: Path, **options: Any) -> None:
    file, twin = write_pair(case, type_, directory)
    ours, theirs = logits(file, **options), logits(twin, **options)
    assert theirs.std() > 0.1
    # One is added to Gemma's norms in the file, which rounds them.
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=2e-4 if case.architecture.startswith("gemma") else 1e-6)


@pytest.mark.parametrize("type_", READABLE, ids=lambda type_: type_.name)
def test_gguf_logits_equal_those_of_dequantized_directory_for_each_type(type_: Type, tmp_path: Path) -> None:
    assert_equal_to_twin(LLAMA, type_, tmp_path)


@pytest.mark.parametrize("case", CASES[1:], ids=lambda case: case.name)
def test_gguf_logits_equal_those_of_dequantized_directory_for_each_architecture(case: Case, tmp_path: Path) -> None:
    assert_equal_to_twin(case, Type.Q8_0, tmp_path)


def test_gguf_weights_are_quantized_to_int8_as_a_directorys_are(tmp_path: Path) -> None:
    assert_equal_to_twin(LLAMA, Type.Q4_K, tmp_path, quantization="int8")


def test_gguf_computes_in_the_type_of_its_matrices_where_they_are_plain(tmp_path: Path) -> None:
    kinds = {Type.F32: torch.float32, Type.BF16: torch.bfloat16, Type.F16: torch.float16, Type.Q4_0: torch.float32}
    for type_, dtype in kinds.items():
        assert model_config(GGUFFile(write_pair(LLAMA, type_, tmp_path)[0])).dtype is dtype


def test_large_tensor_is_read_in_pieces(tmp_path: Path) -> None:
    file = GGUFFile(write_pair(LLAMA, Type.Q5_1, tmp_path)[0])
    pieces = list(file.rows("token_embd.weight", 1000))
    assert len(pieces) == -(-VOCAB_SIZE // 3)
    assert torch.equal(torch.cat(pieces), file.read("token_embd.weight"))


def small_file(path: Path, architecture: str = "llama", **values: Any) -> Path:
    writer = GGUFWriter(path, architecture)
    for key, value in values.items():
        writer.add_uint32(key.replace("__", "."), value)
    writer.add_tensor("token_embd.weight", np.zeros((8, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def complaint(path: Path, error: type[ModelError]) -> str:
    with pytest.raises(error) as raised:
        ModelRunner.from_pretrained(path, EngineConfig(device="cpu", num_kv_blocks=8))
    message = raised.value.message
    assert "\n" not in message
    assert path.name in message
    return message


def test_unknown_architecture_is_refused_by_name(tmp_path: Path) -> None:
    assert "'rwkv7'" in complaint(small_file(tmp_path / "a.gguf", "rwkv7"), UnsupportedModel)


def test_mixture_of_experts_is_refused(tmp_path: Path) -> None:
    path = small_file(tmp_path / "a.gguf", llama__expert_count=8)
    assert "mixture of experts" in complaint(path, UnsupportedModel)


def test_part_of_split_file_is_refused(tmp_path: Path) -> None:
    assert "one of 3 parts" in complaint(small_file(tmp_path / "a.gguf", split__count=3), UnsupportedModel)


def test_missing_metadata_is_named(tmp_path: Path) -> None:
    assert "llama.attention.head_count" in complaint(small_file(tmp_path / "a.gguf"), InvalidWeights)


def test_unreadable_type_is_named(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((8, 84), dtype=np.uint8), raw_dtype=Type.Q2_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    message = complaint(tmp_path / "a.gguf", UnsupportedModel)
    assert "blk.0.attn_q.weight as Q2_K" in message


def test_lacking_unknown_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    path, _ = write_pair(LLAMA, Type.Q8_0, tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))
    assert "lacks model.layers.1.mlp.up_proj.weight" in complaint(path, InvalidWeights)
    key = b"llama.feed_forward_length" + struct.pack("<I", 4)
    path.write_bytes(whole.replace(key + struct.pack("<I", 512), key + struct.pack("<I", 480)))
    assert "has the shape [512, 256] instead of [480, 256]" in complaint(path, InvalidWeights)
    path, _ = write_pair(next(case for case in CASES if case.config.get("mlp_bias")), Type.Q8_0, tmp_path)
    path.write_bytes(path.read_bytes().replace(b"blk.1.ffn_up.bias", b"blk.1.attn_x.bias"))
    assert "lacks model.layers.1.mlp.up_proj.bias" in complaint(path, InvalidWeights)
    path.write_bytes(path.read_bytes().replace(b"blk.0.ffn_up.bias", b"blk.0.attn_x.bias"))
    assert "does not know: blk.0.ffn_gate.bias, blk.0.attn_x.bias" in complaint(path, InvalidWeights)


def test_file_cut_anywhere_is_refused_in_one_line(tmp_path: Path) -> None:
    path, _ = write_pair(LLAMA, Type.Q4_0, tmp_path)
    whole = path.read_bytes()
    header = GGUFFile(path).tensors["token_embd.weight"].offset
    for length in [*range(1, header, 97), header, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(InvalidWeights) as raised:
            GGUFFile(path)
        assert "\n" not in raised.value.message
    assert raised.value.message.startswith(f"{path.name} is truncated: ")
    path.write_bytes(b"")
    assert "empty" in complaint(path, InvalidWeights)


def test_header_with_any_byte_changed_loads_or_is_refused_in_one_line(tmp_path: Path) -> None:
    path = small_file(tmp_path / "a.gguf", llama__block_count=1, llama__context_length=9)
    whole = path.read_bytes()
    for place in range(GGUFFile(path).tensors["token_embd.weight"].offset):
        for value in (0, 1, 9, 127, 255):
            path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            try:
                model_config(GGUFFile(path))
            except ModelError as error:
                assert "\n" not in error.message  # noqa: PT017 - most of them do, not all


def test_file_is_refused_when_it_is_no_gguf(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    assert "does not begin with GGUF" in complaint(path, InvalidWeights)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    assert "version 1" in complaint(path, InvalidWeights)


def test_missing_gguf_is_named() -> None:
    with pytest.raises(ModelNotFound, match=r"there is no file /nowhere/a\.gguf"):
        resolve_model("/nowhere/a.gguf")


def test_gguf_of_a_hub_repository_is_downloaded_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    asked: list[tuple[str, str]] = []

    def download(repository: str, file: str) -> str:
        asked.append((repository, file))
        return str(tmp_path / "cached.gguf")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert resolve_model("org/name:sub/model-Q4_K_M.gguf") == tmp_path / "cached.gguf"
    assert asked == [("org/name", "sub/model-Q4_K_M.gguf")]
