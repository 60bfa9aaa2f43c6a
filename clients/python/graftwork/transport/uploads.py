"""What is sent from this machine: the files of an adapter folder, the bytes of a data set."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from graftwork.errors import UploadError

CHUNK_BYTES = 512 * 1024
TAKEN_SUFFIXES = frozenset({".safetensors", ".json", ".txt", ".model", ".jinja", ".md"})
_TEMPLATES = "additional_chat_templates"
"""A folder of chat templates that transformers writes; DIRECTORY/NAME.jinja is sent as DIRECTORY.NAME.jinja."""
_PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})

Progress: TypeAlias = Callable[[int, int], None]
"""Called with the bytes sent so far and the bytes in all. Starts again from 0 when an upload is retried."""
Source: TypeAlias = str | os.PathLike[str] | bytes | Iterable[Mapping[str, Any]]
"""A data set: the path of a JSONL file, its bytes, or its rows."""


@dataclass(frozen=True)
class LocalFile:
    """A file to be sent. sha256 is lower-case hexadecimal."""

    path: Path
    name: str
    size_bytes: int
    sha256: str


class AdapterFiles:
    """The files of an adapter folder that are sent: regular, not hidden, of a type the server takes, directly in it or,
    chat templates, in its folder additional_chat_templates.

    Reads each file once to hash it. Raises UploadError for a folder that is missing, has nothing to send, holds its
    weights as a pickle, or links to a file outside itself.
    """

    def __init__(self, directory: str | os.PathLike[str], on_progress: Progress | None = None) -> None:
        self.directory = Path(directory)
        self._on_progress = on_progress
        self.files = tuple(
            _hashed(path, ".".join(path.relative_to(self.directory).parts)) for path in _candidates(self.directory)
        )

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size_bytes for file in self.files)

    def chunks(self) -> Iterator[tuple[str, bytes]]:
        """Name and data of each piece, at most CHUNK_BYTES, files in the order of self.files.

        Raises UploadError if a file is no longer as long as it was when it was hashed.
        """
        sent, total = 0, self.size_bytes
        for file in self.files:
            start = sent
            for data in _read(file.path):
                sent += len(data)
                yield file.name, data
                if self._on_progress:
                    self._on_progress(sent, total)
            if sent - start != file.size_bytes:
                raise UploadError(f"{file.path} changed while it was being sent; nothing was published")


def _candidates(directory: Path) -> list[Path]:
    """The files to send, by name. Raises UploadError as AdapterFiles says."""
    if not directory.exists():
        raise UploadError(f"no such folder: {directory}")
    if not directory.is_dir():
        raise UploadError(f"not a folder: {directory} (give the folder that save_pretrained wrote)")
    try:
        entries = sorted(entry for entry in directory.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise UploadError(f"cannot read {directory}: {error.strerror}") from error
    taken = [entry for entry in entries if entry.suffix in TAKEN_SUFFIXES and entry.is_file()]
    taken += sorted(entry for entry in (directory / _TEMPLATES).glob("[!.]*.jinja") if entry.is_file())
    if not any(entry.suffix == ".safetensors" for entry in taken):
        pickles = [entry.name for entry in entries if entry.suffix in _PICKLE_SUFFIXES]
        if pickles:
            raise UploadError(
                f"{directory} holds its weights as a pickle ({', '.join(pickles)}), which is never sent or loaded; "
                "re-save it with safe_serialization=True"
            )
    if not taken:
        raise UploadError(f"{directory} has no files to send; taken are {', '.join(sorted(TAKEN_SUFFIXES))}")
    root = directory.resolve()
    for entry in taken:
        if not entry.resolve().is_relative_to(root):
            raise UploadError(
                f"{entry} is a link to a file outside {directory}; copy the folder with its links resolved (cp -rL)"
            )
    return taken


def _hashed(path: Path, name: str) -> LocalFile:
    digest, size = hashlib.sha256(), 0
    for data in _read(path):
        digest.update(data)
        size += len(data)
    return LocalFile(path=path, name=name, size_bytes=size, sha256=digest.hexdigest())


class DatasetSource:
    """A data set to be sent.

    source: the path of a JSONL file, its bytes, or its rows, which are held in memory as JSONL so that they can be
    sent again. Raises UploadError if the file cannot be read, TypeError for anything else than these.
    """

    def __init__(self, source: Source, on_progress: Progress | None = None) -> None:
        self._on_progress = on_progress
        self._path: Path | None = None
        self._data = b""
        self.display_name = ""
        if isinstance(source, str | os.PathLike):
            self._path = Path(source)
            self.size_bytes = _size(self._path)
            self.display_name = self._path.name[:200]
        else:
            self._data = bytes(source) if isinstance(source, bytes | bytearray | memoryview) else _jsonl(source)
            self.size_bytes = len(self._data)

    def chunks(self) -> Iterator[bytes]:
        """The bytes in pieces of at most CHUNK_BYTES. Raises UploadError if the file is not as long as it was."""
        sent = 0
        for data in self._pieces():
            sent += len(data)
            yield data
            if self._on_progress:
                self._on_progress(sent, self.size_bytes)
        if sent != self.size_bytes:
            raise UploadError(f"{self._path} changed while it was being sent; nothing was stored")

    def _pieces(self) -> Iterator[bytes]:
        if self._path is not None:
            return _read(self._path)
        return (self._data[start : start + CHUNK_BYTES] for start in range(0, len(self._data), CHUNK_BYTES))


def _jsonl(rows: Iterable[Mapping[str, Any]]) -> bytes:
    lines = []
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise TypeError(f"row {number} is a {type(row).__name__}; expected a mapping such as {{'prompt': ...}}")
        lines.append(json.dumps(dict(row), ensure_ascii=False, allow_nan=False).encode() + b"\n")
    return b"".join(lines)


def _size(path: Path) -> int:
    try:
        status = path.stat()
    except OSError as error:
        raise UploadError(f"cannot read {path}: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        # A pipe could be read once only, and its size is not known before.
        raise UploadError(f"not a regular file: {path}")
    return status.st_size


def _read(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while data := file.read(CHUNK_BYTES):
                yield data
    except OSError as error:
        raise UploadError(f"cannot read {path}: {error.strerror}") from error
