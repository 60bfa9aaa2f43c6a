"""The header check: takes what the safetensors library writes, refuses what is not a whole file, and never crashes."""

from __future__ import annotations

import contextlib
import json
import resource
import struct
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from graftwork_server.errors import InvalidArgument
from graftwork_server.hub.files.safetensors_check import check_safetensors


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "adapter_model.safetensors"
    tensors = {
        "a.lora_A.weight": numpy.ones((2, 3), numpy.float32),
        "b": numpy.zeros((0, 4), numpy.float16),
        "c": numpy.array(1, numpy.int64),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def write(path: Path, header: Any, data: bytes = b"\0" * 8) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_takes_what_the_library_writes(good: Path) -> None:
    tensors = {tensor.name: tensor for tensor in check_safetensors(good)}
    assert tensors["a.lora_A.weight"].shape == (2, 3)
    assert tensors["b"].begin == tensors["b"].end
    assert tensors["c"].dtype == "I64"


@pytest.mark.parametrize(
    ("header", "names"),
    [
        ({"t": entry(shape=(3,))}, "'t'"),
        ({"t": entry(dtype="F33")}, "F33"),
        ({"t": entry(dtype=["F32"])}, "'t'"),
        ({"t": entry(shape=(-2, -1))}, "'t'"),
        ({"t": entry(shape=(True, 2))}, "'t'"),
        ({"t": entry(shape=(2.0,))}, "'t'"),
        ({"t": entry(shape=(1 << 62, 1 << 62, 0, 2), offsets=(0, 8))}, "'t'"),
        ({"t": entry(shape=[1] * 17)}, "'t'"),
        ({"t": entry(offsets=(8, 0))}, "'t'"),
        ({"t": entry(offsets=(0, 8, 8))}, "'t'"),
        ({"t": entry(offsets=(4, 12))}, "begin at 4"),
        ({"t": entry(), "u": entry()}, "begin at 0"),
        ({"t": entry(shape=(1,), offsets=(0, 4))}, "take 4 bytes"),
        ({"t": entry(), "u": entry(offsets=(8, 16))}, "take 16 bytes"),
        ({"t": entry() | {"extra": 1}}, "exactly"),
        ({"t": 5}, "exactly"),
        ({}, "take 0 bytes"),
        ({"__metadata__": {"a": 1}, "t": entry()}, "__metadata__"),
        ([1], "not a JSON object"),
        (b'{"t": 1, "t": 1}', "'t' comes twice"),
        (b'{"t": NaN}', "NaN"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"t": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_refuses(tmp_path: Path, header: Any, names: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        check_safetensors(write(tmp_path / "x.safetensors", header))
    assert caught.value.reason == "SAFETENSORS_INVALID"
    assert names in caught.value.message
    assert caught.value.message.startswith("x.safetensors")
    assert str(tmp_path) not in caught.value.message


def test_a_huge_header_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for declared in (1 << 63, 1 << 40, 17 << 20):
        with path.open("wb") as file:
            file.write(struct.pack("<Q", declared))
            file.truncate(1 << 41)  # sparse: the bytes seem to be there
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(InvalidArgument, match="declares a header"):
            check_safetensors(path)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024


def test_every_truncation_is_refused(good: Path) -> None:
    whole = good.read_bytes()
    for length in range(len(whole)):
        good.write_bytes(whole[:length])
        with pytest.raises(InvalidArgument):
            check_safetensors(good)
    good.write_bytes(whole + b"\0")
    with pytest.raises(InvalidArgument):
        check_safetensors(good)


@given(st.integers(0), st.binary(min_size=1, max_size=9))
@settings(max_examples=200, deadline=None)
def test_mutated_files_are_taken_or_refused(tmp_path_factory: pytest.TempPathFactory, at: int, junk: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    whole = bytearray(write(path, {"t": entry(), "u": entry("I8", (4,), (8, 12))}, b"\0" * 12).read_bytes())
    at %= len(whole)
    whole[at : at + len(junk)] = junk
    path.write_bytes(whole)
    with contextlib.suppress(InvalidArgument):
        for tensor in check_safetensors(path):
            assert 0 <= tensor.begin <= tensor.end <= len(whole)
