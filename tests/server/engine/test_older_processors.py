"""Processors without AMX, AVX-512 or VNNI: the kernels are compiled for them, torch and its libraries are told to do
without, and the tests of the engine's answers run again, in a process of their own."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
ANSWERS = {
    "test_quantization.py": "exact or int8_of_a_row or what_is_not_finite or mixed_equals and llama and int8",
    "test_peft_features.py": "llama and kernels",
    "test_bfloat16_parity.py": "llama",
}


@dataclass(frozen=True)
class Processor:
    """One that this machine can stand for."""

    march: str
    """For the compiler"""
    torch: str
    """ATEN_CPU_CAPABILITY"""
    onednn: str
    """ONEDNN_MAX_CPU_ISA"""
    flag: str
    """What /proc/cpuinfo says of it"""
    whole_layers: bool
    """Kernels compute them; products of bfloat16 in vectors"""


PROCESSORS = {
    "avx2": Processor("x86-64-v3", "avx2", "AVX2", "avx2", whole_layers=False),
    "avx512 with bfloat16": Processor("cooperlake", "avx512", "AVX512_CORE_BF16", "avx512_bf16", whole_layers=True),
}


@pytest.mark.parametrize("name", list(PROCESSORS))
def test_it_gives_the_same_answers(name: str, tmp_path: Path) -> None:
    processor, compiler = PROCESSORS[name], shutil.which(os.environ.get("CC") or "cc")
    cpuinfo = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not cpuinfo.exists() or processor.flag not in cpuinfo.read_text().split():
        pytest.skip("another kind of processor")
    if compiler is None:
        pytest.skip("no C compiler")
    wrapper = tmp_path / "cc"
    wrapper.write_text(
        f'#!/bin/sh\nfor arg; do shift; [ "$arg" = -march=native ] && arg=-march={processor.march}\n'
        f'set -- "$@" "$arg"; done\nexec {compiler} "$@"\n'
    )
    wrapper.chmod(0o755)
    folder = Path(__file__).parent
    chosen = " or ".join(f"{file.removesuffix('.py')} and ({which})" for file, which in ANSWERS.items())
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--basetemp", tmp_path / "t"]
        + [str(folder / file) for file in ANSWERS]
        + ["-k", chosen],
        cwd=ROOT,
        env=os.environ
        | {
            "CC": str(wrapper),
            "XDG_CACHE_HOME": str(tmp_path),
            "ATEN_CPU_CAPABILITY": processor.torch,
            "ONEDNN_MAX_CPU_ISA": processor.onednn,
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout
    (library,) = (ctypes.CDLL(str(path)) for path in (tmp_path / "graftwork").glob("kernels-*.so"))
    assert hasattr(library, "graftwork_lora_bfloat16")
    assert hasattr(library, "graftwork_layer_attend") == processor.whole_layers
    assert not hasattr(library, "graftwork_tiles_ready")
