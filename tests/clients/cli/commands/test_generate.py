"""graftwork generate: what is sent, printed and exits."""

from __future__ import annotations

from typing import Any

from tests.clients.cli.running import objects
from tests.clients.protos import last, piece
from tests.clients.scripted_server import ScriptedServer

from graftwork.v1 import generation_pb2 as g


def test_generate_prints_the_text(server: ScriptedServer, run: Any) -> None:
    server.on("Generate", [piece("Once ", 1), piece("upon", 2), last()])
    assert run("generate", "base", "Say").stdout == "Once upon\n"
    assert server.requests("Generate")[0] == g.GenerateRequest(
        model="base", text="Say", sampling=g.SamplingParameters()
    )


def test_generate_json(server: ScriptedServer, run: Any) -> None:
    server.on("Generate", [piece("ü", 1, logprobs=[-0.5]), last()])
    (answer,) = objects(run("generate", "dates@3", "Say", "--logprobs", "0", "--json"))
    assert answer == {
        "text": "ü",
        "token_ids": [1],
        "finish_reason": "stop",
        "logprobs": [{"token_id": 1, "text": "ü", "logprob": -0.5, "top": []}],
        "usage": {"prompt_tokens": 2, "completion_tokens": 3, "cached_tokens": 0},
        "model": "m",
        "version": 3,
        "completions": [{"index": 0, "score": None} | {key: answer[key] for key in COMPLETION}],
        "prompt_logprobs": None,
    }


def test_generate_new_options(server: ScriptedServer, run: Any, tmp_path: Any) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    server.on("Generate", [last(), last(), last(), last()])
    flags = "--min-p 0.5 --repetition-penalty 2 --presence-penalty 1 --frequency-penalty 0.5 --min-tokens 3 --echo"
    objects(run("generate", "base", "x", *flags.split(), "--n", "1", "--best-of", "4", "--regex", "a+", "--json"))
    objects(run("generate", "base", "x", "--json-schema", str(schema), "--json"))
    objects(run("generate", "base", "x", "--choice", "a", "--choice", "b", "--json"))
    first, second, third = (request.sampling for request in server.requests("Generate"))
    assert first == g.SamplingParameters(
        min_p=0.5,
        repetition_penalty=2,
        presence_penalty=1,
        frequency_penalty=0.5,
        min_tokens=3,
        echo=True,
        n=1,
        best_of=4,
        structured_output=g.StructuredOutput(regex="a+"),
    )
    assert second.structured_output.json_schema == '{"type": "object"}'
    assert list(third.structured_output.choice.texts) == ["a", "b"]


def test_several_completions_are_printed_one_after_the_other(server: ScriptedServer, run: Any) -> None:
    stop, usage = g.FINISH_REASON_STOP, g.Usage(prompt_tokens=1, completion_tokens=2)
    second = g.GenerateResponse(text="two", index=1, finish_reason=stop, score=-1.5)
    first = g.GenerateResponse(text="one", index=0, finish_reason=stop, score=-0.5, usage=usage)
    server.on("Generate", [second, first])
    shown = run("generate", "base", "x", "--n", "2", "--best-of", "2").stdout
    assert shown == "--- 0  score -0.5000\none\n--- 1  score -1.5000\ntwo\n"


def test_several_completions_have_their_logprobs_in_text(server: ScriptedServer, run: Any) -> None:
    stop, usage = g.FINISH_REASON_STOP, g.Usage(prompt_tokens=1, completion_tokens=2)
    second = g.GenerateResponse(index=1, finish_reason=stop)
    second.MergeFrom(piece("b", 2, logprobs=[-2.5]))
    first = g.GenerateResponse(finish_reason=stop, usage=usage)
    first.MergeFrom(piece("a", 1, logprobs=[-0.5]))
    server.on("Generate", [second, first])
    lines = run("generate", "base", "x", "--n", "2", "--logprobs", "0").stdout.splitlines()
    header = "token  text  logprob"
    assert lines == ["--- 0", "a", header, "1      'a'   -0.500000", "--- 1", "b", header, "2      'b'   -2.500000"]


COMPLETION = ("text", "token_ids", "finish_reason", "logprobs")


def test_generate_options(server: ScriptedServer, run: Any) -> None:
    server.on("Generate", [last()])
    flags = "--max-tokens 9 --temperature 0.5 --top-p 0.9 --top-k 4 --seed 7 --stop A --stop B --ignore-eos"
    (answer,) = objects(run("generate", "base", "--token-ids", "1,2, 3", *flags.split(), "--json"))
    assert answer["logprobs"] is None
    sampling = g.SamplingParameters(
        max_tokens=9, temperature=0.5, top_p=0.9, top_k=4, seed=7, stop=["A", "B"], ignore_eos=True
    )
    request = g.GenerateRequest(model="base", token_ids=g.TokenIds(ids=[1, 2, 3]), sampling=sampling)
    assert server.requests("Generate")[0] == request


def test_generate_logprobs_as_text(server: ScriptedServer, run: Any) -> None:
    server.on("Generate", [piece("a", 1, logprobs=[-0.5]), last()])
    lines = run("generate", "base", "Say", "--logprobs", "0").stdout.splitlines()
    assert lines == ["a", "", "token  text  logprob", "1      'a'   -0.500000"]
