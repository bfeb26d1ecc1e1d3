"""Any decoder of transformers, with our paged attention in the place of its own.

Models that follow transformers' attention interface call a function by name for `softmax(q k) v`. Ours is registered
under a name of this instance's own, and the model is fed the flat tokens of all sequences as one row `[1, T]` with
explicit positions and without transformers' cache. Everything but attention works token by token.
"""

# That is an assumption about each model's code, so loading tests it: `verify` runs two short sequences, mixed and in
# pieces, through the engine's attention, and compares the logits with those of the model's own eager attention on each
# sequence by itself. A model whose logits differ is refused.

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from engine.attention import AttentionLayer, StepAttention
from engine.batch import Batch, BatchEntry
from engine.errors import InvalidWeights, UnsupportedModel
from engine.models.decoder import HARMLESS, Decoder, TokenInputs
from engine.models.rotary import LENGTH_DEPENDENT
from kernels.integers import ceil_div

logger = logging.getLogger(__name__)

_LAYER_TYPES = {"full_attention", "sliding_attention"}
# Tokens beyond a sliding window that `verify` looks at, and the longest sequence that it can afford on each device.
_BEYOND_WINDOW = 24
_SHORT, _LONG = 17, 48
_AFFORDABLE = {"cpu": 640, "cuda": 4608}
# How far logits may be from eager attention's, relative to their spread: at worst in float32, in the median below.
_FLOAT32_TOLERANCE, _HALF_TOLERANCE = 1e-3, 5e-2


class GenericDecoder(Decoder):
    """A transformers model in our hands. `attention_layers` are found by running it once."""

    def __init__(self, model: Any, name: str) -> None:
        """Take a loaded model whose attention goes by `name`; raises `UnsupportedModel`."""
        super().__init__()
        self.model = model
        self._name = name
        self._step: StepAttention | None = None
        self._calls = 0
        _register(name, self)
        self._takes_rows = "logits_to_keep" in inspect.signature(model.forward).parameters
        text_config = model.config.get_text_config()
        self.max_positions = max_positions(text_config)
        self._recorded: list[AttentionLayer] | None = []
        tokens = torch.arange(2, device=model.device)
        with torch.no_grad():
            self.vocab_size = self._run(TokenInputs(tokens, tokens, tokens + 1)).shape[-1]
        self.attention_layers, self._recorded = self._recorded, None
        if not self.attention_layers:
            raise UnsupportedModel("it does not call transformers' attention interface")

    @classmethod
    def load(cls, config: Any, directory: Path | None, *, dtype: torch.dtype, device: torch.device) -> GenericDecoder:
        """Load the safetensors in `directory`, or none at all; raises `ModelError`."""
        from transformers import AutoModelForCausalLM

        reason = refusal(config)
        if reason is not None:
            raise _unsupported(config, reason)
        name = f"pagemill_{uuid4().hex}"
        _register(name, None)
        options = {"dtype": dtype, "attn_implementation": name, "trust_remote_code": False}
        try:
            if directory is None:
                model = AutoModelForCausalLM.from_config(config, **options)
            else:
                model, info = AutoModelForCausalLM.from_pretrained(
                    directory, config=config, use_safetensors=True, output_loading_info=True, **options
                )
                _check_loading(info)
            return cls(model.to(device).requires_grad_(False).eval(), name)
        except InvalidWeights:
            raise
        except UnsupportedModel as error:
            raise _unsupported(config, error.message) from error
        except Exception as error:
            raise _unsupported(config, f"transformers cannot run it: {error}") from error

    def forward(self, inputs: TokenInputs, attention: StepAttention) -> Tensor:
        self._step = attention
        try:
            return self._run(inputs)
        finally:
            self._step = None

    def _run(self, inputs: TokenInputs) -> Tensor:
        self._calls = 0
        rows = {"logits_to_keep": inputs.logit_rows} if self._takes_rows and inputs.logit_rows is not None else {}
        output = self.model(
            input_ids=inputs.token_ids[None], position_ids=inputs.positions[None], use_cache=False, **rows
        )
        logits: Tensor = output.logits[0]
        return logits if rows else inputs.select(logits)

    def attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        is_causal: bool | None = None,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        """What the model calls: query `[1, H, T, D]`, key and value `[1, KH, T, D]`; returns `[1, T, H, D]`.

        A mask is ignored, since ours follows from the positions; `verify` shows whether the model meant more by it.
        """
        index, self._calls = self._calls, self._calls + 1
        query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        if self._recorded is not None:
            self._recorded.append(
                _layer(module, index, query, key, value, scaling, sliding_window, softcap, is_causal=is_causal)
            )
            return query.new_zeros(1, len(query), query.shape[1], value.shape[2]), None
        assert self._step is not None
        return self._step(self.attention_layers[index], query, key, value, s_aux)[None], None

    @torch.no_grad()
    def eager(self, token_ids: Sequence[int]) -> Tensor:
        """Logits `[T, vocab]` of one sequence by the model's own attention."""
        self.model.set_attn_implementation("eager")
        try:
            logits: Tensor = self.model(
                input_ids=torch.tensor([token_ids], device=self.model.device), use_cache=False
            ).logits[0]
        finally:
            self.model.set_attn_implementation(self._name)
        return logits.float()


def _unsupported(config: Any, reason: str) -> UnsupportedModel:
    return UnsupportedModel(f"models of the type {config.model_type!r} are not supported: {reason}")


def refusal(config: Any) -> str | None:
    """Why a model of this configuration cannot run here, as far as the configuration tells; None when it may."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    text = config.get_text_config()
    if config.is_encoder_decoder:
        return "it is an encoder-decoder, and only decoders are served"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "transformers has no causal language model for it"
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    layer_types = set(getattr(text, "layer_types", None) or ())
    if getattr(model_class, "_is_stateful", False) or any("linear" in kind or "mamba" in kind for kind in layer_types):
        return "it is recurrent, and its state cannot be kept in a paged cache"
    alibi = getattr(text, "alibi", False) or getattr(getattr(text, "attn_config", None), "alibi", False)
    if alibi or text.model_type == "bloom":
        return "it biases attention by distance (ALiBi), which the attention here does not do"
    if layer_types - _LAYER_TYPES:
        return f"it has layers of the kind {', '.join(sorted(layer_types - _LAYER_TYPES))}"
    if not model_class._can_set_attn_implementation():
        return "its code in transformers does not use the attention interface"
    kinds = {rope.get("rope_type") for rope in _ropes(text)}
    if kinds & LENGTH_DEPENDENT:
        return "its rotary embeddings depend on the length of each sequence, which transformers takes from the batch"
    return None


def max_positions(config: Any) -> int:
    """Positions that a model was made for; raises `UnsupportedModel` when its configuration does not say."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    raise UnsupportedModel("its configuration does not say how many positions it has")


def verify(model: GenericDecoder, run: Callable[[Batch, int], Tensor], block_size: int) -> None:
    """Compare the engine's attention with the model's own; raises `UnsupportedModel` when they differ.

    `run(batch, num_blocks)` runs batches on a cache of at least so many blocks, the same one at each call.
    """
    window = max((layer.sliding_window or 0 for layer in model.attention_layers), default=0)
    declared = getattr(model.model.config.get_text_config(), "sliding_window", None)
    long = max(_LONG, window + _BEYOND_WINDOW, (declared or 0) + _BEYOND_WINDOW)
    affordable = min(_AFFORDABLE.get(model.model.device.type, _LONG), model.max_positions)
    if long > affordable:
        long = min(_LONG, affordable)
        logger.warning(
            "a sliding window of %s tokens is taken on trust: checking it costs too much", declared or window
        )
    generator = torch.Generator().manual_seed(0)
    sequences = [
        torch.randint(model.vocab_size, (length,), generator=generator).tolist()
        for length in (long, min(_SHORT, affordable))
    ]
    try:
        expected = [model.eager(tokens) for tokens in sequences]
        found = _run_in_pieces(sequences, run, block_size)
    except Exception as error:
        raise _unsupported(model.model.config, f"it does not run on a paged cache: {error}") from error
    for ours, theirs in zip(found, expected, strict=True):
        spread = (theirs - theirs.mean(dim=-1, keepdim=True)).norm(dim=-1).clamp(min=1e-20)
        distance = (ours - theirs).norm(dim=-1) / spread
        # The last rows are those that a window matters to.
        is_full = next(model.parameters()).dtype is torch.float32
        difference = float(distance.max()) if is_full else float(distance[-_BEYOND_WINDOW:].median())
        # Written so that NaN is refused, too.
        if not difference <= (_FLOAT32_TOLERANCE if is_full else _HALF_TOLERANCE):
            raise _unsupported(
                model.model.config,
                f"its logits on a paged cache differ from its own by {difference:.2g} of their spread, "
                "so that it must do more with its sequences than attend",
            )


def _run_in_pieces(
    sequences: Sequence[Sequence[int]], run: Callable[[Batch, int], Tensor], block_size: int
) -> list[Tensor]:
    """All logits of the sequences, run side by side: a first chunk, the rest but one, the last token."""
    blocks = [ceil_div(len(tokens), block_size) for tokens in sequences]
    tables = [range(sum(blocks[:place]), sum(blocks[: place + 1])) for place in range(len(blocks))]
    pieces: list[list[Tensor]] = [[] for _ in sequences]
    for step in range(3):
        entries = []
        for tokens, table in zip(sequences, tables, strict=True):
            cuts = [0, len(tokens) // 2, len(tokens) - 1, len(tokens)]
            part = tokens[cuts[step] : cuts[step + 1]]
            entries.append(BatchEntry(part, cuts[step], table, num_logits=len(part)))
        logits = run(Batch(entries), sum(blocks))
        for place, rows in enumerate(torch.split(logits, [len(entry.token_ids) for entry in entries])):
            pieces[place].append(rows)
    return [torch.cat(parts) for parts in pieces]


def _layer(
    module: Any,
    index: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
    *,
    is_causal: bool | None,
) -> AttentionLayer:
    if not (is_causal if is_causal is not None else getattr(module, "is_causal", True)):
        raise UnsupportedModel("its attention looks ahead: it is no causal language model")
    if len(key) != len(query):
        raise UnsupportedModel("its attention looks at something else than its tokens")
    head_dim = query.shape[2]
    return AttentionLayer(
        index,
        query.shape[1],
        key.shape[1],
        head_dim,
        value.shape[2],
        head_dim**-0.5 if scaling is None else float(scaling),
        sliding_window or None,
        softcap or None,
    )


def _register(name: str, model: GenericDecoder | None) -> None:
    """Let transformers find the model's attention by its name, without keeping the model alive for it."""
    from transformers import AttentionInterface

    if model is None:
        AttentionInterface.register(name, _not_yet)
        return
    reference = weakref.ref(model)

    def attend(module: Any, *args: Any, **options: Any) -> tuple[Tensor, None]:
        owner = reference()
        assert owner is not None
        return owner.attend(module, *args, **options)

    AttentionInterface.register(name, attend)
    weakref.finalize(model, AttentionInterface._global_mapping.pop, name, None)


def _not_yet(*args: Any, **options: Any) -> tuple[Tensor, None]:
    raise UnsupportedModel("the model attends while it is being built")


def _check_loading(info: Any) -> None:
    for keys, says in (
        ("missing_keys", "the checkpoint lacks"),
        ("unexpected_keys", "the checkpoint holds weights that the model does not know:"),
        ("mismatched_keys", "the checkpoint holds weights of other shapes:"),
    ):
        names = sorted(str(key) for key in info.get(keys) or ())
        if keys == "unexpected_keys":
            names = [name for name in names if not HARMLESS.fullmatch(name)]
        if names:
            raise InvalidWeights(f"{says} {', '.join(names[:5])}" + (f" and {len(names) - 5} more" * (len(names) > 5)))
    if info.get("error_msgs"):
        raise InvalidWeights("; ".join(info["error_msgs"]))


def _ropes(config: Any) -> list[dict[str, Any]]:
    """The rotary parameters of a configuration, which may be one set for each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    return nested or [rope]
