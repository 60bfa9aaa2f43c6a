"""Files that exist whole or not at all: written beside their place, synced, renamed. Safetensors and JSON only."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork_plugins import SavedArtifact

if TYPE_CHECKING:
    import torch

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\.(safetensors|json)")


def write_artifact(saved: SavedArtifact, folder: Path) -> int:
    """Makes `folder` from what a strategy saved and returns its bytes. Raises ValueError for a name that is no plain
    *.safetensors or *.json."""
    for name in (*saved.tensors, *saved.documents):
        if not _FILE_NAME.fullmatch(name):
            raise ValueError(f"the file name {name!r} is not accepted; plain *.safetensors and *.json names are")

    def fill(temporary: Path) -> None:
        for name, tensors in saved.tensors.items():
            write_tensors(temporary / name, tensors, saved.metadata)
        for name, document in saved.documents.items():
            write_json(temporary / name, document)

    write_folder(folder, fill)
    return sum(entry.stat().st_size for entry in folder.iterdir())


def write_folder(folder: Path, fill: Any) -> None:
    """Makes `folder` by calling fill(temporary folder beside it) and renaming that. What stood there is replaced."""
    temporary = folder.with_name(folder.name + ".tmp")
    remove(temporary)
    temporary.mkdir(parents=True)
    try:
        fill(temporary)
        sync(temporary)
    except BaseException:
        remove(temporary)  # on a full disk, others need its place
        raise
    remove(folder)
    temporary.rename(folder)
    sync(folder.parent)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file, synced."""
    from safetensors.torch import save_file

    save_file(dict(tensors), path, metadata=dict(metadata))
    sync(path)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """A JSON file, synced. Raises ValueError for NaN and infinities, which are not JSON."""
    path.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    sync(path)


def sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's entries, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(folder: Path) -> None:
    """Removes a folder if it is there; of a link, the link alone."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)
