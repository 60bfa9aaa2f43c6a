"""Adapters that plain PEFT and transformers wrote, served by name, give what PEFT and transformers say."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from peft import LoraConfig
from tests import toys
from tests.e2e.reference import Reference
from tests.e2e.serving import START_SECONDS, Server, run_cli

from graftwork import AsyncClient, Client, NotFoundError

ADAPTERS = {
    "plain": {"r": 8},
    "subset": {"r": 3, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 4, "use_rslora": True},
    "patterns": {
        "r": 4,
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 12},
        "alpha_pattern": {"down_proj": 3, "layers.0.self_attn.v_proj": 40},
    },
    "dora": {"r": 5, "use_dora": True, "modules_to_save": ["model.norm"], "trainable_token_indices": [20, 45, 211]},
}
RANKS = {"plain": 8, "subset": 3, "rslora": 4, "patterns": 12, "dora": 5}
MODULES = {"subset": 6, "dora": 21 + 1 + 1}
"""Bound modules where they are not the 21 linear layers: DoRA's norm and embedding."""
PROMPTS = [[1, 20, 45, 77, 130, 99], [1, 211, 8, 16, 250, 33, 61, 90, 12, 140, 7, 19]]


@pytest.fixture(scope="module")
def references(client: Client, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    """Uploads one adapter of each kind; returns who says what its answers must be, by name."""
    folder = tmp_path_factory.mktemp("adapters")
    known = {"base": Reference(model_dir)}
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        if name == "dora":
            settings = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"} | config
            directory = toys.make_peft(model_dir, folder / name, LoraConfig(**settings), seed)
        else:
            directory = toys.make_adapter(model_dir, folder / name, seed, **config)
        published = client.adapters.create(name, directory, load=True)
        assert (published.version, published.strategy, published.rank) == (1, "lora", RANKS[name])
        assert published.load_report is not None
        assert published.load_report.modules_bound == MODULES.get(name, 21)
        known[name] = Reference(model_dir, directory)
    directory = toys.make_checkpoint(model_dir, folder / "checkpoint", seed=9)
    published = client.adapters.create("checkpoint", directory)
    assert (published.version, published.strategy, published.rank) == (1, "full", 0)
    known["checkpoint"] = Reference(directory)
    return known


async def test_greedy_answers_in_one_mixed_batch_are_pefts(server: Server, references: dict[str, Reference]) -> None:
    """The checkpoint is cold: it is loaded while the others run, and must not disturb them."""
    requests = [(name, prompt) for prompt in PROMPTS for name in references]
    running, together = set(), set()

    async def ask(connected: AsyncClient, name: str, prompt: list[int]) -> list[int]:
        tokens: list[int] = []
        stream = await connected.generate(name, prompt, max_tokens=32, ignore_eos=True, stream=True)
        async for chunk in stream:
            running.add(name)
            together.update(running if len(running) > 1 else ())
            tokens += chunk.token_ids
            if chunk.finish_reason:
                running.discard(name)
                assert (chunk.model, chunk.version) == (name, 0 if name == "base" else 1)
        return tokens

    async with AsyncClient(address=server.address, timeout=START_SECONDS) as connected:
        answers = await asyncio.gather(*(ask(connected, name, prompt) for name, prompt in requests))
    assert together, "nothing ran side by side"  # on a busy machine the first may have ended when the last begins
    for (name, prompt), answer in zip(requests, answers, strict=True):
        assert len(answer) == 32
        references[name].assert_greedy(prompt, answer, name)
    assert len({tuple(answer) for answer in answers}) == len(requests), "two models gave the same answer"


@pytest.mark.parametrize("name", ["base", *ADAPTERS, "checkpoint"])
def test_score_equals_the_reference(client: Client, references: dict[str, Reference], name: str) -> None:
    ids = client.tokenize("the quick brown fox jumps over five lazy dogs").token_ids
    scored = client.score(name, ids)
    references[name].assert_scored(ids, [token.logprob for token in scored.tokens])


def test_the_command_line_serves_by_name_and_version(
    server: Server, references: dict[str, Reference], model_dir: Path
) -> None:
    prompt = ",".join(map(str, PROMPTS[0]))
    done = run_cli("generate", "rslora@1", "--token-ids", prompt, "--max-tokens", "9", address=server.address)
    assert (done.returncode, done.stderr) == (0, "")
    missing = run_cli("generate", "rslora@2", "--token-ids", prompt, address=server.address)
    assert missing.returncode == 4
    assert "rslora" in missing.stderr
    assert "Traceback" not in missing.stderr


def test_a_deleted_adapter_finishes_its_streams_and_its_name_starts_afresh(
    client: Client, model_dir: Path, tmp_path: Path
) -> None:
    directories = [toys.make_adapter(model_dir, tmp_path / str(seed), seed) for seed in (50, 51)]
    references = [Reference(model_dir, directory) for directory in directories]
    prompt = PROMPTS[0]
    client.adapters.create("replaced", directories[0])
    with client.generate("replaced", prompt, max_tokens=300, ignore_eos=True, stream=True) as stream:
        tokens = list(next(stream).token_ids)
        assert client.adapters.delete("replaced") == 1
        with pytest.raises(NotFoundError):
            client.generate("replaced", prompt, max_tokens=1)
        # The same prompt under the same name: nothing of the old weights may be left in any cache.
        client.adapters.create("replaced", directories[1])
        answer = client.generate("replaced", prompt, max_tokens=24, ignore_eos=True)
        for chunk in stream:
            tokens += chunk.token_ids
    assert (len(tokens), chunk.finish_reason) == (300, "length")
    references[0].assert_greedy(prompt, tokens)
    references[1].assert_greedy(prompt, answer.token_ids)
    assert client.adapters.get("replaced").version == answer.version
    client.adapters.delete("replaced")
    with pytest.raises(NotFoundError) as caught:
        client.generate("replaced", prompt, max_tokens=1)
    assert caught.value.reason == "ADAPTER_NOT_FOUND"
