"""Encoders as base models: loading them, and their forward over whole packed sequences.

An encoder answers Classify and Embed. What is hosted is transformers' model without a head ("BertModel"); the head of a
ForSequenceClassification checkpoint becomes the base's own (bind_head.py), so that adapters can bring other ones.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoModelForSequenceClassification

from graftwork_plugins import ENCODERS, head_of, layout_of
from graftwork_server.base.describe import fingerprint
from graftwork_server.base.sentence_files import asked_pooling
from graftwork_server.base.tokenizer import resolved_tokenizer
from graftwork_server.base.weights import SharedWeights
from graftwork_server.engine.adapters.bind_head import bind_head
from graftwork_server.engine.models.base import BaseModel
from graftwork_server.errors import FailedPrecondition
from graftwork_server.kernels.attention import bidirectional
from graftwork_server.kernels.native import native_kernels
from graftwork_server.layers.changes import ChangeableModule, changeable_modules, record_row_dims
from graftwork_server.layers.encoder import EncoderModel
from graftwork_server.text import ModelFacts
from graftwork_server.types import ModelInfo

log = logging.getLogger("graftwork.engine")
_PROBE_ROWS = ([3, 1, 4, 1, 5], [2, 7, 1, 8, 2, 8, 1, 8])
"""13 tokens: a number that no dimension of a model is likely to have, see record_row_dims."""
_PROBE_TOLERANCE = 2e-3
"""Largest difference of the probe's hidden states, packed against one by one, in float32."""
_ROUNDED_PROBE_TOLERANCE = 0.1
"""The same for coarser dtypes, as a mean."""


def load_encoder(
    source: str, config: Any, device: torch.device, dtype: torch.dtype, cache_dir: Path, native: bool
) -> BaseModel:
    """Loads an encoder as load_model does."""
    layout = layout_of(config.to_dict())
    if is_classifier(config) and not layout.outputs:
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
    kind = AutoModelForSequenceClassification if is_classifier(config) else AutoModel
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
    assert isinstance(model, EncoderModel)  # load_encoder made it
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


def is_classifier(config: Any) -> bool:
    """Whether the checkpoint of `config` (transformers' configuration) has a classification head."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
