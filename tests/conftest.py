"""What must be settled before any test module is imported."""

from __future__ import annotations

import os

# As tuners run (engine/tuners.py): trainings in a test's own process must be equal bit for bit too.
os.environ.setdefault("MKL_CBWR", "AUTO")

import torch  # MKL reads the variable when it is first used

if not torch.cuda.is_available():
    # The Triton kernels are tested in Triton's interpreter then. Triton reads this when it is first imported, which
    # transformers does as well.
    os.environ["TRITON_INTERPRET"] = "1"
