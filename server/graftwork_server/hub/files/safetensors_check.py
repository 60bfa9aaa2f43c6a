"""Checks the header of a safetensors file in plain Python, before any library gets to see the file.

Nothing here reserves memory by a number from the file: the header is read only after its size was bounded, and the
tensors' shapes are compared with the bytes that are there, not used.

The format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from graftwork_server.errors import InvalidArgument

MAX_HEADER_BYTES = 16 * 1024 * 1024
"""About 150,000 tensors."""
MAX_DIMENSIONS = 16

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


class TensorHeader(msgspec.Struct, frozen=True):
    """One tensor as its file declares it; begin and end are bytes after the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def check_safetensors(path: Path) -> list[TensorHeader]:
    """The tensors of the file, in the order of their bytes.

    Raises InvalidArgument (SAFETENSORS_INVALID) naming the file and the tensor if anything is not as the format says:
    header, names, data types, shapes, or bytes that are missing, left over, shared or skipped.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            _refuse(path, f"has {size} bytes, less than the 8 that any safetensors file begins with")
        (header_bytes,) = struct.unpack("<Q", prefix)
        if header_bytes > min(size - 8, MAX_HEADER_BYTES):
            _refuse(
                path,
                f"declares a header of {header_bytes} bytes; the file has {size} and {MAX_HEADER_BYTES} is the limit",
            )
        header = _parse(path, file.read(header_bytes))
    _check_metadata(path, header.pop("__metadata__", {}))
    tensors = sorted((_tensor(path, name, entry) for name, entry in header.items()), key=lambda t: (t.begin, t.end))
    position = 0
    for tensor in tensors:
        if tensor.begin != position:
            _refuse(path, f"its bytes begin at {tensor.begin}, but those before end at {position}", tensor.name)
        position = tensor.end
    if position != size - 8 - header_bytes:
        _refuse(path, f"its tensors take {position} bytes, but {size - 8 - header_bytes} follow the header")
    return tensors


def _refuse(path: Path, problem: str, tensor: str | None = None) -> NoReturn:
    where = f"{path.name}, tensor {tensor[:200]!r}" if tensor is not None else path.name
    metadata = {"file": path.name} | ({"tensor": tensor[:200]} if tensor is not None else {})
    raise InvalidArgument(f"{where}: {problem}", reason="SAFETENSORS_INVALID", field="files", metadata=metadata)


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        _refuse(path, f"its header is not valid JSON: {str(error)[:200]}")
    if not isinstance(header, dict):
        _refuse(path, "its header is not a JSON object")
    return header


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"the name {name[:200]!r} comes twice")
        result[name] = value
    return result


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


def _check_metadata(path: Path, metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _refuse(path, "its __metadata__ is not an object of strings")


def _tensor(path: Path, name: str, entry: Any) -> TensorHeader:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        _refuse(path, "does not have exactly dtype, shape and data_offsets", name)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        _refuse(path, f"has the data type {str(dtype)[:40]!r}; known are {', '.join(DTYPE_BYTES)}", name)
    if not _is_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        _refuse(path, f"its shape is no list of at most {MAX_DIMENSIONS} sizes", name)
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _refuse(path, "its data_offsets are not a begin and an end", name)
    expected = DTYPE_BYTES[dtype]
    for length in shape:
        expected *= length
    if offsets[1] - offsets[0] != expected:
        _refuse(
            path, f"its shape and data type take {expected} bytes, its data_offsets {offsets[1] - offsets[0]}", name
        )
    return TensorHeader(name, dtype, tuple(shape), offsets[0], offsets[1])


def _is_sizes(value: Any) -> bool:
    # bool is an int to Python; 2^63 - 1 is the most that any reader of the format holds.
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)
