"""Artifacts on disk, as the host writes them."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from graftwork_plugins import (
    Artifact,
    SavedArtifact,
)


def write_artifact(saved: SavedArtifact, folder: Path) -> Artifact:
    """Writes what `save` returned as the host does."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in saved.tensors.items():
        save_file(dict(tensors), folder / name, metadata=dict(saved.metadata))
    for name, document in saved.documents.items():
        (folder / name).write_text(json.dumps(document, allow_nan=False))
    return Artifact(folder)
