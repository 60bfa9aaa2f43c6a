"""Encoders as base models: loading them, and their forward over whole packed sequences.

An encoder answers Classify and Embed. What is hosted is transformers' model without a head ("BertModel"); the head of a
ForSequenceClassification checkpoint becomes the base's own (heads.py), so that adapters can bring other ones.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Any

import msgspec
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from graftwork_plugins.heads import ENCODERS, HeadLayout, head_of, layout_of
from graftwork_server.engine.attention import bidirectional, packed
from graftwork_server.engine.changes import ChangeableModule, changeable_modules, hook_changes, record_row_dims
from graftwork_server.engine.describe import fingerprint
from graftwork_server.engine.heads import bind_head
from graftwork_server.engine.model import (
    BaseModel,
    EngineModel,
    load_base,
)
from graftwork_server.engine.native import NativeKernels, native_kernels
from graftwork_server.engine.pooling import collect, head_for
from graftwork_server.engine.routing import Routing
from graftwork_server.engine.runner import ChunkLogits, packing_order, spans_of
from graftwork_server.engine.sentence_files import asked_pooling
from graftwork_server.engine.sequence import ScheduledChunk, Sequence
from graftwork_server.engine.tokenizer import resolved_tokenizer
from graftwork_server.engine.weights import SharedWeights
from graftwork_server.errors import FailedPrecondition
from graftwork_server.text import ModelFacts
from graftwork_server.types import ModelInfo

log = logging.getLogger("graftwork.engine")

_PROBE_ROWS = ([3, 1, 4, 1, 5], [2, 7, 1, 8, 2, 8, 1, 8])
"""13 tokens: a number that no dimension of a model is likely to have, see record_row_dims."""
_PROBE_TOLERANCE = 2e-3
"""Largest difference of the probe's hidden states, packed against one by one, in float32."""
_ROUNDED_PROBE_TOLERANCE = 0.1
"""The same for coarser dtypes, as a mean."""


class EncoderModel(EngineModel):
    """An encoder without its head, its linears wrapped and its attention over packed rows."""

    def __init__(self, model: torch.nn.Module, layout: HeadLayout, kernels: NativeKernels | None = None) -> None:
        super().__init__(model, kernels)
        any_model: Any = model
        any_model.set_attn_implementation(bidirectional.NAME)
        if getattr(any_model, "pooler", None) is not None:
            any_model.pooler.forward = lambda states: None  # it takes the first packed token for the only sequence's
        embeddings = any_model.embeddings
        counts_from_padding = hasattr(embeddings, "create_position_ids_from_input_ids")
        self.padding_idx: int | None = int(embeddings.padding_idx) if counts_from_padding else None
        """RoBERTa: positions begin behind this one, and tokens with this id do not count."""
        self.token_types = int(getattr(any_model.config, "type_vocab_size", 0))
        """How many types of tokens it knows; up to 1: it takes no token_type_ids."""
        if layout.trunk_dense is not None:
            self.head_modules = (layout.trunk_dense,)
            for group in self.groups:
                group.is_output = group.names == [layout.trunk_dense]

    def states(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        token_type_ids: torch.Tensor,
        cu_seqlens: SequenceOf[int],
        tokens: Routing | None,
    ) -> torch.Tensor:
        """input_ids, position_ids, token_type_ids [tokens] of whole sequences -> hidden states [tokens, hidden]."""
        types = {"token_type_ids": token_type_ids[None].clamp(max=self.token_types - 1)} if self.token_types > 1 else {}
        self.step.tokens = tokens or None
        hooks = hook_changes(self.changeable, tokens.changed, ()) if tokens is not None else []
        try:
            with packed.packed_rows(cu_seqlens):
                output = self.model(input_ids=input_ids[None], position_ids=position_ids[None], **types)
        finally:
            for hook in hooks:
                hook.remove()
            for group in self.groups:
                group.forget()
        states: torch.Tensor = output[0][0]
        return states

    def before_head(self, states: torch.Tensor, outputs: Routing | None) -> torch.Tensor:
        """states [n, hidden] through the layer of the base that stands before a head, routed by `outputs`."""
        self.step.outputs = outputs or None
        hooks = hook_changes(self.changeable, (), outputs.changed) if outputs is not None else []
        try:
            result: torch.Tensor = self.model.get_submodule(self.head_modules[0])(states.to(self.dtype))
        finally:
            for hook in hooks:
                hook.remove()
        return result.float()

    def positions(self, tokens: SequenceOf[int]) -> list[int]:
        """The position ids that the model gives the tokens of one sequence."""
        if self.padding_idx is None:
            return list(range(len(tokens)))
        counts = itertools.accumulate(int(token != self.padding_idx) for token in tokens)
        pad = self.padding_idx
        return [pad if token == pad else pad + count for token, count in zip(tokens, counts, strict=True)]

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        dtype: torch.dtype = self.model.dtype  # type: ignore[assignment]
        return dtype


class EncoderRunner:
    """Runs whole sequences, with any mix of adapters, in one forward. Runner's counterpart for encoders."""

    def __init__(self, base: BaseModel) -> None:
        assert isinstance(base.engine_model, EncoderModel)  # the caller chose this runner for it
        self._model = base.engine_model
        self._head = base.head
        self._device = base.device

    def run(self, chunks: SequenceOf[ScheduledChunk]) -> list[ChunkLogits]:
        """Leaves each sequence's state in it; there are no logits."""
        ordered = sorted(chunks, key=packing_order)
        with torch.inference_mode():
            counts = [chunk.count for chunk in ordered]
            states = self._model.states(
                self._tensor(token for chunk in ordered for token in chunk.sequence.tokens),
                self._tensor(position for c in ordered for position in self._model.positions(c.sequence.tokens)),
                self._tensor(kind for chunk in ordered for kind in _token_types(chunk.sequence)),
                [0, *itertools.accumulate(counts)],
                Routing(spans_of(ordered, counts), self._device, self._model.kernels),
            )
            for chunk, part in zip(ordered, states.split(counts), strict=True):
                collect(chunk.sequence, head_for(chunk.sequence, self._head), 0, part)
            self._run_before_heads(ordered)
        return [ChunkLogits(chunk, torch.empty(0, 0)) for chunk in ordered]

    def discard(self, blocks: SequenceOf[int]) -> None:
        """Nothing is left of a sequence with values that are not finite: there are no blocks."""

    def _run_before_heads(self, chunks: SequenceOf[ScheduledChunk]) -> None:
        heads = [head_for(chunk.sequence, self._head) for chunk in chunks]
        counts = [int(head is not None and head.dense_module is not None) for head in heads]
        sequences = [chunk.sequence for chunk, count in zip(chunks, counts, strict=True) if count]
        if not sequences:
            return
        states = torch.stack([sequence.state for sequence in sequences if sequence.state is not None])
        outputs = Routing(spans_of(chunks, counts), self._device, self._model.kernels)
        for sequence, state in zip(sequences, self._model.before_head(states, outputs), strict=True):
            sequence.state = state

    def _tensor(self, values: Iterable[int]) -> torch.Tensor:
        return torch.tensor(list(values), device=self._device)


def _token_types(sequence: Sequence) -> SequenceOf[int]:
    pool = sequence.request.pool
    return pool.token_type_ids if pool is not None and pool.token_type_ids else [0] * len(sequence.tokens)


# ---------------------------------------------------------------------------------------------- loading


def load_model(
    source: str,
    device: torch.device,
    dtype: torch.dtype,
    cache_dir: Path,
    native: bool = True,
    quantization: str = "none",
) -> BaseModel:
    """Loads an encoder, or else a causal model as load_base does; with what Classify and Embed need to know of it.

    Raises FailedPrecondition, saying what is wrong, if it cannot be served.
    """
    config = _config(source)
    if config is not None and config.model_type in ENCODERS and not getattr(config, "is_decoder", False):
        if quantization != "none":
            raise FailedPrecondition(
                f"{source} is a {config.model_type} encoder, which is not quantised; start without --quantization",
                reason="MODEL_UNSUPPORTED",
            )
        return _load_encoder(source, config, device, dtype, cache_dir, native)
    if config is not None and _is_classifier(config):
        raise FailedPrecondition(
            f"{source} is a {config.architectures[0]}: a decoder with a head and no output layer. Serve the causal "
            "model that it was made from, and the head as an adapter (PEFT, task_type SEQ_CLS); classifiers are served "
            f"as bases where they are encoders ({', '.join(ENCODERS)})",
            reason="MODEL_UNSUPPORTED",
        )
    base = load_base(source, device, dtype, cache_dir, native, quantization)
    pooling, undone = asked_pooling(source, "last")
    info = msgspec.structs.replace(
        base.info, hidden_size=base.engine_model.hidden_size, default_pooling=pooling, undone_pooling=undone
    )
    return dataclasses.replace(base, info=info)


def _config(source: str) -> Any:
    """The configuration; None if it cannot be read, which load_base says better."""
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception:  # transformers raises OSError, ValueError, KeyError and others, as it happens
        return None


def _is_classifier(config: Any) -> bool:
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def _load_encoder(
    source: str, config: Any, device: torch.device, dtype: torch.dtype, cache_dir: Path, native: bool
) -> BaseModel:
    layout = layout_of(config.to_dict())
    if _is_classifier(config) and not layout.outputs:
        raise FailedPrecondition(
            f"{source} is a {config.architectures[0]}, whose head is not served; the encoder without it is, and "
            f"classifiers of {', '.join(name for name, known in ENCODERS.items() if known.outputs)}",
            reason="MODEL_UNSUPPORTED",
        )
    whole, missing = _from_pretrained(source, config, device, dtype)
    trunk = whole.base_model
    tensors = {name: tensor for name, tensor in whole.state_dict().items() if name.rpartition(".")[0] in layout.modules}
    with torch.no_grad():
        for name in missing:  # transformers makes them up, each time anew
            trunk.get_parameter(name).zero_()
    log.info("starting: probing %s, rows one by one and packed together", type(whole).__name__)
    expected, expected_logits = _probe(whole, trunk)
    print_of_base = fingerprint(trunk.config.to_dict(), trunk.state_dict() | tensors)
    weights = SharedWeights(trunk, device)
    model = EncoderModel(trunk, layout, native_kernels(device, dtype) if native else None)
    model.missing_modules = tuple({name.rpartition(".")[0] for name in missing})
    pooling, undone = asked_pooling(source, "mean")
    info = ModelInfo(
        fingerprint=print_of_base,
        source=source,
        architecture=type(whole).__name__,
        model_type=config.model_type,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        vocab_size=int(config.vocab_size),
        context_tokens=int(config.max_position_embeddings)
        - (0 if model.padding_idx is None else model.padding_idx + 1),
        parameter_count=sum(parameter.numel() for parameter in whole.parameters()),
        weight_bytes=weights.size_bytes,
        eos_token_ids=[],
        tokenizer_dir=resolved_tokenizer(
            source, cache_dir, print_of_base, ModelFacts(embedding_rows=int(config.vocab_size))
        ),
        kv_tokens=0,
        max_sequences=0,
        generates=False,
        hidden_size=model.hidden_size,
        default_pooling=pooling,
        undone_pooling=undone,
    )
    base = BaseModel(model, weights, info, [], [])
    if tensors:
        head = head_of(
            {name: tensor.cpu() for name, tensor in tensors.items()}, layout, config.to_dict(), "config.json"
        )
        base = dataclasses.replace(base, head=bind_head(base, [head], []))
    _check_probe(base, expected, expected_logits)
    return base


def _from_pretrained(source: str, config: Any, device: torch.device, dtype: torch.dtype) -> tuple[Any, list[str]]:
    """The model, and its parameters (by their names in the trunk) that the checkpoint has no weights for: a pooler's
    at most. Raises FailedPrecondition."""
    kind = AutoModelForSequenceClassification if _is_classifier(config) else AutoModel
    try:
        model, report = kind.from_pretrained(
            source,
            dtype=dtype,
            attn_implementation=bidirectional.NAME,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and safetensors' own, as it happens
        text = " ".join(str(error).split())[:300].rstrip(".")
        raise FailedPrecondition(
            f"cannot load the model {source!r}: {text}. It must be a directory with config.json and safetensors "
            "weights of an encoder",
            reason="MODEL_UNUSABLE",
        ) from None
    missing = sorted(report["missing_keys"])
    needed = [name for name in missing if kind is not AutoModel or not name.startswith("pooler.")]
    if needed:
        raise FailedPrecondition(
            f"cannot load the model {source!r}: the checkpoint has no {', '.join(needed[:3])}", reason="MODEL_UNUSABLE"
        )
    return model.to(device).eval().requires_grad_(False), missing


def _probe(whole: Any, trunk: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Last hidden states [tokens, hidden] of short rows run one by one with torch's own attention and transformers' own
    positions, and the head's logits [rows, labels] if there is one."""
    states, logits = [], []
    trunk.set_attn_implementation("eager")
    with torch.inference_mode():
        for row in _PROBE_ROWS:
            ids = torch.tensor([row], device=trunk.device) % trunk.config.vocab_size
            states.append(trunk(input_ids=ids)[0][0])
            if whole is not trunk:
                logits.append(whole(input_ids=ids).logits[0])
    trunk.set_attn_implementation(bidirectional.NAME)
    return torch.cat(states).float(), torch.stack(logits).float() if logits else None


def _check_probe(base: BaseModel, expected: torch.Tensor, expected_logits: torch.Tensor | None) -> None:
    """Runs the probe's rows packed into one forward, and refuses a model whose answers change by that."""
    model = base.engine_model
    assert isinstance(model, EncoderModel)  # _load_encoder made it
    rows = [[token % base.info.vocab_size for token in row] for row in _PROBE_ROWS]
    ids = torch.tensor([token for row in rows for token in row], device=base.device)
    positions = torch.tensor([position for row in rows for position in model.positions(row)], device=base.device)
    row_dims, hooks = record_row_dims(model.model, len(ids))
    with torch.inference_mode():
        cu_seqlens = [0, *itertools.accumulate(map(len, rows))]
        states = model.states(ids, positions, torch.zeros_like(ids), cu_seqlens, None)
        for hook in hooks:
            hook.remove()
        differences = [(states.float() - expected).abs()]
        if base.head is not None and expected_logits is not None:
            first = torch.stack([states[0], states[len(rows[0])]]).float()
            first = model.before_head(first, None) if base.head.dense_module is not None else first
            differences.append((base.head.logits(first) - expected_logits).abs())
    model.changeable = changeable_modules(model.model, row_dims, None)
    # RoBERTa's pooler is never run, but adapters of all linear layers have an update of it.
    for name, module in model.model.named_modules():
        if name in (*model.head_modules, "pooler.dense"):
            model.changeable[name] = ChangeableModule(module, 0, True)
    exact = base.dtype == torch.float32
    difference = max((d.max() if exact else d.mean()).item() for d in differences)
    if not difference <= (_PROBE_TOLERANCE if exact else _ROUNDED_PROBE_TOLERANCE):
        raise FailedPrecondition(
            f"{base.info.architecture} cannot be served: packing sequences into one forward changes its hidden states "
            f"by {difference:.2g}",
            reason="MODEL_UNSUPPORTED",
        )
