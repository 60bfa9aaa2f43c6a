"""Everything that PEFT expresses and the README's table lists, uploaded and asked over gRPC in one mixed batch: served
as PEFT answers, or refused by name."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests import toys
from tests.e2e.reference import Reference
from tests.e2e.serving import START_SECONDS, Server

from graftwork import AsyncClient, Client, FailedPreconditionError

PROMPT = [1, 20, 45, 77, 130, 99, 7, 3, 100]
ARCHITECTURES = ("llama", "qwen3_moe")
REFUSED: dict[str, Any] = {
    "layer_replication": [[0, 2], [1, 3]],
    "use_bdlora": {"target_modules_bd_a": ["q_proj"]},
    "use_qalora": True,
    "alora_invocation_tokens": [1, 2],
    "arrow_config": {"top_k": 2},
    "init_lora_weights": "pissa",
    "peft_type": "LOHA",
    "task_type": "QUESTION_ANS",
    "no_such_key": 1,
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Path, Server]]:
    """A server of a random model without a tokenizer."""
    folder = tmp_path_factory.mktemp("peft")
    model_dir = toys.make_model(request.param, folder / "model")
    running = Server(model_dir, folder / "data")
    yield request.param, model_dir, running
    running.close()


def made(architecture: str, model_dir: Path, folder: Path) -> dict[str, Path]:
    """A directory of each kind of adapter; of a mixture of experts, only what others do not have."""
    configs = toys.peft_configs(architecture)
    if architecture in toys.MIXTURES:
        configs = {name: configs[name] for name in ("gates of experts", "experts", "experts alone", "router")}
    return toys.make_all(model_dir, folder / "adapters", configs)


async def test_every_kind_is_served_as_peft_answers(served: tuple[str, Path, Server], tmp_path: Path) -> None:
    architecture, model_dir, server = served
    adapters = made(architecture, model_dir, tmp_path)
    names = {name: f"kind-{number}" for number, name in enumerate(adapters)}
    with server.client() as client:
        for name, directory in adapters.items():
            client.adapters.create(names[name], directory)
    async with AsyncClient(address=server.address, timeout=START_SECONDS) as client:
        # All at once: each is loaded while others run.
        answers = await asyncio.gather(
            *(client.generate(served_as, PROMPT, max_tokens=12, ignore_eos=True) for served_as in names.values()),
            client.generate("base", PROMPT, max_tokens=12, ignore_eos=True),
        )
        scores = await asyncio.gather(*(client.score(served_as, PROMPT) for served_as in names.values()))
    Reference(model_dir).assert_greedy(PROMPT, answers[-1].token_ids, "base")
    for (name, directory), answer, score in zip(adapters.items(), answers, scores, strict=False):
        reference = Reference(model_dir, directory)
        reference.assert_greedy(PROMPT, answer.token_ids, name)
        reference.assert_scored(PROMPT, [token.logprob for token in score.tokens])


@pytest.mark.parametrize("key", REFUSED)
def test_what_is_not_served_is_refused_by_name(client: Client, model_dir: Path, tmp_path: Path, key: str) -> None:
    directory = toys.make_adapter(model_dir, tmp_path / "adapter", r=4)
    config = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps(config | {key: REFUSED[key]}))
    with pytest.raises(FailedPreconditionError, match=key) as caught:
        client.adapters.create(f"refused-{key.replace('_', '-')}", directory)
    assert caught.value.reason in ("ARTIFACT_REJECTED", "ARTIFACT_NOT_RECOGNISED")
