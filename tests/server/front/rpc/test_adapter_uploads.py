"""AdapterService.CreateAdapter: what is refused or broken off leaves nothing behind."""

from __future__ import annotations

import asyncio

import pytest
from tests.server.front.rpc.adapter_harness import chunk, create, files_of, get, requests_of, staged, upload_of
from tests.waiting import until

from graftwork.v1 import adapters_pb2 as pb

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def damaged(name):
    """Requests of an upload with one thing wrong."""
    files = files_of()
    whole = requests_of("x", files)
    match name:
        case "no first message":
            return []
        case "chunk first":
            return whole[1:]
        case "upload twice":
            return [whole[0], whole[0], *whole[1:]]
        case "truncated":
            return whole[:-1]
        case "no chunks":
            return whole[:1]
        case "too many bytes":
            return [*whole, chunk(WEIGHTS, b"x")]
        case "another file":
            return [whole[0], chunk("other.json", b"{}"), *whole[1:]]
        case "other order":
            return [whole[0], *reversed(whole[1:])]
        case "other bytes":
            return [whole[0], chunk(CONFIG, b" " * len(files[CONFIG])), chunk(WEIGHTS, files[WEIGHTS])]
        case "no files":
            return [upload_of("x", {})]
        case "pickle":
            return requests_of("x", files | {"adapter_model.bin": b"\x80\x04."})
        case "path in name":
            return requests_of("x", files | {"../evil.json": b"{}"})
        case "same name twice":
            return requests_of("x", files | {"ADAPTER_CONFIG.json": b"{}"})
        case "negative size":
            return [
                pb.CreateAdapterRequest(
                    upload=pb.AdapterUpload(adapter_id="x", files=[pb.FileInfo(name="a.json", size_bytes=-1)])
                )
            ]
        case "huge size":
            return [
                pb.CreateAdapterRequest(
                    upload=pb.AdapterUpload(adapter_id="x", files=[pb.FileInfo(name="a.json", size_bytes=2**62)])
                )
            ]
        case "truncated safetensors":
            return requests_of("x", {CONFIG: files[CONFIG], WEIGHTS: files[WEIGHTS][:-1]})
        case "no safetensors":
            return requests_of("x", {CONFIG: files[CONFIG], WEIGHTS: b"\x80\x04."})
        case "large chunk":
            big = {"big.txt": b"x" * ((1 << 20) + 1)}
            return requests_of("x", big, piece=len(big["big.txt"]))
    raise ValueError(name)


@pytest.mark.parametrize(
    "name",
    [
        "no first message",
        "chunk first",
        "upload twice",
        "truncated",
        "no chunks",
        "too many bytes",
        "another file",
        "other order",
        "other bytes",
        "no files",
        "pickle",
        "path in name",
        "same name twice",
        "negative size",
        "huge size",
        "truncated safetensors",
        "no safetensors",
        "large chunk",
    ],
)
async def test_a_wrong_upload_is_refused_and_leaves_nothing(shared, refused, name):
    error = await refused(shared.adapters.CreateAdapter(iter(damaged(name))))
    assert error.code == "INVALID_ARGUMENT", error
    assert error.fields, error
    await until(lambda: staged(shared) == [])
    assert list((shared.data / "artifacts").iterdir()) == []
    assert (await refused(get(shared, "adapters/x"))).code == "NOT_FOUND"


async def test_what_the_engine_refuses_is_not_published(shared, refused):
    error = await refused(create(shared, "x", files_of(note="REFUSE")))
    assert (error.code, error.reason, error.message) == (
        "FAILED_PRECONDITION",
        "UNKNOWN_TENSOR",
        "tensor 'x' binds nowhere",
    )
    assert staged(shared) == []


async def test_a_client_that_goes_away_leaves_nothing(shared):
    async def endless():
        yield upload_of("gone", files_of())
        await asyncio.sleep(60)

    call = shared.adapters.CreateAdapter(endless())
    await until(lambda: staged(shared))
    call.cancel()
    await until(lambda: staged(shared) == [])


async def test_a_deadline_ends_an_upload_that_stalls(shared, refused):
    async def stalled():
        yield upload_of("gone", files_of())
        await asyncio.sleep(60)

    error = await refused(shared.adapters.CreateAdapter(stalled(), timeout=0.3))
    assert error.code == "DEADLINE_EXCEEDED"
    await until(lambda: staged(shared) == [])
