"""The matrix product that every Triton kernel uses."""

import pytest
import torch
from support import DEVICE, needs_triton, normal, relative_error

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
tiles = pytest.importorskip("safr_fast.kernels.tiles")

pytestmark = [needs_triton, pytest.mark.usefixtures("uninitialised_is_nan")]


@triton.jit
def product_kernel(a_ptr, b_ptr, out_ptr, PRECISION: tl.constexpr):
    """``a b``, all (16, 16)."""
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    acc = tl.zeros((16, 16), tl.float32)
    tl.store(out_ptr + at, tiles.product(tl.load(a_ptr + at), tl.load(b_ptr + at), acc, PRECISION))


@pytest.mark.parametrize("precision", ["ieee", "bf16"])
def test_float16_operands_keep_their_bits(precision: str) -> None:
    a, b = normal(16, 16, seed=1).half().to(DEVICE), normal(16, 16, seed=2).half().to(DEVICE)
    out = torch.empty(16, 16, device=DEVICE)
    product_kernel[(1,)](a, b, out, PRECISION=precision)
    assert relative_error(out, a.double() @ b.double()) < 1e-6
