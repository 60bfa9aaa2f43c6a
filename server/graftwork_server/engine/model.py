"""Loading the base model and making it ready for packed forwards; building whole tuned checkpoints beside it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graftwork_server.engine.adapted_linear import LinearGroup, StepRouting, wrap_linears
from graftwork_server.engine.attention import paged
from graftwork_server.engine.attention.paged import AttentionPlan, Chunk, plan_attention
from graftwork_server.engine.attention.rotary import rope_borders, rotate_by_length, sequence_lengths
from graftwork_server.engine.changes import ChangeableModule, changeable_modules, hook_changes
from graftwork_server.engine.describe import fingerprint, plain_name
from graftwork_server.engine.fused_layers import AttentionSettings, fuse_layers
from graftwork_server.engine.fused_modules import fuse_modules
from graftwork_server.engine.kv_cache import KVCache, LayerShape
from graftwork_server.engine.native import NativeKernels, native_kernels
from graftwork_server.engine.pretrained import causal_model
from graftwork_server.engine.probe import PROBE_ROWS, logprobs_alone, logprobs_packed, probe_layers
from graftwork_server.engine.quantization import check_available, quantize_linears
from graftwork_server.engine.routing import Routing
from graftwork_server.engine.tokenizer import resolved_tokenizer
from graftwork_server.engine.triton_kernels import triton_kernels
from graftwork_server.engine.weights import SharedWeights, assign_tensors, empty_model, pack
from graftwork_server.errors import FailedPrecondition
from graftwork_server.text import ModelFacts
from graftwork_server.types import ModelInfo

if TYPE_CHECKING:
    from graftwork_server.engine.heads import BoundHead
    from graftwork_server.engine.triton_kernels.kernels import TritonKernels

log = logging.getLogger("graftwork.engine")

_PROBE_TOLERANCE = 2e-3
"""Largest difference of a probe's log probabilities, packed against one by one, in float32."""
_ROUNDED_PROBE_TOLERANCE = 0.25
"""The same for coarser dtypes, as a mean: rounding alone moves single values by more than 0.1."""


class EngineModel:
    """A transformers model whose linears are wrapped and whose attention is the paged one."""

    def __init__(self, model: torch.nn.Module, kernels: NativeKernels | None = None) -> None:
        self.model = model
        self.kernels = kernels
        self.triton: TritonKernels | None = None
        """The kernels of a base on CUDA."""
        self.step = StepRouting()
        self.groups: list[LinearGroup] = wrap_linears(model, self.step, kernels)
        if kernels is not None:
            fuse_modules(model, kernels)
        self.fused_layers: list[torch.nn.Module] = []
        """Layers that kernels compute whole (fused_layers.py)."""
        self.changeable: dict[str, ChangeableModule] = {}
        """Modules that adapters may change beyond low-rank products; the base's probe fills it in."""
        self.head_modules: tuple[str, ...] = ()
        """Linear layers that stand before a head: BERT's pooler."""
        self.missing_modules: tuple[str, ...] = ()
        """Those of them that the checkpoint has no weights for."""
        self.rope_borders = rope_borders(model)
        """Lengths up to which a sequence has other rotary frequencies than beyond (attention/rotary.py)."""
        model.set_attn_implementation(paged.NAME)  # type: ignore[operator]

    def fuse_layers(self, settings: list[AttentionSettings]) -> None:
        """Has kernels compute whole layers where they can; `settings` are by layer."""
        if self.kernels is not None:
            self.fused_layers = fuse_layers(self.model, self.groups, settings, self.step, self.kernels)

    def unfuse_layers(self) -> None:
        """Undoes fuse_layers."""
        for layer in self.fused_layers:
            del layer.forward
        self.fused_layers = []

    @property
    def trunk(self) -> torch.nn.Module:
        """What answers with the last hidden states, after the final norm."""
        trunk: torch.nn.Module = self.model.base_model  # type: ignore[assignment]
        return trunk

    @property
    def hidden_size(self) -> int:
        """Size of a hidden state."""
        return int(self.model.config.get_text_config().hidden_size)  # type: ignore[operator, union-attr]

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        keep: torch.Tensor,
        plan: AttentionPlan,
        tokens: Routing | None,
        outputs: Routing | None,
        lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """input_ids and position_ids [tokens], keep [kept] rows to make logits of -> logits [kept, vocabulary].

        `tokens` routes the packed rows and `outputs` the kept ones; None where no row has an adapter.
        lengths [tokens]: of the sequence that each row belongs to; None: each row is its sequence's last one.
        """
        self.step.tokens = tokens or None
        self.step.outputs = outputs or None
        self.step.plain = tokens is not None and bool(tokens.changed)
        hooks = []
        if tokens is not None and tokens.changed:
            hooks = hook_changes(self.changeable, tokens.changed, outputs.changed if outputs is not None else ())
        paged.set_plan(plan)
        try:
            with sequence_lengths(position_ids + 1 if lengths is None else lengths):
                output = self.model(
                    input_ids=input_ids[None], position_ids=position_ids[None], use_cache=False, logits_to_keep=keep
                )
        finally:
            paged.set_plan(None)
            for hook in hooks:
                hook.remove()
            for group in self.groups:
                group.forget()
        return output.logits[0]


@dataclass(frozen=True)
class BaseModel:
    """The resident base: ready to run, and what is to be known of it."""

    engine_model: EngineModel
    weights: SharedWeights
    info: ModelInfo
    layer_shapes: list[LayerShape]
    attention_settings: list[AttentionSettings]
    head: BoundHead | None = None
    """Of a base that is a classifier."""

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.weights.device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        dtype: torch.dtype = getattr(torch, self.info.dtype)
        return dtype


def choose_device(name: str) -> torch.device:
    """auto: cuda if there is one. Raises FailedPrecondition if cuda is asked for and missing."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise FailedPrecondition("--device cuda: torch sees no CUDA device; use cpu or auto", reason="DEVICE_MISSING")
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16 where the hardware multiplies it natively, else float32."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def load_base(
    source: str,
    device: torch.device,
    dtype: torch.dtype,
    cache_dir: Path,
    native: bool = True,
    quantization: str = "none",
) -> BaseModel:
    """Loads a directory; `native` takes the engine's own kernels where they can be had; `quantization`
    is none, nf4 or int8 (quantization.py).

    Raises FailedPrecondition, saying what is wrong, if it cannot be served.
    """
    check_available(quantization, device)
    model = causal_model(source, dtype)
    # Of the checkpoint, not of how it is served: an adapter fits the base quantised or not.
    print_of_base = fingerprint(model.config.to_dict(), model.state_dict())
    parameter_count = sum(parameter.numel() for parameter in model.parameters())
    if quantization != "none":
        log.info("starting: quantising the linear layers to %s", quantization)
    quantize_linears(model, quantization, device)
    model.to(device)
    log.info("starting: probing %s, rows one by one and packed together", type(model).__name__)
    shapes, settings = probe_layers(model)
    expected = logprobs_alone(model)
    if rotate_by_length(model):
        log.warning("dynamic NTK scaling begins beyond max_position_embeddings, where the context of this base ends")
    weights = SharedWeights(model, device, quantization)
    engine_model = EngineModel(model, native_kernels(device, dtype) if native else None)
    if native:
        engine_model.triton = triton_kernels(device, dtype, [group.out_features for group in engine_model.groups])
    # int8 rounds what goes into each layer: the smallest difference may become one of a 127th.
    _check_probe(engine_model, expected, exact=dtype == torch.float32 and quantization != "int8")
    _fuse_layers(engine_model, shapes, settings, device)
    config = model.config.get_text_config()
    ends = _eos_token_ids(model)
    info = ModelInfo(
        fingerprint=print_of_base,
        source=source,
        architecture=type(model).__name__,
        model_type=config.model_type,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        vocab_size=int(config.vocab_size),
        context_tokens=int(config.max_position_embeddings),
        parameter_count=parameter_count,
        weight_bytes=weights.size_bytes,
        eos_token_ids=ends,
        tokenizer_dir=resolved_tokenizer(source, cache_dir, print_of_base, ModelFacts(ends, int(config.vocab_size))),
        kv_tokens=0,
        max_sequences=0,
        quantization=quantization,
    )
    return BaseModel(engine_model, weights, info, shapes, settings)


def tuned_model(base: BaseModel, tensors: dict[str, torch.Tensor]) -> tuple[EngineModel, int]:
    """A model of the base's class over `tensors` and what it takes on the device in bytes; tensors equal to the base's
    are the base's own. Names and shapes must be those of the base (checked by the caller); a tensor that the base ties
    to another comes under its name only where the two differ."""
    state = unwrapped_state(base)
    chosen: dict[str, torch.Tensor] = {}
    own: dict[str, torch.Tensor] = {}
    for name, given in tensors.items():
        resident = state[name]
        tensor = given.to(base.device, resident.dtype)
        if torch.equal(tensor, resident):
            chosen[name] = resident
        else:
            own[name] = tensor
    packed_tensors = pack(own, base.device) if own else {}
    model = empty_model(base.engine_model.model.config)
    assign_tensors(model, chosen | packed_tensors)
    own_bytes = sum(tensor.nbytes for tensor in packed_tensors.values())
    tuned = EngineModel(model.eval().requires_grad_(False).to(base.device), base.engine_model.kernels)
    if base.engine_model.fused_layers:
        tuned.fuse_layers(base.attention_settings)
    return tuned, own_bytes


def resident_model(base: BaseModel) -> torch.nn.Module:
    """Another model over the base's own tensors, for a forward outside the step loop, on any thread: plain layers, and
    attention over one row."""
    model = empty_model(base.engine_model.model.config, base.info.quantization)
    state = unwrapped_state(base)
    assign_tensors(model, {entry.name: state[entry.name] for entry in base.weights.layout})
    return model.eval().requires_grad_(False).to(base.device)


def unwrapped_state(base: BaseModel) -> dict[str, torch.Tensor]:
    """The base's tensors by their names in the plain transformers model."""
    return {plain_name(name): tensor for name, tensor in base.engine_model.model.state_dict().items()}


def _check_probe(engine_model: EngineModel, expected: torch.Tensor, exact: bool) -> None:
    """Runs the probe's rows packed into one forward and refuses a model whose answers change by that: it would be
    served wrong answers (a layer that mixes tokens outside attention, say)."""
    model: Any = engine_model.model
    found, row_dims = logprobs_packed(model)
    engine_model.changeable = changeable_modules(model, row_dims, model.get_output_embeddings())
    for group in engine_model.groups:
        group.forget()
    differences = (found - expected).abs()
    difference = (differences.max() if exact else differences.mean()).item()
    if not difference <= (_PROBE_TOLERANCE if exact else _ROUNDED_PROBE_TOLERANCE):
        raise FailedPrecondition(
            f"{type(model).__name__} cannot be served: packing sequences into one forward changes its log "
            f"probabilities by {difference:.2g}",
            reason="MODEL_UNSUPPORTED",
        )


def _fuse_layers(
    engine_model: EngineModel, shapes: list[LayerShape], settings: list[AttentionSettings], device: torch.device
) -> None:
    """Has kernels compute whole layers, unless that changes a trial's answers, for prompts and for decoded tokens."""
    if engine_model.kernels is None:
        return
    expected = _trial_logprobs(engine_model, shapes, device)
    engine_model.fuse_layers(settings)
    difference = (_trial_logprobs(engine_model, shapes, device) - expected).abs().mean().item()
    if engine_model.fused_layers and not difference <= _ROUNDED_PROBE_TOLERANCE / 4:
        log.warning("whole layers are not computed by kernels: log probabilities would differ by %.2g", difference)
        engine_model.unfuse_layers()


def _trial_logprobs(engine_model: EngineModel, shapes: list[LayerShape], device: torch.device) -> torch.Tensor:
    """Log probabilities [tokens, vocabulary] of the probe rows on a small KV cache, their last tokens decoded."""
    model: Any = engine_model.model
    vocab = model.config.get_text_config().vocab_size
    cache = KVCache(shapes, len(PROBE_ROWS), model.dtype, device, engine_model.kernels)
    prompts = [Chunk([index], 0, len(row) - 1) for index, row in enumerate(PROBE_ROWS)]
    last = [Chunk([index], len(row) - 1, 1) for index, row in enumerate(PROBE_ROWS)]
    logits = []
    with torch.inference_mode():
        for chunks in (prompts, last):
            ids = [PROBE_ROWS[c.block_table[0]][p] % vocab for c in chunks for p in range(c.start, c.start + c.count)]
            positions = [position for c in chunks for position in range(c.start, c.start + c.count)]
            plan = plan_attention(cache, chunks, device)
            keep = torch.arange(len(ids), device=device)
            tensors = (torch.tensor(ids, device=device), torch.tensor(positions, device=device))
            logits.append(engine_model.forward(*tensors, keep, plan, None, None))
    return torch.cat(logits).float().log_softmax(-1)


def _eos_token_ids(model: Any) -> list[int]:
    """Those of generation_config.json, or else config.json, that the model has a row for: no other can come."""
    text_config = model.config.get_text_config()
    for config in (getattr(model, "generation_config", None), text_config):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            ids = ids if isinstance(ids, list | tuple) else [ids]
            return [int(id) for id in ids if id < text_config.vocab_size]
    return []
