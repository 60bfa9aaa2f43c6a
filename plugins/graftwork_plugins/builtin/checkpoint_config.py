"""Which settings in a checkpoint's config.json matter: those that the forward depends on must be the base's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from graftwork_plugins import ArtifactError, BaseInfo

_DESCRIPTIVE = frozenset(
    """
    architectures transformers_version torch_dtype dtype use_cache return_dict output_attentions
    output_hidden_states chunk_size_feed_forward is_encoder_decoder id2label label2id num_labels problem_type
    bos_token_id eos_token_id pad_token_id cls_token_id sep_token_id decoder_start_token_id attention_dropout
    attn_pdrop embd_pdrop resid_pdrop hidden_dropout dropout initializer_range tokenizer_class max_length
    do_sample temperature top_p top_k num_beams pretraining_tp attn_implementation experts_implementation
    summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj n_ctx
    task_specific_params gradient_checkpointing tie_word_embeddings
    """.split()  # noqa: SIM905 - one name a line would fill a page
)
"""Keys of config.json that change nothing in the forward; what is tied is in the weights (strategies/full.py)."""

_LIMITS = frozenset({"max_position_embeddings", "n_positions", "n_ctx"})
"""How far positions go: a table of learned positions has its size in its tensor's shape, and rotary positions have no
end. What a kind of rotary positions derives from the limit is another matter (_derives_from_limit)."""


def check_config(config: Mapping[str, Any], base: BaseInfo) -> None:
    """Raises ArtifactError, naming the key, unless a checkpoint's configuration is the base's in all that matters.

    Both are read by transformers' own class, which fills in defaults and what older versions wrote otherwise. What the
    forward depends on must be equal; what describes (_DESCRIPTIVE, names that begin with "_") and what the class does
    not read may be anything.
    """
    _check_class(config, base)
    theirs, ours = _read_both(config, base)
    free = frozenset() if _derives_from_limit(ours) else _LIMITS
    for key, value in ours.items():
        if key not in free:
            _require_equal(key, theirs.get(key), value)


def _check_class(config: Mapping[str, Any], base: BaseInfo) -> None:
    """Both must be of one class of transformers'."""
    kind = config.get("model_type", base.config.get("model_type"))
    if kind != base.config.get("model_type"):
        raise ArtifactError(
            "model_type", f"config.json: model_type is {_short(kind)}; the base has {_short(base.config['model_type'])}"
        )
    architectures = config.get("architectures") or [base.architecture]
    # What wraps a model puts its own name before the class's: FSDPLlamaForCausalLM.
    fits = isinstance(architectures, list) and all(str(name).endswith(base.architecture) for name in architectures)
    if not fits:
        raise ArtifactError(
            "architectures", f"architectures is {_short(architectures)}; the base is {base.architecture}"
        )


def _read_both(config: Mapping[str, Any], base: BaseInfo) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keys that matter of the checkpoint's configuration and of the base's."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[base.config["model_type"]]
    given, ours = _relevant_keys(config), _relevant_keys(base.config)
    names = kind.attribute_map
    for key, value in given.items():
        # Before any class makes a list with so many entries.
        known = ours.get(names.get(key, key))
        if key.startswith(("num_", "n_")) and key not in _LIMITS and type(known) is type(value) is int:
            _require_equal(key, value, known)
    try:
        # Both as the class reads them: it may leave out what another setting makes meaningless.
        read = [_relevant_keys(kind.from_dict(dict(document)).to_dict()) for document in (given, ours)]
    except Exception as error:  # the classes raise ValueError, TypeError and errors of their own
        for key in given.keys() & ours.keys() - _LIMITS:
            if given[key] is not None:
                _require_equal(key, given[key], ours[key])
        text = " ".join(str(error).split())[:200]
        raise ArtifactError("config.json", f"config.json is none of a {base.config['model_type']}: {text}") from None
    return read[0], {key: value for key, value in read[1].items() if key in ours}


def _require_equal(key: str, value: Any, ours: Any) -> None:
    if not _are_equal(value, ours):
        raise ArtifactError(key, f"config.json: {key} is {_short(value)}; the base has {_short(ours)}")


def _relevant_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    result = {key: value for key, value in config.items() if key not in _DESCRIPTIVE and not key.startswith("_")}
    rope = result.get("rope_parameters")
    if isinstance(rope, dict):
        # "type" is the older name of rope_type, which the class adds.
        result["rope_parameters"] = {key: value for key, value in rope.items() if key != "type"}
    return result


def _derives_from_limit(config: Mapping[str, Any]) -> bool:
    """Whether the rotary frequencies depend on max_position_embeddings (transformers' modeling_rope_utils)."""
    rope = config.get("rope_parameters") or {}
    of_kinds_of_layers = [value for value in rope.values() if isinstance(value, dict)]
    for one in of_kinds_of_layers or [rope]:
        kind = one.get("rope_type", "default")
        by_factor = kind in ("yarn", "longrope") and one.get("factor") is not None
        if kind not in ("default", "linear", "llama3") and not by_factor:
            return True
    return False


def _are_equal(a: Any, b: Any) -> bool:
    """Equal as settings: a missing key and null are the same, and so are 1 and 1.0."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return all(_are_equal(a.get(key), b.get(key)) for key in {*a, *b})
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_are_equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 120 else text[:117] + "..."
