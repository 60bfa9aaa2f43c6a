"""Processors without AMX, AVX-512 or VNNI: the tests of the engine's answers run again as on two of them, in a process
of their own. make test-kinds runs more tests, on more kinds."""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path

import pytest
from tests.kinds import KINDS, run_tests

ANSWERS = {
    "base/test_quantization.py": "exact or int8_of_a_row or what_is_not_finite",
    "base/test_quantized_base.py": "mixed_equals and llama and int8",
    "kernels/test_native_quantized.py": "whatever_is_beside_it",
    "engine/adapters/test_peft_features.py": "llama and kernels",
    "engine/test_bfloat16_parity.py": "llama",
}


@pytest.mark.parametrize(("name", "whole_layers"), [("avx2", False), ("avx512 with bfloat16", True)])
def test_it_gives_the_same_answers(name: str, whole_layers: bool, tmp_path: Path) -> None:
    """whole_layers: kernels compute them, and products of bfloat16 in vectors."""
    if not KINDS[name].is_here():
        pytest.skip("this machine cannot stand for it")
    if shutil.which(os.environ.get("CC") or "cc") is None:
        pytest.skip("no C compiler")
    folder = Path(__file__).parents[1]
    chosen = " or ".join(f"{Path(file).stem} and ({which})" for file, which in ANSWERS.items())
    tests = [*(str(folder / file) for file in ANSWERS), "-k", chosen]
    row = run_tests(KINDS[name], 1, tests, {"XDG_CACHE_HOME": str(tmp_path)})
    assert row["failed"] == 0, row["output"]
    assert row["passed"] > 0, row["output"]
    assert row["skipped"] == 0
    (library,) = (ctypes.CDLL(str(path)) for path in (tmp_path / "graftwork").glob("kernels-*.so"))
    assert hasattr(library, "graftwork_lora_bfloat16")
    assert hasattr(library, "graftwork_layer_attend") == whole_layers
    assert not hasattr(library, "graftwork_tiles_ready")
