"""Encoders as base models: loading them, and their forward over whole packed sequences.

An encoder answers Classify and Embed. What is hosted is transformers' model without a head ("BertModel"); the head of a
ForSequenceClassification checkpoint becomes the base's own, so that adapters can bring other ones.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from pathlib import Path
from typing import Any

import torch

from graftwork_plugins import ENCODERS, head_of, layout_of
from graftwork_server.base.describe import fingerprint
from graftwork_server.base.pretrained import encoder_model
from graftwork_server.base.sentence_files import asked_pooling
from graftwork_server.base.weights import SharedWeights
from graftwork_server.errors import FailedPrecondition
from graftwork_server.kernels.attention import bidirectional
from graftwork_server.kernels.native import native_kernels
from graftwork_server.layers.binding.head import bind_head
from graftwork_server.layers.changes import ChangeableModule, changeable_modules, record_row_dims
from graftwork_server.layers.models.base_model import BaseModel, model_info
from graftwork_server.layers.models.encoder_model import EncoderModel
from graftwork_server.layers.models.probe import PROBE_ROWS, check_packing

log = logging.getLogger("graftwork.engine")
_ROUNDED_MEAN = 0.1
"""What hidden states of dtypes coarser than float32 may differ by."""


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
    whole, missing = encoder_model(source, dtype, with_head=is_classifier(config))
    whole.to(device)
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
    before_first = 0 if model.padding_idx is None else model.padding_idx + 1
    info = model_info(
        whole,
        source,
        dtype,
        print_of_base,
        weights,
        cache_dir,
        parameter_count=sum(parameter.numel() for parameter in whole.parameters()),
        context_tokens=int(config.max_position_embeddings) - before_first,
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


def _probe(whole: Any, trunk: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Last hidden states [tokens, hidden] of short rows run one by one with torch's own attention and transformers' own
    positions, and the head's logits [rows, labels] if there is one."""
    states, logits = [], []
    trunk.set_attn_implementation("eager")
    with torch.inference_mode():
        for row in PROBE_ROWS:
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
    rows = [[token % base.info.vocab_size for token in row] for row in PROBE_ROWS]
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
    check_packing(base.info.architecture, "hidden states", differences, exact=exact, rounded_mean=_ROUNDED_MEAN)


def is_classifier(config: Any) -> bool:
    """Whether the checkpoint of `config` (transformers' configuration) has a classification head."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
