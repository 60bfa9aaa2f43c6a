"""Every launch of the Triton kernels is compiled for real GPUs, down to machine code, though none is at hand.

The interpreter takes what the compiler refuses: types that do not agree, shapes that are no powers of two. This runs in
a process of its own, without the interpreter, with launches that compile instead.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = """
import sys, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from types import SimpleNamespace
from graftwork_server.layers.slots import SlotBlock
from graftwork_server.kernels.triton import attention, kernels, lora

capability, dtype = int(sys.argv[1]), getattr(torch, sys.argv[2])
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int64: "i64", torch.int32: "i32"}

class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        assert len(grid) <= 3 and all(size > 0 for size in grid)
        return self.compile

    def compile(self, *args, **constants):
        names = self.kernel.arg_names
        signature = dict.fromkeys(names, "constexpr")
        for name, value in zip(names, args):
            if isinstance(value, torch.Tensor):
                signature[name] = "*" + TYPES[value.dtype]
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=constants)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        print(self.kernel.__name__, len(made.asm["cubin"]), made.metadata.shared, made.asm["ptx"].count("mma.sync"))

for module, names in ((lora, ("shrink", "expand")), (attention, ("attend", "combine"))):
    for name in names:
        setattr(module, name, Compiled(getattr(module, name)))

group = SimpleNamespace(in_features=256, out_features=[256, 64, 64])
block = SlotBlock(((8, 16, 64),), [group], dtype, torch.device("cpu"))
triton_kernels = kernels.TritonKernels(dtype, [group.out_features])
products = triton_kernels.products([(0, 1, block, 3), (1, 40, block, 0)], torch.device("cpu"))
products.add(0, torch.zeros(40, 256, dtype=dtype), torch.zeros(40, 384, dtype=dtype))
for heads, dim, softcap in ((32, 64, None), (8, 128, 30.0), (8, 256, None)):
    keys = torch.zeros(3, 16, 8, dim, dtype=dtype)
    triton_kernels.attend(
        torch.zeros(2, heads, dim, dtype=dtype), keys, keys, torch.tensor([0, 1]),
        torch.zeros(2, 3, dtype=torch.int32), torch.ones(2, dtype=torch.int32), scale=0.1, window=None, softcap=softcap,
    )
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler for CUDA comes with its Linux packages alone")
@pytest.mark.parametrize(("capability", "dtype"), [(80, "float32"), (80, "bfloat16"), (90, "bfloat16")])
def test_every_launch_compiles(capability: int, dtype: str, tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(capability), dtype],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == ["shrink", "expand"] * 2 + ["attend", "combine"] * 3
    for name, size, shared, products in lines:
        assert int(size) > 0
        assert int(shared) <= 99 * 1024, "what a block may have on the smallest of these GPUs"
        assert dtype == "float32" or capability == 90 or name == "combine" or int(products) > 0, "matrix units are used"
