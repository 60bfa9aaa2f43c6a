"""What clients send, on its way to the store: checked piece by piece, invisible until it is whole. Blocking."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import secrets
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import msgspec

from graftwork_server.durable import move, storage_errors, sync
from graftwork_server.errors import InvalidArgument
from graftwork_server.hub.files.manifest import MAX_FILES, check_file_name
from graftwork_server.hub.files.safetensors_check import check_safetensors
from graftwork_server.hub.files.store import Store
from graftwork_server.names import dataset_id_of


class UploadFile(msgspec.Struct, frozen=True):
    """A file as its upload announced it. sha256: lower-case hexadecimal, "" if it is not to be checked."""

    name: str
    size_bytes: int
    sha256: str = ""


class ArtifactUpload:
    """The files of one adapter. Use as a context manager: what was not published is removed at the end.

    Raises InvalidArgument for anything that is not as announced, naming the field or file.
    """

    def __init__(self, store: Store, files: Sequence[UploadFile], max_bytes: int) -> None:
        _check_announced(files, max_bytes)
        self._store = store
        self._files = list(files)
        self.folder = store.new_staging()
        self._index = -1
        self._file: BinaryIO | None = None
        self._left = 0
        self._hash = hashlib.sha256()
        self.sha256: dict[str, str] = {}
        """Of the files that are whole, by name: hashed as they came."""
        self._next_file()

    def write(self, name: str, data: bytes) -> None:
        """Adds a piece. Files come in the order they were announced in, and so do the pieces of a file."""
        if self._index >= len(self._files) or name != self._files[self._index].name:
            expected = self._files[self._index].name if self._index < len(self._files) else "nothing"
            raise InvalidArgument(
                f"a piece of {name[:100]!r} came where {expected!r} was announced",
                reason="UPLOAD_OUT_OF_ORDER",
                field="chunk.name",
            )
        if len(data) > self._left:
            raise InvalidArgument(
                f"{name}: more bytes came than the {self._files[self._index].size_bytes} announced",
                reason="UPLOAD_SIZE_MISMATCH",
                field="chunk.data",
            )
        assert self._file is not None
        with storage_errors("storing an upload"):
            self._file.write(data)
        self._hash.update(data)
        self._left -= len(data)
        if not self._left:
            self._close_file()
            self._next_file()

    @property
    def content(self) -> str:
        """A name for what the files hold, the same whoever sends them."""
        return hashlib.sha256(repr(sorted(self.sha256.items())).encode()).hexdigest()

    def finish(self) -> Path:
        """The folder with all files, complete and with valid headers. Their meaning is the engine's to check."""
        if self._index < len(self._files):
            file = self._files[self._index]
            raise InvalidArgument(
                f"{file.name}: the upload ended {self._left} bytes before its announced end",
                reason="UPLOAD_TRUNCATED",
                field="chunk.data",
            )
        for file in self._files:
            if file.name.endswith(".safetensors"):
                check_safetensors(self.folder / file.name)
        return self.folder

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # of what it still had to write; it goes anyway
                self._file.close()
        self._store.discard(self.folder)

    def _next_file(self) -> None:
        """Opens the next file that has bytes; empty ones on the way are made."""
        while True:
            self._index += 1
            if self._index >= len(self._files):
                return
            file = self._files[self._index]
            with storage_errors("storing an upload"):
                self._file = (self.folder / file.name).open("xb")
            self._left, self._hash = file.size_bytes, hashlib.sha256()
            if self._left:
                return
            self._close_file()

    def _close_file(self) -> None:
        assert self._file is not None
        with storage_errors("storing an upload"):
            self._file.close()
        file = self._files[self._index]
        self.sha256[file.name] = self._hash.hexdigest()
        if file.sha256 and not hmac.compare_digest(file.sha256.encode(), self.sha256[file.name].encode()):
            raise InvalidArgument(
                f"{file.name}: the bytes do not have the announced SHA-256", reason="UPLOAD_CORRUPT", field="chunk.data"
            )


def _check_announced(files: Sequence[UploadFile], max_bytes: int) -> None:
    if not 1 <= len(files) <= MAX_FILES:
        raise InvalidArgument(
            f"announce 1 to {MAX_FILES} files, not {len(files)}", reason="FILE_COUNT_INVALID", field="upload.files"
        )
    seen: set[str] = set()
    for index, file in enumerate(files):
        check_file_name(file.name, f"upload.files[{index}].name")
        # A file system may not tell them apart.
        if file.name.lower() in seen:
            raise InvalidArgument(
                f"{file.name} is announced twice", reason="FILE_NAME_TWICE", field=f"upload.files[{index}].name"
            )
        seen.add(file.name.lower())
        if file.size_bytes < 0:
            raise InvalidArgument(
                "a size must not be negative", reason="SIZE_INVALID", field=f"upload.files[{index}].size_bytes"
            )
    total = sum(file.size_bytes for file in files)
    if total > max_bytes:
        raise InvalidArgument(
            f"the files have {total} bytes; this server takes {max_bytes}",
            reason="UPLOAD_TOO_LARGE",
            field="upload.files",
        )


class DatasetUpload:
    """The lines of one data set. Use as a context manager: what was not stored is removed at the end."""

    def __init__(self, store: Store, max_bytes: int, size_bytes: int = 0) -> None:
        self._store = store
        self._max_bytes = max_bytes
        self._announced = size_bytes
        self._sha256 = hashlib.sha256()
        self.path = store.staging / f"{secrets.token_hex(8)}.jsonl"
        """The bytes so far; whole after finish()."""
        self.size_bytes = 0
        with storage_errors("storing a data set"):
            self._file = self.path.open("xb")

    def write(self, data: bytes) -> None:
        """Adds a piece, cut anywhere."""
        self.size_bytes += len(data)
        if self.size_bytes > self._max_bytes:
            raise InvalidArgument(
                f"the data set has more than the {self._max_bytes} bytes that this server takes",
                reason="UPLOAD_TOO_LARGE",
                field="data",
            )
        self._sha256.update(data)
        with storage_errors("storing a data set"):
            self._file.write(data)

    def finish(self) -> str:
        """The data set's id. Its lines can be read at `path` now, to be checked before store()."""
        if self._announced and self._announced != self.size_bytes:
            raise InvalidArgument(
                f"{self.size_bytes} bytes came where {self._announced} were announced",
                reason="UPLOAD_TRUNCATED" if self.size_bytes < self._announced else "UPLOAD_SIZE_MISMATCH",
                field="data",
            )
        with storage_errors("storing a data set"):
            self._file.close()
        return dataset_id_of(self._sha256.hexdigest())

    def store(self) -> Path:
        """Makes the data set durable and gives its place. The registry's row comes after this."""
        target = self._store.dataset_path(self.finish())
        with storage_errors("storing a data set"):
            sync(self.path)
            move(self.path, target)
        return target

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        self.path.unlink(missing_ok=True)
