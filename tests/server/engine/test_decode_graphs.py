"""The engine as it runs on CUDA, but for the capture: Triton kernels, cache of blocks, decode steps over buffers that
stay. Without a GPU, the kernels are interpreted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests import toys
from tests.server.engine.harness import Harness, Reference, assert_greedy_matches, deltas_of
from tests.server.kernels.triton_device import DEVICE, kernels_for

from graftwork_plugins import Prefix, Scale
from graftwork_server.engine.decode_graphs import (
    DecodeSteps,
    StaticBatch,
    decode_steps_for,
    is_replayable,
    row_counts,
)
from graftwork_server.engine.scheduling.sequence import ScheduledChunk, Sequence
from graftwork_server.layers.attention.block_kv_cache import BlockKVCache, DecodingRows
from graftwork_server.layers.models.base_model import BaseModel
from graftwork_server.layers.models.causal import load_base
from graftwork_server.layers.routing import Routing
from graftwork_server.types import AdapterRef
from graftwork_server.wire.engine import Generate, Sampling


def load(directory: Path) -> BaseModel:
    """A base with the kernels of CUDA, on whatever device there is."""
    base = load_base(str(directory), DEVICE, torch.float32, directory, native=False)
    model = base.engine_model
    model.triton = kernels_for(torch.float32, [group.out_features for group in model.groups], busy_programs=4)
    return base


@pytest.fixture(scope="module")
def base(llama_dir: Path) -> BaseModel:
    return load(llama_dir)


class Recorded:
    """A harness whose decode steps run over static buffers, and what they said to each batch."""

    def __init__(self, directory: Path, base: BaseModel, max_sequences: int = 64) -> None:
        self.harness = Harness(directory, base, max_sequences=max_sequences)
        runner = self.harness.engine._runner
        cache, triton = runner._cache, base.engine_model.triton
        assert isinstance(cache, BlockKVCache)
        assert triton is not None
        longest = base.info.context_tokens
        self.steps = DecodeSteps(
            base.engine_model, cache, triton, DEVICE, max_sequences=max_sequences, longest=longest, capture=False
        )
        self.shapes: list[tuple[int, int]] = []
        """rows and most ranks of each step that ran over the buffers"""
        self.eager = 0
        forward, run = self.steps._forward, self.steps.run

        def forwarding(rows: int, most_ranks: int) -> torch.Tensor:
            self.shapes.append((rows, most_ranks))
            return forward(rows, most_ranks)

        def running(chunks: Any) -> torch.Tensor | None:
            logits = run(chunks)
            self.eager += logits is None
            return logits

        self.steps._compute, self.steps.run = forwarding, running  # type: ignore[method-assign]
        runner._decode_steps = self.steps


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_any_mix_of_ranks_answers_as_peft_does(architecture: str, tmp_path: Path) -> None:
    directory = toys.make_model(architecture, tmp_path / "model")
    base = load(directory)
    recorded = Recorded(directory, base)
    harness = recorded.harness
    adapters = {f"a{rank}": toys.make_adapter(directory, tmp_path / f"a{rank}", rank, r=rank) for rank in (2, 8, 3)}
    refs: dict[str | None, AdapterRef | None] = {n: harness.place(n, deltas_of(path)) for n, path in adapters.items()}
    names = [*adapters, None]
    prompts = toys.prompts(5)
    for index, prompt in enumerate(prompts):
        harness.add(index, prompt, refs.get(names[index % 4]), max_tokens=3 + index)
    harness.run()
    assert {rows for rows, _ in recorded.shapes} == {1, 2, 4, 8}, "each number of rows as sequences end"
    assert recorded.eager, "prompts do not run over the buffers"
    reference = Reference(directory, adapters)
    harness.logits = {key: [row.cpu() for row in rows] for key, rows in harness.logits.items()}  # type: ignore[assignment]
    for index, prompt in enumerate(prompts):
        assert_greedy_matches(harness, reference, index, prompt, names[index % 4])


def test_a_batch_of_the_base_launches_nothing_for_adapters(llama_dir: Path, base: BaseModel) -> None:
    recorded = Recorded(llama_dir, base)
    for index, prompt in enumerate(toys.prompts(3)):
        recorded.harness.add(index, prompt, max_tokens=3)
    recorded.harness.run()
    assert {ranks for _, ranks in recorded.shapes} == {0}
    reference = Reference(llama_dir, {})
    for index, prompt in enumerate(toys.prompts(3)):
        assert_greedy_matches(recorded.harness, reference, index, prompt, None)


def test_evicted_and_reloaded_into_another_slot(llama_dir: Path, base: BaseModel, tmp_path: Path) -> None:
    """What is captured names no slot: an adapter that comes back elsewhere is found by its new address."""
    recorded = Recorded(llama_dir, base)
    harness = recorded.harness
    paths = {f"a{seed}": toys.make_adapter(llama_dir, tmp_path / f"a{seed}", seed) for seed in range(2)}
    reference = Reference(llama_dir, paths)
    prompt = toys.prompts(1)[0]
    for round_number, order in enumerate((["a0", "a1"], ["a1", "a0"])):
        refs = {name: harness.place(f"{name}-{round_number}", deltas_of(paths[name])) for name in order}
        for index, name in enumerate(paths):
            harness.add(10 * round_number + index, prompt, refs[name], max_tokens=3)
        harness.run()
        for index, name in enumerate(paths):
            assert_greedy_matches(harness, reference, 10 * round_number + index, prompt, name)
        for name in order:
            harness.engine.adapters.unload(f"{name}-{round_number}")


# ---------------------------------------------------------------------------------------------- what is replayed


def test_row_counts() -> None:
    assert row_counts(1) == [1]
    assert row_counts(3) == [1, 2, 4]
    assert row_counts(24) == [1, 2, 4, 8, 16, 24]
    assert row_counts(25)[-1] == 32
    assert row_counts(256)[-1] == 256
    assert row_counts(4096)[-1] == 256, "larger batches run without graphs"


def test_too_many_rows_run_in_the_usual_way(llama_dir: Path, base: BaseModel) -> None:
    recorded = Recorded(llama_dir, base)
    recorded.steps._counts = [1, 2]
    for index, prompt in enumerate(toys.prompts(3)):
        recorded.harness.add(index, prompt, max_tokens=2 + index)
    recorded.harness.run()
    assert {rows for rows, _ in recorded.shapes} == {1, 2}
    assert recorded.eager > 1


def test_what_a_graph_cannot_do_runs_in_the_usual_way(llama_dir: Path, base: BaseModel) -> None:
    """Row changes, prefixes before they are written, prompts."""
    recorded = Recorded(llama_dir, base)
    harness = recorded.harness
    scale = Scale(module="model.layers.0.mlp.down_proj", factors=torch.full((48,), 0.5), of="output")
    changed = harness.place("scale", [scale])
    harness.add(1, [5, 6, 7], changed, max_tokens=3)
    harness.run()
    assert not recorded.shapes
    prefixed = harness.place("prefix", [Prefix(embeddings=torch.randn(3, 48) * 0.1)])
    harness.add(2, [5, 6, 7], prefixed, max_tokens=4)
    harness.run()
    assert recorded.shapes == [(1, 0)] * 3, "all but the prompt, whose virtual tokens stand in the cache then"


def chunk_of(start: int, count: int, tokens: int, table: list[int], **request: Any) -> ScheduledChunk:
    sequence = Sequence.of(Generate(id=1, prompt_ids=list(range(tokens)), sampling=Sampling(max_tokens=1), **request))
    sequence.block_table = table
    return ScheduledChunk(sequence, start, count)


def test_one_sampled_token_can_be_replayed() -> None:
    assert is_replayable(chunk_of(19, 1, 20, [3, 4]))
    assert not is_replayable(chunk_of(0, 20, 20, [3, 4]))
    assert not is_replayable(chunk_of(5, 1, 20, [3, 4])), "part of a prompt: nothing is sampled"
    assert not is_replayable(chunk_of(19, 1, 20, [3, 4], prompt_logprobs=1))


def test_rows_that_are_not_needed_touch_the_padding_block_alone() -> None:
    batch = StaticBatch(8, 100, padding_block=99, device=DEVICE)
    batch.fill(8, [chunk_of(19, 1, 20, [3, 4])] * 8, [(0, 8, 1234)])
    batch.fill(4, [chunk_of(19, 1, 20, [3, 4]), chunk_of(2, 1, 3, [7])], [(1, 1, 77)])
    on_device = {name: tensor[:4].tolist() for name, tensor in batch.on_device.items()}
    assert on_device["input_ids"] == [19, 2, 0, 0]
    assert on_device["position_ids"] == [19, 2, 0, 0]
    assert on_device["cache_rows"] == [4 * 16 + 3, 7 * 16 + 2, 99 * 16, 99 * 16]
    assert on_device["lengths"] == [20, 3, 1, 1]
    assert [row[:1] for row in on_device["tables"]] == [[3], [7], [99], [99]]
    assert on_device["tables"][0][:2] == [3, 4]
    assert on_device["tiles"] == [[1, 1, 77], [0, 0, 0], [0, 0, 0], [0, 0, 0]]


def test_neighbours_of_one_slot_share_a_tile(llama_dir: Path, base: BaseModel, tmp_path: Path) -> None:
    harness = Harness(llama_dir, base)
    path = toys.make_adapter(llama_dir, tmp_path / "a", 1, r=5)
    slots: list[Any] = []
    for name in ("x", "y"):
        harness.place(name, deltas_of(path))
        adapter = harness.engine.adapters.lease(name)
        assert adapter is not None
        slots.append((adapter.block, adapter.slot))
    x, y = slots
    triton = base.engine_model.triton
    assert triton is not None
    tiles, most = triton.decode_tiles([None, x, x, y, (None, 0), *[y] * 17, None])
    assert [tile[:2] for tile in tiles] == [(1, 2), (3, 1), (5, 16), (21, 1)]
    assert tiles[0][2] == triton.address(*x)
    assert most == 16
    assert triton.decode_tiles([None, (None, 0)]) == ([], 0)


def test_the_cpu_has_no_graphs(llama_dir: Path, llama: BaseModel) -> None:
    harness = Harness(llama_dir, llama)
    model = llama.engine_model
    cache = harness.engine._runner._cache
    assert decode_steps_for(model, cache, torch.device("cpu"), 64, 100, True) is None
    assert harness.engine._runner._decode_steps is None
    assert not Routing.of(None, torch.device("cpu"))
    assert DecodingRows.of([0, 1], [[1], [2]], [3, 4], 2).all_rows
    assert not DecodingRows.of([0, 2], [[1], [2]], [3, 4], 3).all_rows
