"""The interaction's gradients, made beside the loss of each head, times what arrives for that loss later.

PyTorch multiplies by a factor that is one number for many elements by reading one element at a time.
"""

import triton
import triton.language as tl
from torch import Tensor

from .configs import cdiv

BLOCK = 4096


@triton.jit(do_not_specialize=["H"])
def scaled_kernel(
    gradient_ptr, factor_ptr, out_ptr, size, H, stride_b, stride_h, GROUP: tl.constexpr, BLOCK: tl.constexpr
):
    """``Σ factor · gradient`` over the GROUP heads, of H a sample, that share one, of ``size`` numbers each."""
    blocks = tl.cdiv(size, BLOCK)
    shared = tl.program_id(0).to(tl.int64) // blocks
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for member in range(GROUP):
        head = shared * GROUP + member
        factor = tl.load(factor_ptr + head // H * stride_b + head % H * stride_h)
        total += factor * tl.load(gradient_ptr + head * size + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(out_ptr + shared * size + at, total, mask=at < size)


def scale(gradient: Tensor, factor: Tensor, out: Tensor) -> None:
    """``out`` ``(B, heads, …)`` is ``gradient`` ``(B, H, …)`` of each head times ``factor`` ``(B, H)``, summed over
    those that share one of ``out``'s; or ``gradient`` itself, of which each program writes what it has read."""
    if out.numel() > 0:
        (B, heads), H, size = out.shape[:2], gradient.shape[1], out.shape[2:].numel()
        scaled_kernel[(B * heads * cdiv(size, BLOCK),)](
            gradient, factor, out, size, H, *factor.stride(), GROUP=H // heads, BLOCK=BLOCK, num_warps=8
        )
