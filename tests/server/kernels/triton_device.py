"""Where the Triton kernels are tested: on a GPU if there is one, else in Triton's interpreter (tests/conftest.py)."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from graftwork_server.kernels.triton.kernels import TritonKernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)


def kernels_for(
    dtype: torch.dtype, out_features: Sequence[Sequence[int]] = (), busy_programs: int = 256
) -> TritonKernels:
    """The kernels, compiled or interpreted. Interpreted programs take milliseconds: fewer are faster."""
    from graftwork_server.kernels.triton.kernels import TritonKernels

    return TritonKernels(dtype, out_features, busy_programs)
