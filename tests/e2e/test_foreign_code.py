"""What a client sends is never imported and never fetched: each way to ask for it has a canary that stays silent."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from tests import toys
from tests.e2e.serving import Server
from tests.e2e.test_bad_input import upload_raw

from graftwork import APIError, Client, FailedPreconditionError, InvalidArgumentError
from graftwork_server.errors import FailedPrecondition
from graftwork_server.layers.models.causal import load_base


@pytest.fixture
def fetched() -> Iterator[tuple[str, list[bytes]]]:
    """The address of a listener on this machine, and what came to it."""
    came: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.settimeout(1)
                        came.append(connection.recv(100))

        thread = threading.Thread(target=accept)
        thread.start()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        yield address, came
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


REFERENCES: list[dict[str, Any]] = [
    {"$ref": "URL"},
    {"type": "object", "properties": {"a": {"$ref": "URL#/definitions/a"}}, "required": ["a"]},
    {"$defs": {"a": {"$ref": "URL"}}, "$ref": "#/$defs/a"},
    {"$id": "URL", "$ref": "other.json"},
    {"$schema": "URL", "type": "integer"},
    {"$dynamicRef": "URL"},
    {"type": "array", "items": {"allOf": [{"$ref": "URL"}]}},
    {"$ref": "file:///etc/hostname"},
]


@pytest.mark.parametrize("schema", REFERENCES, ids=lambda schema: ",".join(schema))
def test_a_schema_fetches_nothing(client: Client, fetched: tuple[str, list[bytes]], schema: dict[str, Any]) -> None:
    address, came = fetched
    for scheme in ("http", "https", "ftp"):
        text = json.dumps(schema).replace("URL", f"{scheme}://{address}/schema.json")
        with suppress(InvalidArgumentError):
            client.generate("base", [1, 5, 9], max_tokens=2, json_schema=text)
    tool = {"type": "function", "function": {"name": "f", "parameters": json.loads(text)}}
    with suppress(APIError):
        client.chat("base", [{"role": "user", "content": f"http://{address}/"}], tools=[tool], max_tokens=1)
    assert came == []
    host, port = address.split(":")
    with socket.create_connection((host, int(port))) as canary:
        canary.sendall(b"alive")
        canary.recv(1)  # b"" once it was heard
    assert came == [b"alive"]


def files_of(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir() if file.is_file()}


def changed(data: bytes, **values: Any) -> bytes:
    return json.dumps(json.loads(data) | values).encode()


@pytest.fixture
def module(tmp_path: Path) -> tuple[bytes, Path]:
    """A module that writes a file when it is imported, and that file."""
    fired = tmp_path / "fired"
    names = "Config, Model, Tokenizer = object, object, object"
    return f"import pathlib\npathlib.Path({str(fired)!r}).touch()\n{names}\n".encode(), fired


MAPS = {
    "AutoConfig": "evil.Config",
    "AutoModelForCausalLM": "evil.Model",
    "AutoModel": "evil.Model",
    "AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"],
}


UPLOADS = {"config": "served", "type": "FAILED_PRECONDITION", "tokenizer": "served", "beside": "served"}


def upload(kind: str, model_dir: Path, folder: Path) -> dict[str, bytes]:
    """Files that name code to import: in a checkpoint's configuration, as its type, in a tokenizer's configuration, or
    in a file that is not read."""
    mapped = {"auto_map": MAPS, "trust_remote_code": True}
    if kind in ("config", "type"):
        files = files_of(toys.make_checkpoint(model_dir, folder))
        more = {"model_type": "evil"} if kind == "type" else {}
        return files | {"config.json": changed(files["config.json"], **mapped, **more)}
    files = files_of(toys.make_adapter(model_dir, folder))
    if kind == "beside":
        return files | {"config.json": changed((model_dir / "config.json").read_bytes(), **mapped)}
    tokenizer = changed((model_dir / "tokenizer_config.json").read_bytes(), **mapped, tokenizer_class="evil")
    return files | {"tokenizer.json": (model_dir / "tokenizer.json").read_bytes(), "tokenizer_config.json": tokenizer}


@pytest.mark.parametrize("with_module", [False, True], ids=["named", "brought"])
@pytest.mark.parametrize("kind", UPLOADS)
def test_no_upload_brings_code(
    client: Client,
    server: Server,
    model_dir: Path,
    tmp_path: Path,
    module: tuple[bytes, Path],
    kind: str,
    with_module: bool,
) -> None:
    """Refused, or served as if it named none."""
    code, fired = module
    adapter_id = f"{kind}-{with_module}"
    files = upload(kind, model_dir, tmp_path / "upload") | ({"evil.py": code} if with_module else {})
    expected = "INVALID_ARGUMENT" if with_module else UPLOADS[kind]
    if expected == "served":
        upload_raw(server, files, adapter_id)
        assert client.generate(adapter_id, "the fox", max_tokens=1).token_ids
        with suppress(FailedPreconditionError):  # where there is no chat template
            client.chat(adapter_id, [{"role": "user", "content": "the fox"}], max_tokens=1)
    else:
        with pytest.raises(grpc.RpcError) as caught:
            upload_raw(server, files, adapter_id)
        assert caught.value.code().name == expected
    assert not fired.exists()
    exec(code, {})  # our own: shows that the canary is alive
    assert fired.exists()


@pytest.mark.parametrize("model_type", ["llama", "evil"])
def test_no_base_brings_code(tmp_path: Path, module: tuple[bytes, Path], model_type: str) -> None:
    code, fired = module
    directory = toys.make_text_model(tmp_path / "model")
    (directory / "evil.py").write_bytes(code)
    for name in ("config.json", "tokenizer_config.json"):
        file = directory / name
        file.write_bytes(changed(file.read_bytes(), auto_map=MAPS, trust_remote_code=True))
    config = directory / "config.json"
    config.write_bytes(changed(config.read_bytes(), model_type=model_type))
    if model_type == "evil":
        with pytest.raises(FailedPrecondition, match="custom code"):
            load_base(str(directory), torch.device("cpu"), torch.float32, tmp_path)
    else:
        load_base(str(directory), torch.device("cpu"), torch.float32, tmp_path)
    assert not fired.exists()
