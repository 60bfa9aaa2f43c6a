"""What a strategy saved, as files: safetensors and JSON, there whole or not at all."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from graftwork_plugins import SavedArtifact
from graftwork_server.durable import sync, write_folder, write_json

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


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file, synced."""
    from safetensors.torch import save_file

    save_file(dict(tensors), path, metadata=dict(metadata))
    sync(path)
