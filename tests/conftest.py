"""What must be settled before any test module is imported."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    # The Triton kernels are tested in Triton's interpreter then. Triton reads this when it is first imported, which
    # transformers does as well.
    os.environ["TRITON_INTERPRET"] = "1"
