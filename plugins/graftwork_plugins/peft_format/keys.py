"""Which keys of PEFT's adapter_config.json matter: the one rule of all strategies that read it.

The document comes from a client, and from many tools. A key is of one of four kinds:

1. Read: serving computes with it. Whoever reads it checks its value.
2. Descriptive: it says what made the adapter, for what base, or how it was begun and trained. The tensors hold the
   result already, so that any value is accepted. By name (DESCRIPTIVE), or by the form of the name (_FORMS).
3. The detail of an option: read by PEFT only where the option is set, and the option is checked under its own name.
   loftq_config is one of init_lora_weights = "loftq". Any value is accepted.
4. Every other key, of PEFT's or of anybody's: it may change what the adapter computes. Accepted with a value that says
   "not used" (null, false, empty); anything else is refused, and the refusal names the key.

PEFT itself ignores keys that it does not know. That is not done here: an adapter that needs what we do not know would
be served wrong, and nobody would be told.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any

from graftwork_plugins import ArtifactError
from graftwork_plugins.peft_format.values import require, shown

DESCRIPTIVE = frozenset(
    """
    auto_mapping base_model_name_or_path revision peft_version inference_mode fan_in_fan_out
    transformers_version library_name framework architectures model_type tokenizer_class torch_dtype dtype
    name title description comment comments notes author license language tags datasets dataset created_at timestamp
    metadata version merge_weights
    """.split()  # noqa: SIM905 - one name a line would fill a page
)
"""Of any peft_type. fan_in_fan_out says how the base stores its weights, which the base itself shows."""

LORA_DESCRIPTIVE = frozenset(
    """
    lora_dropout runtime_config velora_config learning_rate num_train_epochs max_seq_length seed
    """.split()  # noqa: SIM905 - as above
)
"""velora_config: how activations are kept for the backward pass; the forward is LoRA's."""

LORA_DETAILS = frozenset(
    "loftq_config corda_config eva_config lora_ga_config qalora_group_size megatron_core".split()  # noqa: SIM905
)
"""Of init_lora_weights, use_qalora and megatron_config."""

_FORMS = re.compile(
    r"_.*"  # private to whoever wrote it, as transformers' own _name_or_path
    r"|unsloth_.*"
    r"|.*_(version|name|name_or_path|url|comment)"  # what made it, from what
    r"|.*_(dropout|lr|lr_ratio|seed)"  # how it was trained
    r"|.*_dtype"  # in which the tensors were: they say so themselves
)

_USED_WHERE_EMPTY = frozenset({"kasa_config", "arrow_config", "monteclora_config"})
"""Options of PEFT that an empty object switches on, with its defaults."""


def refuse_unknown(document: Mapping[str, Any], known: frozenset[str]) -> None:
    """Raises ArtifactError for the first key of the fourth kind that is used. known: the keys of the other three."""
    for key, value in document.items():
        if key in known or _FORMS.fullmatch(key) or value is None or value is False:
            continue
        if value in ({}, [], "", 0) and key not in _USED_WHERE_EMPTY:
            continue
        raise ArtifactError(
            key, f"adapter_config.json: {key} = {shown(value)} is not supported; null or false is accepted"
        )


def check_auto_mapping(document: Mapping[str, Any]) -> None:
    """PEFT describes the base's class there, and other tools themselves. Nothing of it is imported here, but PEFT's
    AutoPeftModel imports what it names: a module of Python's own is an attempt at those who download the adapter.

    Raises ArtifactError.
    """
    value = document.get("auto_mapping")
    names = [text for text in value.values() if isinstance(text, str)] if isinstance(value, dict) else []
    fits = (value is None or isinstance(value, dict)) and not any(
        name.partition(".")[0] in sys.stdlib_module_names for name in names
    )
    require(document, "auto_mapping", fits, "null, or an object that describes the base's class, as PEFT writes it")
