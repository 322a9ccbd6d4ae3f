"""What the tests put in place of parts of Triton's interpreter does what those do."""

import pytest
import torch
from support import needs_interpreter, normal

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
pytestmark = needs_interpreter
SHAPE = 8, 16


@triton.jit
def sum_and_product(x, y, more_x, more_y):
    return x + more_x, y * more_y


@triton.jit
def larger(x, more_x):
    return tl.where(x > more_x, x, more_x)


@triton.jit
def reduced_kernel(x_ptr, sum_ptr, product_ptr, most_ptr, AXIS: tl.constexpr, KEPT: tl.constexpr, LEFT: tl.constexpr):
    at = 16 * tl.arange(0, 8)[:, None] + tl.arange(0, 16)[None, :]
    x = tl.load(x_ptr + at)
    sums, products = tl.reduce((x, 1 + x / 8), AXIS, sum_and_product, keep_dims=KEPT)
    most = tl.reduce(x, AXIS, larger, keep_dims=KEPT)
    left = tl.arange(0, LEFT)
    tl.store(sum_ptr + left, tl.reshape(sums, (LEFT,)))
    tl.store(product_ptr + left, tl.reshape(products, (LEFT,)))
    tl.store(most_ptr + left, tl.reshape(most, (LEFT,)))


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_reduction_by_halves_is_that_of_one_element_after_another(
    axis: int, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import interpreted

    x, left = normal(*SHAPE), SHAPE[1 - axis]
    results = []
    for reduce in (interpreted.by_halves, interpreted.one_by_one):
        monkeypatch.setattr(interpreted.interpreter.ReduceOps, "generic_reduce", reduce)
        results.append([torch.full((left,), torch.nan) for _ in range(3)])
        reduced_kernel[(1,)](x, *results[-1], axis, kept, left)
    expected = x.double().sum(axis), (1 + x.double() / 8).prod(axis), x.double().amax(axis)
    for by_halves, one_by_one, of_torch in zip(*results, expected, strict=True):
        torch.testing.assert_close(by_halves, one_by_one)
        torch.testing.assert_close(by_halves.double(), of_torch, rtol=1e-5, atol=1e-5)
