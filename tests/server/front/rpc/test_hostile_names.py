"""A hundred hostile names against every method that takes one: each is refused by name, and nothing appears on disk."""

from __future__ import annotations

import os

import pytest

from graftwork.v1 import adapters_pb2, generation_pb2, server_pb2, strategies_pb2, tuning_pb2

PARTS = [
    "", ".", "..", "../x", "..\\x", "/", "//", "\\", "/etc/passwd", "../../etc/passwd", "a/b", "a\\b", "a/../b", "./a",
    "a/", "~", "~root", "$HOME", "%2e%2e%2f", "%00", "\0", "a\0b", "a\nb", "a\r\nb", "a\tb", " ", " a", "a ", "a b",
    "-", "-a", "--help", "_a", ".a", ".hidden", "base/", "base@1", "a@", "a@b", "a@0", "a@-1", "a@1.0", "a@01", "a@1e3",
    "a@99999999999999999999", "a@1@2", "a:b", "C:\\x", "file:///x", "http://127.0.0.1/x", "a?b", "a#b", "a*b", "[a]",
    "{a}", "<a>", "a|b", "a;b", "a&b", "a'b", 'a"b', "a`b", "`id`", "$(id)", "a,b", "a=b", "a+b", "a!b", "a(b",
    "'; DROP TABLE adapters; --", "' OR 1=1 --", "é", "ａ", "а", "а" * 3, "a\u202eb", "a\u200bb", "\ufeffa",
    "😀", "a\u0301", "\u2215", "\u2024\u2024/", "\u2028", "x" * 65, "x" * 129, "x" * 300, "x" * 5000, "a" + "." * 64,
    "adapters", "adapters/", "adapters/a/versions", "adapters/a/versions/", "versions/1", "a/versions/0",
    "a/versions/-1", "a/versions/x", "a/versions/1/2", "a/versions/1e1", "a/versions/٣", "%s%s%n", "{0}", "${jndi:x}",
    "{{7*7}}", "\x7f", "\x1b[31m",
]  # fmt: skip


def test_there_are_a_hundred():
    assert len(set(PARTS)) == len(PARTS) >= 100


def calls(server):
    """name -> call, for each method that takes a name."""
    a, t, g, s = adapters_pb2, tuning_pb2, generation_pb2, strategies_pb2
    message = g.ChatMessage(role="user", content="x")

    def job(**fields):
        spec = t.TuningJobSpec(**{"strategy": "lora", "dataset": "datasets/d", "adapter_id": "a", **fields})
        return server.tuning.CreateTuningJob(t.CreateTuningJobRequest(spec=spec))

    def create(adapter_id="a", file="a.json"):
        upload = a.AdapterUpload(adapter_id=adapter_id, files=[a.FileInfo(name=file, size_bytes=1)])
        requests = [
            a.CreateAdapterRequest(upload=upload),
            a.CreateAdapterRequest(chunk=a.FileChunk(name=file, data=b"x")),
        ]
        return server.adapters.CreateAdapter(iter(requests))

    def check(name):
        first = t.ValidateDatasetRequest(check=t.DatasetCheck(dataset=name))
        return server.tuning.ValidateDataset(iter([first]))

    return {
        "Generate": lambda n: server.generation.Generate(g.GenerateRequest(model=n, text="x")),
        "Chat": lambda n: server.generation.Chat(g.ChatRequest(model=n, messages=[message])),
        "Score": lambda n: server.generation.Score(g.ScoreRequest(model=n, text="x")),
        "Classify": lambda n: server.generation.Classify(g.ClassifyRequest(model=n, inputs=[g.TextInput(text="x")])),
        "Embed": lambda n: server.generation.Embed(g.EmbedRequest(model=n, inputs=[g.TextInput(text="x")])),
        "Tokenize": lambda n: server.generation.Tokenize(
            g.TokenizeRequest(model=n or "a/", text="x")
        ),  # "" is the base
        "ListVersions": lambda n: server.adapters.ListVersions(a.ListVersionsRequest(parent="adapters/" + n)),
        "GetAdapter": lambda n: server.adapters.GetAdapter(a.GetAdapterRequest(name="adapters/" + n)),
        "GetAdapter raw": lambda n: server.adapters.GetAdapter(a.GetAdapterRequest(name=n)),
        "DeleteAdapter": lambda n: server.adapters.DeleteAdapter(a.DeleteAdapterRequest(name="adapters/" + n)),
        "DeleteVersion": lambda n: server.adapters.DeleteVersion(a.DeleteVersionRequest(name="adapters/" + n)),
        "GetDataset": lambda n: server.tuning.GetDataset(t.GetDatasetRequest(name="datasets/" + n)),
        "DeleteDataset": lambda n: server.tuning.DeleteDataset(t.DeleteDatasetRequest(name="datasets/" + n)),
        "DeleteTuningJob": lambda n: server.tuning.DeleteTuningJob(t.DeleteTuningJobRequest(name="tuningJobs/" + n)),
        "LoadAdapter": lambda n: server.adapters.LoadAdapter(a.LoadAdapterRequest(name="adapters/" + n)),
        "UnloadAdapter": lambda n: server.adapters.UnloadAdapter(a.UnloadAdapterRequest(name="adapters/" + n)),
        "PinAdapter": lambda n: server.adapters.PinAdapter(a.PinAdapterRequest(name="adapters/" + n)),
        "UnpinAdapter": lambda n: server.adapters.UnpinAdapter(a.UnpinAdapterRequest(name="adapters/" + n)),
        "CreateAdapter id": lambda n: create(adapter_id=n),
        "CreateAdapter file": lambda n: create(file=n),
        "CreateTuningJob dataset": lambda n: job(dataset="datasets/" + n),
        "CreateTuningJob validation": lambda n: job(validation_dataset="datasets/" + n),
        "CreateTuningJob adapter": lambda n: job(adapter_id=n),
        "GetTuningJob": lambda n: server.tuning.GetTuningJob(t.GetTuningJobRequest(name="tuningJobs/" + n)),
        "CancelTuningJob": lambda n: server.tuning.CancelTuningJob(t.CancelTuningJobRequest(name="tuningJobs/" + n)),
        "WatchTuningJob": lambda n: server.tuning.WatchTuningJob(t.WatchTuningJobRequest(name="tuningJobs/" + n)),
        "ValidateDataset": lambda n: check("datasets/" + n),
        "GetStrategy": lambda n: server.strategies.GetStrategy(s.GetStrategyRequest(name="strategies/" + n)),
    }


METHODS = list(calls(None))
NAMELESS = {"ListAdapters", "ListStrategies", "ListTuningJobs", "ListDatasets", "UploadDataset", "GetServer"}
ALSO_A_GOOD_ID = {"a" + "." * 64, "x" * 65, "adapters"}
"""Longer ids than an adapter's are fine for jobs, data sets and strategies: nobody is there, NOT_FOUND."""


def test_every_method_that_takes_a_name_is_here():
    files = (adapters_pb2, generation_pb2, server_pb2, strategies_pb2, tuning_pb2)
    services = [service for file in files for service in file.DESCRIPTOR.services_by_name.values()]
    named = {method.name for service in services for method in service.methods}
    assert {method.split()[0] for method in METHODS} == named - NAMELESS


@pytest.mark.parametrize("method", METHODS)
async def test_hostile_names_are_refused(shared, refused, method):
    call = calls(shared)[method]
    before = sorted(os.walk(shared.data))
    for part in PARTS:
        error = await refused(call(part))
        accepted = {"INVALID_ARGUMENT"}
        if part in ALSO_A_GOOD_ID:
            accepted |= {"NOT_FOUND", "FAILED_PRECONDITION"}
        assert error.code in accepted, (part, error)
        assert str(shared.data) not in error.message
        assert "\n" not in error.message
    after = sorted(os.walk(shared.data))
    assert [entry[0] for entry in after] == [entry[0] for entry in before]
