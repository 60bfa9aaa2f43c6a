"""Which kind of base model the files are, and loading it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import msgspec
import torch
from transformers import AutoConfig

from graftwork_plugins import ENCODERS
from graftwork_server.base.sentence_files import asked_pooling
from graftwork_server.errors import FailedPrecondition
from graftwork_server.layers.models.base_model import BaseModel
from graftwork_server.layers.models.causal import load_base
from graftwork_server.layers.models.encoder import is_classifier, load_encoder


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
        return load_encoder(source, config, device, dtype, cache_dir, native)
    if config is not None and is_classifier(config):
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
