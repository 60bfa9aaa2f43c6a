"""Classify and embed in the clients and on the command line: what is sent, and what comes back."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.clients.scripted_server import ScriptedServer
from typer.testing import CliRunner

import graftwork
from graftwork.cli.app import app
from graftwork.v1 import generation_pb2 as g

LABELS = [g.LabelScore(label="good", logit=1.5, probability=0.75), g.LabelScore(label="bad", logit=0.25)]
CLASSIFIED = g.ClassifyResponse(
    results=[g.Classification(labels=LABELS, predicted_label="good", input_tokens=4)],
    problem_type=g.PROBLEM_TYPE_MULTI_LABEL,
    usage=g.Usage(prompt_tokens=4),
    model="mood",
    version=2,
)
EMBEDDED = g.EmbedResponse(
    embeddings=[g.Embedding(values=[0.5, -0.5, 0.25, 0.0, 1.0], input_tokens=3)],
    pooling=g.POOLING_CLS,
    usage=g.Usage(prompt_tokens=3),
    model="base",
)


async def test_classify(server: ScriptedServer, client: graftwork.Client, aclient: graftwork.AsyncClient) -> None:
    server.on("Classify", CLASSIFIED, CLASSIFIED)
    result = client.classify("mood", "fine")
    assert result == graftwork.ClassificationResult(
        results=(
            graftwork.Classification(
                labels=(graftwork.LabelScore("good", 1.5, 0.75), graftwork.LabelScore("bad", 0.25, None)),
                predicted_label="good",
                input_tokens=4,
            ),
        ),
        problem_type="multi_label",
        usage=graftwork.Usage(4, 0),
        model="mood",
        version=2,
    )
    assert await aclient.classify("mood", "fine") == result
    assert server.requests("Classify") == [g.ClassifyRequest(model="mood", inputs=[g.TextInput(text="fine")])] * 2


async def test_embed(server: ScriptedServer, client: graftwork.Client, aclient: graftwork.AsyncClient) -> None:
    server.on("Embed", EMBEDDED, EMBEDDED)
    result = client.embed("base", "fine", pooling="cls", normalize=False, dimensions=5)
    assert result == graftwork.EmbeddingResult(
        embeddings=(graftwork.Embedding((0.5, -0.5, 0.25, 0.0, 1.0), 3),),
        pooling="cls",
        usage=graftwork.Usage(3, 0),
        model="base",
        version=0,
    )
    assert await aclient.embed("base", "fine") == result
    one = g.TextInput(text="fine")
    assert server.requests("Embed") == [
        g.EmbedRequest(model="base", inputs=[one], pooling=g.POOLING_CLS, normalize=False, dimensions=5),
        g.EmbedRequest(model="base", inputs=[one], normalize=True),
    ]
    with pytest.raises(ValueError, match="mean, cls, last, max, mean_sqrt_len, weightedmean are accepted"):
        client.embed("base", "x", pooling="sum")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("inputs", "sent"),
    [
        ([1, 2], [g.TextInput(token_ids=g.TokenIds(ids=[1, 2]))]),
        (["a", "b"], [g.TextInput(text="a"), g.TextInput(text="b")]),
        ([("a", "b"), "c"], [g.TextInput(text="a", text_pair="b"), g.TextInput(text="c")]),
        ([[1], [2, 3], []], [g.TextInput(token_ids=g.TokenIds(ids=ids)) for ids in ([1], [2, 3], [])]),
        ([], []),
    ],
)
def test_inputs(server: ScriptedServer, client: graftwork.Client, inputs: Any, sent: list[g.TextInput]) -> None:
    server.on("Classify", CLASSIFIED)
    client.classify("mood", inputs)
    assert list(server.requests("Classify")[0].inputs) == sent


def run(server: ScriptedServer, *arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments), env={"GRAFTWORK_ADDRESS": server.address})
    assert result.exit_code == code, result.output + result.stderr
    return result.stdout if code == 0 else result.stderr


def test_classify_command(server: ScriptedServer) -> None:
    server.on("Classify", CLASSIFIED, CLASSIFIED, CLASSIFIED)
    assert run(server, "classify", "mood", "fine").splitlines() == [
        "text  label  probabilities",
        "fine  good   good 0.7500, bad 0.2500",
    ]
    answer = json.loads(run(server, "classify", "mood", "fine", "--json"))
    assert answer["results"][0]["labels"][0] == {"label": "good", "logit": 1.5, "probability": 0.75}
    run(server, "classify", "mood", "fine", "--pair", "so so")
    assert server.requests("Classify")[2].inputs[0] == g.TextInput(text="fine", text_pair="so so")


def test_embed_command(server: ScriptedServer) -> None:
    server.on("Embed", EMBEDDED, EMBEDDED)
    shown = run(server, "embed", "base", "x" * 70, "--pooling", "cls", "--no-normalize").splitlines()
    assert shown[1].split("  ")[0] == "x" * 57 + "..."
    assert shown[1].endswith("3       5           cls      [0.5000, -0.5000, 0.2500, 0.0000, ...]")
    assert server.requests("Embed")[0].normalize is False
    answer = json.loads(run(server, "embed", "base", "x", "--dimensions", "5", "--json"))
    assert answer["embeddings"] == [{"values": [0.5, -0.5, 0.25, 0.0, 1.0], "input_tokens": 3}]
    assert (answer["pooling"], server.requests("Embed")[1].dimensions) == ("cls", 5)
    assert "mean, cls, last, max," in run(server, "embed", "base", "x", "--pooling", "sum", code=2)
