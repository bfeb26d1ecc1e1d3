"""How an engine is set up."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.errors import InvalidConfig

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
QUANTIZATIONS = ("int8",)
KV_CACHE_DTYPES = ("auto", "float8_e4m3")
ATTENTION_BACKENDS = ("auto", "torch", "triton", "cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Settings of one engine; they hold for its life. Raises `InvalidConfig` for what cannot be honoured."""

    dtype: str = "auto"
    """Of weights, activations and KV cache. "auto": as the checkpoint was saved."""

    kv_cache_dtype: str = "auto"
    """How keys and values are kept. "auto": as `dtype` says. "float8_e4m3": rounded to a byte each, with a scale
    for each head of each token, in about half the memory that bfloat16 takes. With the Triton attention only."""

    device: str = "auto"
    """"auto": a CUDA GPU where there is one, else the CPU."""

    max_model_len: int | None = None
    """Positions a sequence may have, prompt and output together. None: as many as the model was made for."""

    max_num_seqs: int = 256
    """Sequences in one step."""

    max_num_batched_tokens: int = 2048
    """Most tokens in one step, prompt chunks and decodes together. On a CPU steps have fewer where measuring shows that
    more are slower or take too long (`prefill_budget.py`), unless they are `deterministic`."""

    decode_steps: int | None = None
    """Most tokens that a sequence decodes at once, without the host looking on. None: as many as pay; 1: never more."""

    block_size: int = 16
    """Positions in one block of the KV cache."""

    num_kv_blocks: int | None = None
    """Blocks in the KV cache. None: as many as memory allows, but no more than `max_num_seqs` full sequences fill."""

    gpu_memory_utilization: float = 0.9
    """Share of the GPU's memory that weights, activations and KV cache may take together."""

    cpu_kv_cache_bytes: int | None = None
    """Memory for the KV cache on the CPU, taken at once. None: half of what is free once the weights are loaded, taken
    as it is needed: a step that uses a block for the first time then waits for the system."""

    enable_prefix_caching: bool = True
    """Keep the KV cache of finished prompts for others that begin alike."""

    seed: int = 0
    """From which requests without a seed of their own get one, and `random_weights` their values."""

    deterministic: bool = False
    """Compute each request as if it ran alone: the same bits in any batch, order and chunks, from cached prefixes and
    after preemption. On the CPU only; decision 0009 says how."""

    random_weights: bool = False
    """Make up the weights from the seed instead of loading them: for benchmarks and tests."""

    quantization: str | None = None
    """How the weights of linear layers are stored; None: as `dtype` says. "int8": rounded at load, a scale for
    each 64 inputs of an output; what they are multiplied with is rounded to 16 bits. On the CPU only."""

    weight_cache_bytes: int = 0
    """What packed weights may take in `weight_cache_dir`, where the next start maps them instead of reading, rounding
    and packing the checkpoint; those unused for longest go first. 0: none are kept. On the CPU only, for natively
    implemented models."""

    weight_cache_dir: Path | None = None
    """A directory that no other user can write to. None: `~/.cache/pagemill/weights`."""

    tensor_parallel_size: int = 1
    """Ranks that share the model: each is a process with a GPU of its own, or one on the CPU, and holds a part of every
    layer and of the KV cache. Natively implemented models with plain weights only."""

    attention: str = "auto"
    """Which implementation of attention over the paged cache runs. "auto": Triton kernels on a GPU, C++
    on a CPU where there is a compiler, else torch."""

    shared_prefix_attention: bool = False
    """Read blocks that several decoding sequences begin with once for all of them. With the Triton attention, without
    windows and float8 only; off, because it has not been timed on a GPU."""

    def __post_init__(self) -> None:
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("device", self.device, DEVICES)
        _one_of("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
        _one_of("attention", self.attention, ATTENTION_BACKENDS)
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size", "tensor_parallel_size"):
            _positive(name, getattr(self, name))
        for name in ("max_model_len", "num_kv_blocks", "cpu_kv_cache_bytes", "decode_steps"):
            if getattr(self, name) is not None:
                _positive(name, getattr(self, name))
        if self.weight_cache_bytes < 0:
            raise InvalidConfig(f"weight_cache_bytes must be at least 0, not {self.weight_cache_bytes}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise InvalidConfig(
                f"gpu_memory_utilization must be above 0 and at most 1, not {self.gpu_memory_utilization}"
            )
        if self.deterministic and self.device == "cuda":
            raise InvalidConfig("deterministic=True is there for the CPU only: set device to 'cpu'")
        if self.deterministic and self.attention not in ("auto", "torch"):
            raise InvalidConfig(f"deterministic=True brings its own attention: attention cannot be {self.attention!r}")
        if self.kv_cache_dtype != "auto" and (
            self.deterministic
            or self.attention in ("torch", "cpu")
            or (self.device == "cpu" and self.attention != "triton")
        ):
            raise InvalidConfig(
                f"kv_cache_dtype {self.kv_cache_dtype!r} is there with the Triton attention only, which runs on a GPU"
            )
        if self.tensor_parallel_size > 1:
            self._check_parallel()
        if self.quantization not in (None, *QUANTIZATIONS):
            raise InvalidConfig(f"quantization must be None or {', '.join(QUANTIZATIONS)}, not {self.quantization!r}")

    def _check_parallel(self) -> None:
        if self.deterministic:
            raise InvalidConfig("deterministic=True is there with one rank only: tensor_parallel_size must be 1")
        if self.quantization is not None:
            raise InvalidConfig(
                f"quantization {self.quantization!r} is there with one rank only, because each rank would round its "
                "part of a row by a scale of its own: tensor_parallel_size must be 1"
            )


def _one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InvalidConfig(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def _positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidConfig(f"{name} must be a whole number of at least 1, not {value!r}")
