"""What the files of sentence-transformers in a model's directory ask of Embed."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

log = logging.getLogger("graftwork.engine")

POOLINGS = ("cls", "max", "mean", "mean_sqrt_len", "weightedmean", "last")
"""As sentence-transformers has them. Several joined by "+" give their vectors one after another."""
_MODES = {
    "cls_token": "cls",
    "max_tokens": "max",
    "mean_tokens": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean_tokens": "weightedmean",
    "lasttoken": "last",
}
"""The files' names (after pooling_mode_) of the poolings."""
_DONE = ("Transformer", "Normalize")
"""Modules beside Pooling that Embed does: whether vectors are scaled to length 1 is the request's affair."""


def asked_pooling(source: str, otherwise: str) -> tuple[str, str]:
    """The pooling that the files ask for, several joined by "+", and what they ask for that Embed does not do ("": it
    does all). `otherwise` if the directory has no such files.

    Logs what a client has to do by itself.
    """
    folder = Path(source)
    try:
        modules = _read(folder / "modules.json")
        place, undone = ("1_Pooling", "") if modules is None else _modules(modules)
        config = _read(folder / place / "config.json")
        _tell_of_texts(folder, config)
    except (OSError, ValueError) as error:
        return otherwise, " ".join(str(error).split())[:200]
    if undone:
        return otherwise, undone
    if config is None:
        return otherwise, "" if modules is None else f"a Pooling in {place}, which is not there"
    return _pooling(config, f"{place}/config.json", otherwise)


def _read(file: Path) -> Any:
    """The JSON of a file; None if there is none. Raises OSError, ValueError naming the file."""
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file.name}, which is no JSON: {error}") from None


def _modules(modules: Any) -> tuple[str, str]:
    """The folder of the pooling, and what is not done."""
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        return "1_Pooling", "modules.json, which is no list of modules"
    kinds = [(str(module.get("type")).rpartition(".")[2], str(module.get("path"))) for module in modules]
    places = [path for kind, path in kinds if kind == "Pooling"]
    others = [f"{kind} ({path})" for kind, path in kinds if kind not in (*_DONE, "Pooling")]
    if others:
        return "1_Pooling", f"{', '.join(others)} in modules.json"
    return (places[0], "") if len(places) == 1 else ("1_Pooling", f"{len(places)} Pooling modules in modules.json")


def _pooling(config: Any, name: str, otherwise: str) -> tuple[str, str]:
    if not isinstance(config, Mapping):
        return otherwise, f"{name}, which is no object"
    prefix = "pooling_mode_"
    asked = [key.removeprefix(prefix) for key, value in config.items() if key.startswith(prefix) and value is True]
    if (mode := config.get("pooling_mode")) is not None:
        listed: Sequence[Any] = mode if isinstance(mode, list) else str(mode).split("+")
        asked = [str(one) for one in listed]
    known = [_MODES.get(one, one) for one in asked]
    unknown = [one for one in known if one not in POOLINGS]
    if unknown or not known:
        return otherwise, f"{', '.join(unknown) or 'no pooling at all'} in {name}"
    # The order in which sentence-transformers puts them one after another.
    return "+".join(one for one in POOLINGS if one in known), ""


def _tell_of_texts(folder: Path, pooling: Any) -> None:
    """Logs what sentence-transformers would do with a text before it is tokens, and Embed does not."""
    prompts = _read(folder / "config_sentence_transformers.json")
    name = prompts.get("default_prompt_name") if isinstance(prompts, Mapping) else None
    if name:
        log.warning("config_sentence_transformers.json names a prompt (%s) for every text: send texts with it", name)
    if isinstance(pooling, Mapping) and pooling.get("include_prompt") is False:
        log.warning("1_Pooling says include_prompt false: Embed pools all tokens, those of a prompt too")
    texts = _read(folder / "sentence_bert_config.json")
    if isinstance(texts, Mapping) and texts.get("do_lower_case"):
        log.warning("sentence_bert_config.json says do_lower_case: send texts in lower case")
    if isinstance(texts, Mapping) and texts.get("max_seq_length"):
        log.info("sentence_bert_config.json cuts texts at %s tokens; Embed does not", texts["max_seq_length"])
