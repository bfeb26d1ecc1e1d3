"""Loading a model: what is refused, and what comes out."""

from __future__ import annotations

import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.errors import InvalidWeights
from engine.loading.hub import load_config, weight_files
from engine.loading.weights import ModelFiller, empty_model, load_weights
from engine.models.generic import GenericDecoder
from tests.support.paths import REPOSITORY
from tests.unit.engine.loading.checkpoint import CPU, SIZES, assert_same_as_transformers, edit_config, load, rewrite


def test_weights_are_loaded_from_all_shards(directory: Path) -> None:
    sharded = {name: tensor.clone() for name, tensor in load(directory).model.named_parameters()}
    rewrite(directory)
    whole = dict(load(directory).model.named_parameters())
    assert sharded.keys() == whole.keys()
    assert all(torch.equal(sharded[name], whole[name]) for name in whole)


def test_dtype_is_the_checkpoints_unless_configured(directory: Path) -> None:
    assert load(directory).dtype is torch.float32
    edit_config(directory, dtype="bfloat16")
    assert load(directory).dtype is torch.bfloat16
    assert load(directory, dtype="float16").cache.layers[0].keys.dtype is torch.float16


def test_missing_weight_is_an_error(directory: Path) -> None:
    rewrite(directory, model__layers__1__mlp__up_proj__weight=None)
    with pytest.raises(InvalidWeights, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        load(directory)


def test_unknown_weight_is_an_error(directory: Path) -> None:
    rewrite(directory, model__layers__1__mlp__sideways_proj__weight=torch.zeros(2))
    with pytest.raises(InvalidWeights, match=r"does not know: model\.layers\.1\.mlp\.sideways_proj\.weight"):
        load(directory)


def test_misshapen_weight_is_an_error(directory: Path) -> None:
    rewrite(directory, model__norm__weight=torch.zeros(23))
    with pytest.raises(InvalidWeights, match=r"model\.norm\.weight has the shape \[23\] instead of \[24\]"):
        load(directory)


def test_quantized_weights_are_refused_when_the_configuration_names_no_quantization(directory: Path) -> None:
    rewrite(directory, model__norm__weight=torch.zeros(24, dtype=torch.int8))
    with pytest.raises(InvalidWeights, match="int8"):
        load(directory)


def test_damaged_file_is_an_error(directory: Path) -> None:
    path = weight_files(directory)[0]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InvalidWeights, match=path.name):
        load(directory)


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


def test_engine_start_imports_neither_compiler_nor_models_of_transformers() -> None:
    """They take two to three seconds, a third of the start."""
    program = """
import sys
from engine import Engine, EngineConfig, SamplingParams

engine = Engine.from_pretrained("demo/model", EngineConfig(device="cpu", num_kv_blocks=80))
engine.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=1))
dear = {"sympy", "torch._dynamo", "torch.distributed.tensor", "transformers.modeling_utils"}
assert not dear & set(sys.modules), dear & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=True)


def test_on_module_loaded_is_called_once_the_weights_are_complete(directory: Path) -> None:
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


def test_loader_forgets_a_weight_that_its_callback_removed(directory: Path) -> None:
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
