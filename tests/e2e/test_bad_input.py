"""Bad input over gRPC: a clear error that names the field, key or tensor, and a server that goes on serving."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import toys
from tests.e2e.serving import Server

from graftwork import APIError, Client, FailedPreconditionError, InvalidArgumentError, NotFoundError, UploadError
from graftwork.v1 import adapters_pb2 as pb
from graftwork.v1.adapters_pb2_grpc import AdapterServiceStub

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(autouse=True)
def _base_still_answers(client: Client) -> Iterator[None]:
    """After every refusal the base must say what it said before."""
    before = client.generate("base", [1, 5, 9], max_tokens=4, ignore_eos=True).token_ids
    yield
    assert client.generate("base", [1, 5, 9], max_tokens=4, ignore_eos=True).token_ids == before


# ------------------------------------------------------------------------------------------- requests


@pytest.mark.parametrize("model", ["nobody", "base@1", "nobody@3"])
def test_an_unknown_adapter_is_never_the_base(client: Client, model: str) -> None:
    with pytest.raises((NotFoundError, InvalidArgumentError)) as caught:
        client.generate(model, "the fox")
    assert (caught.value.code == "NOT_FOUND") == (model != "base@1")
    with pytest.raises((NotFoundError, InvalidArgumentError)):
        client.score(model, "the fox")


@pytest.mark.parametrize(
    ("prompt", "options", "field"),
    [
        ([1] * 1_000_001, {}, "token_ids"),
        ([1, 2], {"max_tokens": 1_000_000}, "sampling.max_tokens"),
        ([1, 2], {"max_tokens": 2**31 - 1}, "sampling.max_tokens"),
        ([1, 2], {"max_tokens": 0}, "sampling.max_tokens"),
        ([1, 2], {"temperature": math.nan}, "sampling.temperature"),
        ([1, 2], {"temperature": math.inf}, "sampling.temperature"),
        ([1, 2], {"top_p": math.nan}, "sampling.top_p"),
        ([1, 2], {"logprobs": 21}, "sampling.logprobs"),
        ([1, 2], {"stop": [str(number) for number in range(17)]}, "sampling.stop"),
        ([1, 2], {"stop": [""]}, "sampling.stop[0]"),
        ([1, 400], {}, "token_ids"),
        ([], {}, "token_ids"),
        ("", {}, "text"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_parameter_out_of_range_names_its_field(client: Client, prompt: Any, options: Any, field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        client.generate("base", prompt, **options)
    assert [violation.field for violation in caught.value.field_violations] == [field]
    assert caught.value.field_violations[0].description
    assert caught.value.request_id


@pytest.mark.parametrize("name", ["../x", "a/../b", "a/b", "", ".", "..", "x" * 200, "a\x00b", "A B", "base"])
def test_a_hostile_name_is_refused_everywhere(client: Client, model_dir: Path, tmp_path: Path, name: str) -> None:
    directory = toys.make_adapter(model_dir, tmp_path / "adapter")
    if name != "base":
        with pytest.raises(InvalidArgumentError):
            client.generate(name, [1, 2], max_tokens=1)
    for call in (client.adapters.get, client.adapters.delete, client.adapters.load, client.adapters.unload):
        with pytest.raises(InvalidArgumentError):
            call(name)
    with pytest.raises(InvalidArgumentError):
        client.adapters.create(name, directory)
    with pytest.raises(InvalidArgumentError):
        client.tuning.create(strategy="lora", dataset=name or "../x", adapter=name)


# ------------------------------------------------------------------------------------------- adapters


@pytest.fixture(scope="module")
def sound(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter in order, from which the damaged ones are made."""
    return toys.make_adapter(model_dir, tmp_path_factory.mktemp("sound") / "adapter", r=4)


def change_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS)
        change(tensors)
        save_file(tensors, directory / WEIGHTS)

    return damage


def change_config(**values: Any) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        config = json.loads((directory / CONFIG).read_text())
        (directory / CONFIG).write_text(json.dumps(config | values))

    return damage


def for_another_base(directory: Path) -> None:
    other = toys.make_text_model(directory.parent / "other", hidden_size=96)
    shutil.rmtree(directory)
    toys.make_adapter(other, directory, r=4)


def truncated(directory: Path) -> None:
    data = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(data[: len(data) // 2])


STRAY = Q_PROJ.replace("q_proj", "z_proj")
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "another base": (for_another_base, "down_proj"),
    "a tensor that binds nowhere": (change_tensors(lambda t: t.update({STRAY: t[Q_PROJ].clone()})), STRAY),
    "a tensor of another kind": (change_tensors(lambda t: t.update({"model.bias": torch.zeros(3)})), "model.bias"),
    "a wrong shape": (change_tensors(lambda t: t.update({Q_PROJ: torch.zeros(4, 47)})), "q_proj"),
    "a wrong rank": (change_tensors(lambda t: t.update({Q_PROJ: torch.zeros(5, 48)})), "q_proj"),
    "a missing tensor": (change_tensors(lambda t: t.pop(Q_PROJ)), "q_proj"),
    "NaN": (change_tensors(lambda t: t[Q_PROJ].view(-1)[7:8].fill_(math.nan)), "layers.0.self_attn.q_proj: A"),
    "infinity": (change_tensors(lambda t: t[Q_PROJ].view(-1)[7:8].fill_(math.inf)), "layers.0.self_attn.q_proj: A"),
    "truncated": (truncated, WEIGHTS),
    "no safetensors": (lambda directory: (directory / WEIGHTS).write_bytes(b"\xff" * 500), WEIGHTS),
    "use_dora": (change_config(use_dora=True), "use_dora"),
    "modules_to_save": (change_config(modules_to_save=["lm_head"]), "modules_to_save"),
    "bias": (change_config(bias="some"), "bias"),
    "an unknown key": (change_config(brand_new=17), "brand_new"),
    "a module to import": (
        change_config(auto_mapping={"base_model_class": "x", "parent_library": "os"}),
        "auto_mapping",
    ),
    "another method": (change_config(peft_type="IA3"), "peft_type"),
    "a rank of nothing": (change_config(r=0), "r"),
    "an endless pattern": (change_config(target_modules="a" * 5000), "over 4096"),
    "a broken pattern": (change_config(target_modules="("), "no regular expression"),
    "no JSON": (lambda directory: (directory / CONFIG).write_text("{"), CONFIG),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_adapter_is_refused_by_name(client: Client, sound: Path, tmp_path: Path, damage: str) -> None:
    directory = tmp_path / "adapter"
    shutil.copytree(sound, directory)
    make, culprit = DAMAGES[damage]
    make(directory)
    with pytest.raises((FailedPreconditionError, InvalidArgumentError)) as caught:
        client.adapters.create("damaged", directory, strategy="lora")
    named = [caught.value.message, *(violation.field for violation in caught.value.field_violations)]
    assert any(culprit in text for text in named), caught.value
    assert str(tmp_path.parent) not in str(caught.value)
    with pytest.raises(NotFoundError):
        client.generate("damaged", [1, 2], max_tokens=1)


def test_a_checkpoint_of_another_shape_is_refused(client: Client, tmp_path: Path) -> None:
    other = toys.make_text_model(tmp_path / "other", intermediate_size=96)
    with pytest.raises((FailedPreconditionError, InvalidArgumentError)) as caught:
        client.adapters.create("damaged", other)
    assert caught.value.field_violations[0].field == "intermediate_size"


# ------------------------------------------------------------------------------------------- pickles


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def upload_raw(server: Server, files: dict[str, bytes], adapter_id: str = "canary") -> None:
    """CreateAdapter of any files, past the client's own checks."""
    infos = [pb.FileInfo(name=name, size_bytes=len(data)) for name, data in files.items()]
    messages = [pb.CreateAdapterRequest(upload=pb.AdapterUpload(adapter_id=adapter_id, files=infos, load=True))]
    for name, data in files.items():
        messages.append(pb.CreateAdapterRequest(chunk=pb.FileChunk(name=name, data=data)))
    with grpc.insecure_channel(server.address) as channel:
        AdapterServiceStub(channel).CreateAdapter(iter(messages), timeout=240)


def test_a_pickle_never_runs(client: Client, server: Server, sound: Path, model_dir: Path, tmp_path: Path) -> None:
    nest = tmp_path / "nest"
    fired = tmp_path / "fired"
    nest.mkdir()
    torch.save(Canary(fired), nest / "adapter_model.bin")
    (nest / CONFIG).write_bytes((sound / CONFIG).read_bytes())
    with pytest.raises(UploadError, match=r"adapter_model\.bin"):
        client.adapters.create("canary", nest)

    config, zipped = (sound / CONFIG).read_bytes(), (nest / "adapter_model.bin").read_bytes()
    plain = pickle.dumps(Canary(fired))
    model_config = (model_dir / "config.json").read_bytes()
    for pickled in (plain, zipped):
        for files in (
            {CONFIG: config, "adapter_model.bin": pickled},
            {CONFIG: config, WEIGHTS: pickled},
            {CONFIG: config, "model.safetensors": pickled, "training_args.json": pickled},
            {CONFIG: pickled, WEIGHTS: (sound / WEIGHTS).read_bytes()},
            {"config.json": model_config, "model.safetensors": pickled},
            {"config.json": model_config, "pytorch_model.bin": pickled},
            {"manifest.json": pickled, CONFIG: config, WEIGHTS: pickled},
        ):
            with pytest.raises(grpc.RpcError) as caught:
                upload_raw(server, files)
            assert caught.value.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION)
    # Files beside an adapter in order are kept and never read.
    upload_raw(server, {CONFIG: config, WEIGHTS: (sound / WEIGHTS).read_bytes(), "optimizer.json": plain})
    client.generate("canary", [1, 2], max_tokens=1)
    assert not fired.exists()
    pickle.loads(plain)  # noqa: S301 - our own: shows that the canary is alive
    assert fired.exists()


@pytest.mark.parametrize("name", ["../adapter_config.json", "/etc/x.json", "a/b.json", ".x.json", "x.py", "x.so"])
def test_a_hostile_file_name_is_refused(server: Server, sound: Path, name: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        upload_raw(server, {name: (sound / CONFIG).read_bytes(), WEIGHTS: (sound / WEIGHTS).read_bytes()}, "hostile")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_an_upload_that_stops_half_way_leaves_nothing(server: Server, client: Client, sound: Path) -> None:
    info = pb.FileInfo(name=WEIGHTS, size_bytes=10_000)
    upload = pb.AdapterUpload(adapter_id="half", files=[info])
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        AdapterServiceStub(channel).CreateAdapter(iter([pb.CreateAdapterRequest(upload=upload)]), timeout=240)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(APIError):
        client.adapters.get("half")
    assert list((server.data_dir / "staging").iterdir()) == []
