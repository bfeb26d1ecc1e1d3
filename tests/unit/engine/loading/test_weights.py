"""Loading a model: what is refused, and what comes out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.attention import AttentionLayer
from engine.attention.kv_cache import KVCache
from engine.batch import Batch, BatchEntry
from engine.config import EngineConfig
from engine.errors import InvalidWeights, ModelError, ModelNotFound, UnsupportedModel
from engine.execution.model_runner import ModelRunner
from engine.loading.buffer_pool import BufferPool
from engine.loading.hub import eos_token_ids, load_config, resolve_model, weight_files
from engine.loading.weights import ModelFiller, empty_model, load_weights
from engine.models.generic import GenericDecoder
from tests.support.paths import REPOSITORY
from tests.unit.kernels.cpu_variants import cpu_library

CPU = torch.device("cpu")
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]
SIZES = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A Llama as its makers would publish it, in two shards."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES))
    model.save_pretrained(tmp_path, max_shard_size="12kB")
    assert len(weight_files(tmp_path)) > 1
    return tmp_path


def rewrite(directory: Path, **changes: torch.Tensor | None) -> None:
    """Save all weights in one file, some of them changed or left out; `__` in a name stands for a dot."""
    tensors: dict[str, torch.Tensor] = {}
    for path in weight_files(directory):
        tensors.update(load_file(path))
        path.unlink()
    (directory / "model.safetensors.index.json").unlink(missing_ok=True)
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, directory / "model.safetensors")


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def load(directory: Path, **options: Any) -> ModelRunner:
    return ModelRunner.from_pretrained(directory, EngineConfig(device="cpu", num_kv_blocks=4, **options))


def test_weights_are_loaded_from_all_shards(directory: Path) -> None:
    sharded = {name: tensor.clone() for name, tensor in load(directory).model.named_parameters()}
    rewrite(directory)
    whole = dict(load(directory).model.named_parameters())
    assert sharded.keys() == whole.keys()
    assert all(torch.equal(sharded[name], whole[name]) for name in whole)


def test_the_type_is_the_checkpoints_unless_told_otherwise(directory: Path) -> None:
    assert load(directory).dtype is torch.float32
    edit_config(directory, dtype="bfloat16")
    assert load(directory).dtype is torch.bfloat16
    assert load(directory, dtype="float16").cache.layers[0][0].dtype is torch.float16


def test_a_missing_weight_is_an_error(directory: Path) -> None:
    rewrite(directory, model__layers__1__mlp__up_proj__weight=None)
    with pytest.raises(InvalidWeights, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        load(directory)


def test_an_unknown_weight_is_an_error(directory: Path) -> None:
    rewrite(directory, model__layers__1__mlp__sideways_proj__weight=torch.zeros(2))
    with pytest.raises(InvalidWeights, match=r"does not know: model\.layers\.1\.mlp\.sideways_proj\.weight"):
        load(directory)


def test_a_misshapen_weight_is_an_error(directory: Path) -> None:
    rewrite(directory, model__norm__weight=torch.zeros(23))
    with pytest.raises(InvalidWeights, match=r"model\.norm\.weight has the shape \[23\] instead of \[24\]"):
        load(directory)


def test_quantized_weights_are_refused_where_the_configuration_does_not_speak_of_them(directory: Path) -> None:
    rewrite(directory, model__norm__weight=torch.zeros(24, dtype=torch.int8))
    with pytest.raises(InvalidWeights, match="int8"):
        load(directory)


def test_a_damaged_file_is_an_error(directory: Path) -> None:
    path = weight_files(directory)[0]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InvalidWeights, match=path.name):
        load(directory)


def logits_of_transformers(directory: Path) -> Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        logits: Tensor = AutoModelForCausalLM.from_pretrained(directory)(torch.tensor([TOKENS])).logits[0]
    return logits


def assert_same_as_transformers(directory: Path) -> None:
    logits = load(directory).run(Batch([BatchEntry(TOKENS, 0, [0], num_logits=len(TOKENS))]))
    torch.testing.assert_close(logits, logits_of_transformers(directory), atol=1e-5, rtol=1e-4)


def test_tied_head_saved_twice_is_tied(directory: Path) -> None:
    embedding = load_file(weight_files(directory)[0])["model.embed_tokens.weight"]
    rewrite(directory, lm_head__weight=embedding)
    edit_config(directory, tie_word_embeddings=True)
    assert_same_as_transformers(directory)
    model = load(directory).model
    assert torch.equal(model.embedding(torch.arange(len(embedding))), embedding)
    assert "head" not in {name.partition(".")[0] for name, _ in model.named_parameters()}


def test_tied_head_that_differs_is_a_head_of_its_own(directory: Path) -> None:
    edit_config(directory, tie_word_embeddings=True)
    assert_same_as_transformers(directory)


def test_tied_head_stands_for_an_embedding_that_the_checkpoint_lacks(directory: Path) -> None:
    rewrite(directory, model__embed_tokens__weight=None)
    edit_config(directory, tie_word_embeddings=True)
    assert_same_as_transformers(directory)


@pytest.mark.parametrize("other", ["adapter_model.safetensors", "consolidated.safetensors", "extra.safetensors"])
def test_model_safetensors_is_the_model_whatever_lies_beside_it(directory: Path, other: str) -> None:
    rewrite(directory)
    save_file({"model.norm.weight": torch.full((24,), 7.0), "lora_A": torch.ones(2)}, directory / other)
    assert [path.name for path in weight_files(directory)] == ["model.safetensors"]
    assert_same_as_transformers(directory)


def test_model_safetensors_comes_before_an_index(directory: Path) -> None:
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


def test_adapter_alone_is_no_model(directory: Path) -> None:
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


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.0.self_attn.rotary_emb.cos_cached",
        "model.rotary_emb.sin_cached",
        "model.embeddings.position_ids",
        "model.layers.1.self_attn.k_scale",
        "mtp.layers.0.mlp.up_proj.weight",
        "model.mtp_layers.0.weight",
        "v_head.summary.weight",
    ],
)
def test_harmless_tensors_are_ignored_on_both_paths(directory: Path, name: str) -> None:
    rewrite(directory, **{name: torch.zeros(2)})
    assert_same_as_transformers(directory)
    model = GenericDecoder.load(load_config(directory), directory, dtype=torch.float32, device=CPU)
    assert model.vocab_size == SIZES["vocab_size"]


def test_old_buffers_and_bare_names_are_understood(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", vocab_size=50, n_embd=24, n_head=3, n_layer=1, bos_token_id=0, eos_token_id=0)
    )
    model.config.save_pretrained(tmp_path)
    # As the GPT-2 of the hub is: no "transformer." before the names, and the causal mask among the weights.
    bare = {name.removeprefix("transformer."): tensor for name, tensor in model.transformer.state_dict().items()}
    save_file(bare | {"h.0.attn.bias": torch.ones(1, 1, 64, 64)}, tmp_path / "model.safetensors")
    runner = load(tmp_path)
    assert torch.equal(runner.model.embedding(torch.arange(50)), model.transformer.wte.weight)


def test_random_weights_are_those_of_the_seed(directory: Path) -> None:
    for path in weight_files(directory):
        path.unlink()
    first, again, other = (load(directory, random_weights=True, seed=seed) for seed in (1, 1, 2))
    for mine, same, different in zip(*(runner.model.parameters() for runner in (first, again, other)), strict=True):
        assert torch.equal(mine, same)
        assert not torch.equal(mine, different)


def test_pickled_checkpoints_are_never_opened(directory: Path) -> None:
    for path in weight_files(directory):
        path.unlink()
    (directory / "model.safetensors.index.json").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"not even a pickle")
    with pytest.raises(ModelNotFound, match=r"pytorch_model\.bin only.*not loaded"):
        load(directory)


def test_weights_that_the_index_names_must_be_there(directory: Path) -> None:
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


def test_a_directory_without_a_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        resolve_model(tmp_path)


def test_an_unreadable_config_is_refused(directory: Path) -> None:
    edit_config(directory, model_type="perpetuum_mobile", auto_map={"AutoConfig": "evil.Config"})
    with pytest.raises(UnsupportedModel, match="cannot be read"):
        load_config(directory)


def test_a_context_longer_than_the_model_is_refused(directory: Path) -> None:
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


def test_the_cache_is_sized_by_memory_and_by_need(directory: Path) -> None:
    def blocks(**options: Any) -> int:
        return ModelRunner.from_pretrained(directory, EngineConfig(device="cpu", **options)).num_blocks

    # Two layers of one head of 8, keys and values, 16 positions, 4 bytes.
    each = 2 * 8 * 2 * 16 * 4
    # One more is there for padding.
    assert blocks(cpu_kv_cache_bytes=11 * each + 1) == 10
    assert blocks(max_num_seqs=3) == 3 * 64 // 16
    with pytest.raises(ModelError, match="no memory is left"):
        blocks(cpu_kv_cache_bytes=each - 1)


@pytest.mark.slow
def test_the_cache_takes_memory_when_it_is_used() -> None:
    layer = AttentionLayer(0, 8, 8, 64, 64, 1.0)
    before = _resident()
    cache = KVCache.allocate([layer], 2**15, 16, dtype=torch.bfloat16, device=CPU)
    size = sum(tensor.nbytes for tensor in cache.layers[0])
    assert size > 2**30
    assert _resident() - before < size / 8
    assert not cache.layers[0][0][123].any()
    taken = KVCache.allocate([layer], 2**12, 16, dtype=torch.bfloat16, device=CPU, takes_memory=True)
    assert _resident() - before > sum(tensor.nbytes for tensor in taken.layers[0])


def _resident() -> int:
    """Bytes of main memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(("quantization", "kept"), [("", 1.0), ("int8", 0.4)])
def test_loading_takes_the_weights_and_one_shard(tmp_path: Path, quantization: str, kept: float) -> None:
    """Measured in a process of its own, from when all libraries are imported."""
    if quantization:
        cpu_library("native")
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = SIZES | {"vocab_size": 8000, "hidden_size": 960, "intermediate_size": 4096, "num_hidden_layers": 8}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes))
    model.save_pretrained(tmp_path, max_shard_size="50MB")
    weights = sum(parameter.nbytes for parameter in model.parameters())
    shard = max(path.stat().st_size for path in weight_files(tmp_path))
    program = """
import resource, sys
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from engine import EngineConfig
from engine.models.llama import Llama
from engine.execution.model_runner import ModelRunner
config = EngineConfig(device="cpu", num_kv_blocks=1, quantization=sys.argv[3] or None)
load = lambda directory: ModelRunner.from_pretrained(directory, config)
load(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
load(sys.argv[2])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    small = tmp_path / "small"
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES)).save_pretrained(small)
    done = subprocess.run(
        [sys.executable, "-c", program, str(small), str(tmp_path), quantization],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    grown = int(done.stdout)
    assert weights > 8 * shard
    assert grown < kept * weights + 1.2 * shard


def test_an_engine_starts_without_the_compiler_of_torch(tmp_path: Path) -> None:
    """Importing it takes two seconds. Some of transformers' configurations do all the same."""
    from transformers import GPT2Config

    GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=50).save_pretrained(tmp_path)
    program = """
import sys
from engine import Engine, EngineConfig, SamplingParams

engine = Engine.from_pretrained(sys.argv[1], EngineConfig(device="cpu", random_weights=True, num_kv_blocks=80))
engine.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=1))
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=REPOSITORY, check=True)


def test_a_module_is_handed_over_once_its_weights_are_complete(directory: Path) -> None:
    model = empty_model(load_config(directory), device=CPU)
    assert model is not None
    assert all(parameter.is_meta for parameter in model.parameters())
    handed: dict[nn.Module, dict[str, Tensor]] = {}

    def finished(module: nn.Module) -> None:
        assert module not in handed
        handed[module] = {name: value.clone() for name, value in module.named_parameters(recurse=False)}

    load_weights(
        ModelFiller(model, dtype=torch.float32, device=CPU, on_module_loaded=finished), weight_files(directory)
    )
    own = {module: dict(module.named_parameters(recurse=False)) for module in model.modules()}
    assert handed.keys() == {module for module, parameters in own.items() if parameters}
    for module, values in handed.items():
        assert all(torch.equal(value, own[module][name]) for name, value in values.items())


def test_a_weight_that_was_taken_off_is_forgotten(directory: Path) -> None:
    model = empty_model(load_config(directory), device=CPU)
    assert model is not None
    gone = []

    def finished(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            gone.append(weakref.ref(module.weight))
            del module.weight

    filling = ModelFiller(model, dtype=torch.float32, device=CPU, on_module_loaded=finished)
    load_weights(filling, weight_files(directory))
    assert len(gone) > 4
    assert not any(weight() is not None for weight in gone)


def test_buffer_pool_reuses_memory_without_tensors() -> None:
    pool, shape = BufferPool(), torch.Size([600, 1000])
    first = pool.empty(shape, torch.float32)
    second = pool.empty(shape, torch.float32)
    assert first.data_ptr() != second.data_ptr()
    address, view = first.data_ptr(), first[3:]
    del first
    assert pool.empty(shape, torch.float32).data_ptr() not in (address, second.data_ptr())
    del view
    assert pool.empty(torch.Size([1200, 500]), torch.float32).data_ptr() == address
    assert pool.empty(torch.Size([600, 999]), torch.float32).data_ptr() != address
