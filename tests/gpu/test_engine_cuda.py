"""The engine on a GPU: the same answers as transformers and PEFT, and weights that a second process can map."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch
from tests import toys
from tests.server.engine.harness import Harness, Reference, assert_greedy_matches, deltas_of

from graftwork_server.layers.models.causal import load_base

pytestmark = pytest.mark.gpu

MAPPER = """
import msgspec, sys, torch
from graftwork_server.base.weights import map_base_model
from graftwork_server.wire.tuning import SharedWeightsInfo
info = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=SharedWeightsInfo)
model = map_base_model(info)
print(float(sum(p.double().abs().sum() for p in model.parameters())))
"""


@pytest.mark.parametrize("architecture", list(toys.CONFIGS))
def test_mixed_batch_equals_peft(architecture: str, tmp_path: Path) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    directory = toys.make_model(architecture, tmp_path / "model")
    base = load_base(str(directory), torch.device("cuda"), torch.float32, tmp_path)
    harness = Harness(directory, base)
    adapters = {f"a{seed}": toys.make_adapter(directory, tmp_path / f"a{seed}", seed) for seed in range(2)}
    refs = {name: harness.place(name, deltas_of(path)) for name, path in adapters.items()}
    names = [*adapters, None]
    for index, prompt in enumerate(toys.prompts(6)):
        name = names[index % 3]
        harness.add(index, prompt, refs[name] if name else None)
    harness.run()
    harness.logits = {key: [row.cpu() for row in rows] for key, rows in harness.logits.items()}  # type: ignore[assignment]
    reference = Reference(directory, adapters)
    for index, prompt in enumerate(toys.prompts(6)):
        assert_greedy_matches(harness, reference, index, prompt, names[index % 3])


def test_another_process_maps_the_weights(tmp_path: Path) -> None:
    directory = toys.make_model("llama", tmp_path / "model")
    base = load_base(str(directory), torch.device("cuda"), torch.float32, tmp_path)
    expected = float(sum(p.double().abs().sum() for p in base.engine_model.model.parameters()))
    done = subprocess.run(
        [sys.executable, "-c", MAPPER],
        input=msgspec.msgpack.encode(base.weights.info()),
        capture_output=True,
        timeout=120,
        check=True,
    )
    assert float(done.stdout) == pytest.approx(expected)
