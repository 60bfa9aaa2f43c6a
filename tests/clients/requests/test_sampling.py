"""Options of a generation: what is sent, and what is refused."""

from __future__ import annotations

import pytest
from tests.clients.protos import last
from tests.clients.scripted_server import ScriptedServer

import graftwork
from graftwork.v1 import generation_pb2 as g


def test_an_option_that_there_is_not_is_refused(server: ScriptedServer, client: graftwork.Client) -> None:
    with pytest.raises(TypeError, match="there is no option 'top_q'; did you mean top_"):
        client.generate("base", "x", top_q=1)  # type: ignore[call-overload]


def test_unset_options_stay_unset(server: ScriptedServer, client: graftwork.Client) -> None:
    server.on("Generate", [last()])
    client.generate("base", "hi")
    assert server.requests("Generate")[0] == g.GenerateRequest(model="base", text="hi", sampling=g.SamplingParameters())


def test_all_options_arrive(server: ScriptedServer, client: graftwork.Client) -> None:
    server.on("Generate", [last()])
    client.generate(
        "base",
        [1, 2, 3],
        max_tokens=9,
        temperature=0.0,
        top_p=0.5,
        top_k=0,
        seed=2**64 - 1,
        stop="END",
        logprobs=0,
        ignore_eos=True,
    )
    sampling = g.SamplingParameters(
        max_tokens=9, temperature=0.0, top_p=0.5, top_k=0, seed=2**64 - 1, stop=["END"], logprobs=0, ignore_eos=True
    )
    expected = g.GenerateRequest(model="base", token_ids=g.TokenIds(ids=[1, 2, 3]), sampling=sampling)
    assert server.requests("Generate")[0] == expected
    assert server.requests("Generate")[0].sampling.HasField("temperature")


def test_unknown_options_are_refused(client: graftwork.Client) -> None:
    with pytest.raises(TypeError, match="beam"):
        client.generate("base", "hi", beam=4)  # type: ignore[call-overload]
