"""The Triton kernels reach elements past 2³¹: tiles start at 64-bit offsets, and inside one 32 bits do."""

import mmap

import pytest
import torch
from support import DEVICE, needs_triton, normal, offsets
from torch import Tensor

pytestmark = [needs_triton, pytest.mark.usefixtures("uninitialised_is_nan")]
FURTHEST = 2**31 // 128  # elements between rows from which on a tile of 128 of them spans too many


def far_apart(x: Tensor, stride: int) -> Tensor:
    """``x`` with ``stride`` elements between its rows, in memory of which the pages between them are never touched."""
    size = (x.shape[0] - 1) * stride + x[0].numel()
    if DEVICE == "cuda":
        if size * x.itemsize > torch.cuda.mem_get_info()[0]:
            pytest.skip(f"needs {size * x.itemsize >> 30} GiB of the GPU's memory")
        room = torch.empty(size, dtype=x.dtype, device=DEVICE)
    else:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        room = torch.frombuffer(mmap.mmap(-1, size * x.itemsize, flags), dtype=x.dtype)
    return room.as_strided(x.shape, (stride, *x.stride()[1:])).copy_(x)


@pytest.mark.parametrize(
    ("shape", "strides", "tokens", "is_copied"),
    [
        ((2, 300, 8), (2**40, FURTHEST - 1, 1), -2, False),
        ((2, 300, 8), (2**40, FURTHEST, 1), -2, True),
        ((2, 300, 8), (2**40, 16, 2), -2, True),
        ((300, 2, 8), (FURTHEST - 1, 2**40, 1), 0, False),
        ((300, 2, 8), (FURTHEST, 8, 1), 0, True),
        ((2, 300, 16), (2**40, 16, 1), -2, False),
        ((2, 300, 16), (2**40, 24, 1), -2, True),
        ((2, 300, 16), (2**40 + 8, 16, 1), -2, True),
    ],
    ids=str,
)
def test_tensors_whose_tiles_span_2_31_elements_or_lie_askew_are_copied(
    shape: tuple[int, ...], strides: tuple[int, ...], tokens: int, is_copied: bool
) -> None:
    from safr_fast.kernels.tensors import readable

    x = torch.empty(0, device="meta").as_strided(shape, strides)
    read = readable(x, tokens)
    assert (read is not x) == is_copied
    assert read.is_contiguous() == is_copied


def test_a_dense_tensor_that_begins_askew_is_copied() -> None:
    from safr_fast.kernels.tensors import readable

    x = normal(1 + 2 * 5 * 16)[1:].view(2, 5, 16)
    assert readable(x).storage_offset() == 0
    assert torch.equal(readable(x), x)


@pytest.mark.parametrize(("tokens", "stride"), [(515, FURTHEST - 8), (40, 2**26)], ids=["in place", "copied"])
def test_rows_past_2_31_are_read_and_their_gradients_made(tokens: int, stride: int) -> None:
    from safr_fast.kernels import launch

    x = normal(tokens, 8, dtype=torch.float16, device=DEVICE)
    h = far_apart(x, stride)
    for cu_seqlens in (None, offsets([tokens], DEVICE), offsets([9, tokens - 9], DEVICE)):
        results = []
        for rows in (h, x):
            rows = rows if cu_seqlens is not None else rows.unsqueeze(0)
            energy, norm, moments = launch.row_energy(rows, None, cu_seqlens, True)
            ones = torch.ones_like(energy)
            gradient = launch.row_energy_backward(rows, None, cu_seqlens, energy, norm, moments, ones, ones)
            results.append((energy, norm, gradient))
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize(("tokens", "stride"), [(130, FURTHEST - 8), (40, 2**26)], ids=["in place", "copied"])
@pytest.mark.parametrize("packed", [False, True], ids=["heads", "packed"])
def test_queries_past_2_31_are_read_and_their_gradients_made(packed: bool, tokens: int, stride: int) -> None:
    from safr_fast.kernels import launch

    x = normal(tokens, 1, 8, dtype=torch.float16, device=DEVICE)
    q = far_apart(x, stride)
    cu_seqlens = offsets([5, tokens - 5], DEVICE) if packed else None
    results = []
    for rows in (q, x):
        rows = rows if packed else rows.transpose(0, 1).unsqueeze(0)
        results.append(
            launch.interaction_from_qk(
                rows, rows, None, cu_seqlens, scale=0.3, is_causal=False, squared=True, exclude_diagonal=False,
                need_grad=True,
            )
        )  # fmt: skip
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
