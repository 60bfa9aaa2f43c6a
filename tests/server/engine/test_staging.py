"""Copies into the pool: what is cut into pieces arrives whole. The pinned way is tested in tests/gpu."""

from __future__ import annotations

import pytest
import torch

from graftwork_server.engine.staging import PlainCopies, copies_to, pieces


def draw(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("most_bytes", [1, 7, 64, 1 << 20])
def test_pieces_cover_every_byte_once(dtype: torch.dtype, most_bytes: int) -> None:
    sources = [draw(3, 5, dtype=dtype, seed=1), draw(5, 3, dtype=dtype, seed=2).t(), draw(1, 1, dtype=dtype, seed=3)]
    pool = torch.zeros(4, 3, 5, dtype=dtype)
    targets = [pool[1], pool[3], torch.zeros(1, 1, dtype=dtype)]
    for target, source in pieces(zip(targets, sources, strict=True), most_bytes):
        assert len(target) == len(source) <= most_bytes
        target.copy_(source)
    assert all(torch.equal(target, source) for target, source in zip(targets, sources, strict=True))
    assert not pool[[0, 2]].any()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[2\] does not fit"):
        list(pieces([(torch.zeros(3), torch.zeros(2))], 10))
    with pytest.raises(ValueError, match="bfloat16"):
        list(pieces([(torch.zeros(3), torch.zeros(3, dtype=torch.bfloat16))], 10))


def test_the_cpu_copies_plainly() -> None:
    target, source = torch.zeros(4), torch.arange(4.0)
    copies = copies_to(torch.device("cpu"))
    assert isinstance(copies, PlainCopies)
    copies.copy([(target, source)])
    assert torch.equal(target, source)
