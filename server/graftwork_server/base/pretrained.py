"""A model from its files, by transformers; what they hold or ask for and is not done is refused, or said."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from graftwork_server.errors import FailedPrecondition
from graftwork_server.kernels.attention import bidirectional, packed

log = logging.getLogger("graftwork.engine")

_DONE_OF_GENERATION_CONFIG = {
    *("eos_token_id", "bos_token_id", "pad_token_id", "transformers_version", "_from_model_config", "use_cache"),
    *("output_attentions", "output_hidden_states", "return_dict_in_generate", "cache_implementation"),
}
"""Keys of it that are read, or change no answer."""


def causal_model(source: str, dtype: torch.dtype) -> Any:
    """The transformers model of a directory, frozen, in evaluation mode, with attention over packed rows.

    Raises FailedPrecondition, saying what is wrong: MODEL_UNSUPPORTED, MODEL_UNUSABLE. Logs what is left out.
    """
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if config.is_encoder_decoder or getattr(config.get_text_config(), "use_bidirectional_attention", False):
            raise FailedPrecondition(
                f"{source} is a {config.model_type} model; decoder-only causal models are served",
                reason="MODEL_UNSUPPORTED",
            )
        if getattr(config, "quantization_config", None) is not None:
            raise FailedPrecondition(
                f"the weights of {source} are stored quantised; serve the checkpoint that they were made of, with "
                "--quantization",
                reason="MODEL_UNSUPPORTED",
            )
    except FailedPrecondition:
        raise
    except Exception as error:
        raise _unusable(source, "a causal language model", error) from None
    model, report = _loaded(AutoModelForCausalLM, source, dtype, packed.NAME, "a causal language model")
    if missing := sorted(report["missing_keys"]):
        # transformers makes them up, each time anew.
        raise FailedPrecondition(
            f"cannot load the model {source!r}: no safetensors file has {_named(missing)}", reason="MODEL_UNUSABLE"
        )
    _tell_what_is_not_done(model, sorted(report["unexpected_keys"]))
    return model.eval().requires_grad_(False)


def encoder_model(source: str, dtype: torch.dtype, *, with_head: bool) -> tuple[Any, list[str]]:
    """The transformers model of a directory, frozen, in evaluation mode, with attention over packed rows, and its
    parameters that the checkpoint has no weights for: a pooler's at most. with_head: a classifier.

    Raises FailedPrecondition (MODEL_UNUSABLE), saying what is wrong.
    """
    kind = AutoModelForSequenceClassification if with_head else AutoModel
    model, report = _loaded(kind, source, dtype, bidirectional.NAME, "an encoder")
    missing = sorted(report["missing_keys"])
    needed = [name for name in missing if with_head or not name.startswith("pooler.")]
    if needed:
        raise FailedPrecondition(
            f"cannot load the model {source!r}: the checkpoint has no {', '.join(needed[:3])}", reason="MODEL_UNUSABLE"
        )
    return model.eval().requires_grad_(False), missing


def _loaded(kind: Any, source: str, dtype: torch.dtype, attention: str, what: str) -> Any:
    """The model, and transformers' report of what the files have and lack."""
    try:
        return kind.from_pretrained(
            source,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise _unusable(source, what, error) from None


def _unusable(source: str, what: str, error: Exception) -> FailedPrecondition:
    # transformers raises OSError, ValueError, KeyError and safetensors' own, as it happens.
    text = " ".join(str(error).split())[:300].rstrip(".")
    return FailedPrecondition(
        f"cannot load the model {source!r}: {text}. It must be a directory with config.json and safetensors weights of "
        f"{what}",
        reason="MODEL_UNUSABLE",
    )


def _tell_what_is_not_done(model: Any, unexpected: list[str]) -> None:
    """Logs what the files hold or ask for beyond the model and the end of its texts."""
    if unexpected:
        log.warning("tensors that %s does not have are left out: %s", type(model).__name__, _named(unexpected))
    asked = model.generation_config.to_diff_dict() if model.generation_config is not None else {}
    if asked := sorted(asked.keys() - _DONE_OF_GENERATION_CONFIG):
        log.info("what generation_config.json says of %s is not applied: requests say it", _named(asked))


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
