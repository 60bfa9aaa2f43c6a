"""What an artifact's files are called, and its manifest, which holds the hash of each: the digest is made from that."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from graftwork_server.durable import sha256_of, storage_errors
from graftwork_server.errors import InvalidArgument

MANIFEST = "manifest.json"
_MOST_END_TOKENS = 64
_MOST_CONFIG_BYTES = 1 << 20
MANIFEST_FORMAT = 1
FILE_SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".jinja", ".md")
MAX_FILES = 1000
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")


def check_file_name(name: str, field: str = "files.name") -> None:
    """Raises InvalidArgument (FILE_NAME_INVALID) unless an artifact may have a file of this name."""
    if not _FILE_NAME.fullmatch(name) or not name.endswith(FILE_SUFFIXES):
        raise InvalidArgument(
            f"{name[:100]!r} is no name for an adapter's file: at most 200 letters, digits, '.', '_' and '-', not "
            f"beginning with '.' or '-', without folders, ending in one of {', '.join(FILE_SUFFIXES)}",
            reason="FILE_NAME_INVALID",
            field=field,
        )


def artifact_files(folder: Path) -> list[str]:
    """Names of the files in `folder`, sorted. Raises InvalidArgument if it has what no artifact may have."""
    names = []
    for entry in os.scandir(folder):
        if not entry.is_file(follow_symlinks=False):
            raise InvalidArgument(
                f"{entry.name[:100]!r} is no plain file; an adapter has neither folders nor links",
                reason="FILE_NAME_INVALID",
                field="files.name",
            )
        check_file_name(entry.name)
        names.append(entry.name)
    if len(names) > MAX_FILES:
        raise InvalidArgument(f"an adapter has at most {MAX_FILES} files", reason="TOO_MANY_FILES", field="files")
    return sorted(names)


def write_manifest(
    folder: Path,
    *,
    strategy: str,
    base_fingerprint: str,
    parameter_count: int,
    rank: int,
    created_by: str,
    end_token_ids: Sequence[int] = (),
    sha256: Mapping[str, str] | None = None,
) -> str:
    """Writes manifest.json, over any that is there, and gives the artifact's digest, see digest_of.

    `sha256`: of files that were hashed already, by name; each of the others is read once. The manifest holds no times:
    the same content has the same digest.
    """
    known = sha256 or {}
    hashed = {
        name: ((folder / name).stat().st_size, known.get(name) or sha256_of(folder / name))
        for name in artifact_files(folder)
        if name != MANIFEST
    }
    manifest = {
        "format": MANIFEST_FORMAT,
        "strategy": strategy,
        "base_fingerprint": base_fingerprint,
        "parameter_count": parameter_count,
        "rank": rank,
        "created_by": created_by,
        "files": {name: {"size_bytes": size, "sha256": digest} for name, (size, digest) in hashed.items()},
    }
    if end_token_ids:
        manifest["end_token_ids"] = list(end_token_ids)
    with storage_errors("writing a manifest"):
        text = json.dumps(manifest, indent=2, sort_keys=True).encode() + b"\n"
        (folder / MANIFEST).write_bytes(text)
    return _digest(hashed | {MANIFEST: (len(text), hashlib.sha256(text).hexdigest())})


def digest_of(folder: Path) -> str:
    """Identity of an artifact, its files read again: SHA-256 over name, size and SHA-256 of each file, sorted by name,
    manifest included; "sha256:..."."""
    paths = [folder / name for name in artifact_files(folder)]
    return _digest({path.name: (path.stat().st_size, sha256_of(path)) for path in paths})


def _digest(files: Mapping[str, tuple[int, str]]) -> str:
    """Of size and SHA-256 of each file by name."""
    lines = [f"{name}\0{size}\0{sha256}\n" for name, (size, sha256) in sorted(files.items())]
    return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()


def uploaded_end_tokens(folder: Path, vocab_size: int, base_ends: Collection[int]) -> list[int]:
    """Tokens that end a version's texts, by the files that were uploaded: by the manifest.json that a download brought
    along, or else, as transformers reads a whole checkpoint, by its generation_config.json or config.json, as far as
    they are none of `base_ends`, the base's own. [] if none of these says it.

    Of a manifest it is all that an upload keeps: everything else is found in the files themselves.
    """
    ids = _token_ids(folder / MANIFEST, "end_token_ids", vocab_size)
    if ids is not None:
        return ids
    for name in ("generation_config.json", "config.json"):
        ids = _token_ids(folder / name, "eos_token_id", vocab_size)
        if ids is not None:
            return [id for id in ids if id not in base_ends]
    return []


def _token_ids(file: Path, key: str, vocab_size: int) -> list[int] | None:
    """One token id or several, in a JSON file of a stranger's; None where there are none that could be used."""
    try:
        if file.stat().st_size > _MOST_CONFIG_BYTES:
            return None
        ids = json.loads(file.read_bytes())[key]
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        return None
    ids = ids if isinstance(ids, list) else [ids]
    usable = 0 < len(ids) <= _MOST_END_TOKENS and all(type(id) is int and 0 <= id < vocab_size for id in ids)
    return ids if usable else None
