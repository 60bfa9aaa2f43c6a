"""Classify and embed: what is sent, and what comes back."""

from __future__ import annotations

from typing import Any

import pytest
from tests.clients.protos import CLASSIFIED, EMBEDDED
from tests.clients.scripted_server import ScriptedServer

import graftwork
from graftwork.v1 import generation_pb2 as g


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
