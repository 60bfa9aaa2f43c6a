"""Where the base model's files are: in the directory that was named, or in the hub library's cache.

The front asks local_dir at its start; the hub library, which takes a while to import, comes with what needs it.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from graftwork_server.errors import FailedPrecondition

log = logging.getLogger("graftwork.engine")

HUB_SECONDS = 10.0
"""Longest wait for the hub's first answer."""
_NEEDED = ("*.json", "*.txt", "*.model", "*.jinja", "model*.safetensors")
_ACCEPTED = (
    "accepted are a directory with config.json and safetensors weights, or a Hugging Face id such as org/name whose "
    "files are in the local cache or can be fetched"
)


def model_dir(source: str) -> str:
    """The directory with the files of `source`, a directory or a hub id.

    What the cache has whole is taken as it is: a restart serves the same base, network or not. What it has not is
    fetched. Raises FailedPrecondition (MODEL_UNUSABLE), at once where the hub cannot be reached.
    """
    if (local := local_dir(source)) is not None:
        return local
    from huggingface_hub.errors import HFValidationError

    try:
        return _cached(source) or _fetched(source)
    except HFValidationError:
        raise _unusable(source, "it is neither a directory nor in the form of an id") from None


def local_dir(source: str) -> str | None:
    """`source` if it is a directory with a model's config.json, None if it can only be a hub id.

    Raises FailedPrecondition (MODEL_UNUSABLE).
    """
    if Path(source).is_dir():
        if not (Path(source) / "config.json").is_file():
            raise _unusable(source, "it has no config.json")
        return source
    if Path(source).exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise _unusable(source, "it is not a directory")
    return None


def _cached(repo_id: str) -> str | None:
    """The cached files of the id's main branch, if configuration and weights are all there."""
    import huggingface_hub

    config = huggingface_hub.try_to_load_from_cache(repo_id, "config.json")
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    names = {"model.safetensors"}
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    return str(folder) if all((folder / name).is_file() for name in names) else None


def _fetched(repo_id: str) -> str:
    """Fetches the files of the id's main branch."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        # First one question that is not repeated: the library asks for files for about a minute before it gives up.
        huggingface_hub.model_info(repo_id, timeout=HUB_SECONDS)
        log.info("fetching %s from the hub", repo_id)
        return huggingface_hub.snapshot_download(repo_id, allow_patterns=list(_NEEDED))
    except HFValidationError:
        raise
    except HfHubHTTPError as error:
        why = (error.server_message or str(error)).strip().partition("\n")[0].rstrip(".")
        raise _unusable(repo_id, f"its files are not in the local cache, and the hub answers: {why}") from None
    except Exception as error:  # the network, the disk and the library's own, as it happens
        why = (str(error) or type(error).__name__).strip().partition("\n")[0].rstrip(".")
        raise _unusable(repo_id, f"its files are not in the local cache, and cannot be fetched: {why}") from None


def _unusable(source: str, what: str) -> FailedPrecondition:
    return FailedPrecondition(f"--model {source!r}: {what}; {_ACCEPTED}", reason="MODEL_UNUSABLE")
