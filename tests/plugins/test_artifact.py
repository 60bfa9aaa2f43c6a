"""An artifact's files, as strategies read them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from graftwork_plugins import Artifact


@pytest.mark.parametrize(
    "dtypes", [[torch.bfloat16] * 3, [torch.float16] * 3, [torch.float32, torch.int64, torch.bool]]
)
def test_tensors_are_read_as_they_were_written(tmp_path: Path, dtypes: list[torch.dtype]) -> None:
    """Of one dtype, they are cut out of one mapping."""
    shapes = [(3, 5), (), (2, 1, 4)]
    written = {
        f"{index}": torch.randn(shape).mul(10).to(dtype)
        for index, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
    }
    save_file(written, tmp_path / "x.safetensors", metadata={"a": "b" * 3})
    read = Artifact(tmp_path).tensors("x.safetensors")
    assert set(read) == set(written)
    for name, tensor in written.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    save_file({}, tmp_path / "empty.safetensors")
    assert Artifact(tmp_path).tensors("empty.safetensors") == {}
