"""What the C++ back end computes, packs and holds, counted rather than timed, beside the chosen algorithm's floor."""

from collections.abc import Callable

import pytest
import torch
from support import every_level, forced, needs_cpp, normal, peak_mib
from torch import Tensor

import safr_fast as sf

pytestmark = needs_cpp
E, D, HEADS = 256, 64, 2


def work(call: Callable[[], object]) -> tuple[int, int, int]:
    """Multiply-adds, bytes of packed operands, and of packed panels turned for the other side."""
    from safr_fast import _cpu

    before = _cpu.work()
    call()
    return tuple(after - then for after, then in zip(_cpu.work(), before, strict=True))


def row_energy_work(h: Tensor, counter: int = 0, **layout: Tensor) -> tuple[int, int]:
    """Multiply-adds, or with ``counter`` 1 packed bytes, or with 2 turned ones, of a forward pass alone, and of a
    backward pass."""
    with torch.no_grad():
        forward = work(lambda: sf.row_energy(h, impl="cpp", **layout))
    leaf = h.requires_grad_()
    energy, squared_norm = sf.row_energy(leaf, impl="cpp", **layout)
    backward = work(lambda: torch.autograd.grad((energy + squared_norm).sum(), leaf))
    return forward[counter], backward[counter]


@every_level
@pytest.mark.parametrize(("T", "spare"), [(128, 1.2), (256, 1.12), (448, 1.12)])
def test_the_token_path_makes_half_of_the_gram_matrix(level: str, T: int, spare: float) -> None:
    if level.endswith("amx"):
        spare = 1 + 32 / T  # its tiles are 32 × 32, and whole on the diagonal
    with forced(level):
        forward, backward = row_energy_work(normal(1, T, E))
    assert T * T * E / 2 <= forward <= spare * T * T * E / 2
    assert 3 * T * T * E / 2 <= backward <= spare * 3 * T * T * E / 2


@every_level
def test_the_feature_path_is_linear_in_tokens(level: str) -> None:
    with forced(level):
        for T in (1024, 4096):
            forward, backward = row_energy_work(normal(1, T, E))
            assert T * E * E <= forward <= 1.3 * T * E * E  # half of S, half of h S h, both in strips
            assert 5 * T * E * E / 2 <= backward <= 1.1 * 5 * T * E * E / 2  # half of S_α, S h, S_α h


@every_level
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_the_interaction_costs_half_a_gram_matrix_and_one_product(level: str, is_causal: bool) -> None:
    T = 1024
    q, k = (normal(1, HEADS, T, D, seed=seed).requires_grad_() for seed in (0, 1))

    def call() -> Tensor:
        return sf.interaction_loss_from_qk(q, k, is_causal=is_causal, impl="cpp")

    # Where keys are hidden: T³/6 for the Gram matrix, T³/3 for M A, in steps of a block.
    gram, product = (T**3 / 6, T**3 / 3) if is_causal else (T**3 / 2, T**3)
    with forced(level):
        both, _, _ = work(call)
        with torch.no_grad():
            forward, _, _ = work(call)
    spare = 1.6 if is_causal else 1.1
    assert HEADS * gram <= forward <= spare * HEADS * (gram + T * T * D)
    assert HEADS * (gram + product) <= both <= spare * HEADS * (gram + product + 3 * T * T * D)


@every_level
def test_padding_costs_nothing(level: str) -> None:
    lengths = torch.tensor([200, 37, 5, 0])
    mask = torch.arange(300) < lengths[:, None]
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    h, qk = normal(4, 300, 64), [normal(4, HEADS, 300, D, seed=seed) for seed in (0, 1)]
    with forced(level):
        assert row_energy_work(h.clone(), mask=mask) == row_energy_work(h[mask], cu_seqlens=offsets)
        padded, *_ = work(lambda: sf.interaction_loss_from_qk(*qk, mask, impl="cpp"))
        packed, *_ = work(
            lambda: sf.interaction_loss_from_qk(*(x.transpose(1, 2)[mask] for x in qk), cu_seqlens=offsets, impl="cpp")
        )
    assert padded == packed > 0


def at_most(level: str, floats: float) -> float:
    """Bytes of operands that hold so many numbers."""
    return (6.2 if level.endswith("amx") else 4.4) * floats  # AMX's are of three bfloat16 a number


def turns(T: int, side: int = 256) -> int:
    """Columns of half a Gram matrix, once for each block of rows that they are multiplied with."""
    return sum(T - first for first in range(0, T, side))


@every_level
@pytest.mark.parametrize("T", [256, 448, 1024, 4096])
def test_row_energy_packs_each_operand_once(level: str, T: int) -> None:
    token = T < 512
    with forced(level):
        forward, backward = row_energy_work(normal(1, T, E), counter=1)
        turned = row_energy_work(normal(1, T, E), counter=2)
    # Of h for G; for S and hᵀS'h, with half of S'.
    assert T * E * 4 <= forward <= at_most(level, T * E if token else 2 * T * E + E * E / 2)
    # Of h for G and M h, with M; for S_α (h and α h) and the products with S and S_α.
    assert T * E * 4 <= backward <= at_most(level, 2 * T * E + T * T if token else 3 * T * E + 2 * E * E)
    # Panels of G are turned once for each block of rows that meets them, those of S once in all, where tiles need it.
    bytes_each = 6 if level.endswith("amx") else 0
    assert turned == ((bytes_each * turns(T) * E,) * 2 if token else (bytes_each * T * E, 0))


@every_level
@pytest.mark.parametrize("T", [256, 512, 1024])
def test_the_interaction_packs_each_operand_once(level: str, T: int) -> None:
    q, k = (normal(1, HEADS, T, D, seed=seed).requires_grad_() for seed in (0, 1))
    A = normal(1, HEADS, T, T).softmax(-1).requires_grad_()
    with forced(level):
        _, from_a, turned = work(lambda: sf.interaction_loss(A, impl="cpp"))
        _, from_qk, _ = work(lambda: sf.interaction_loss_from_qk(q, k, impl="cpp"))
        with torch.no_grad():
            _, forward, _ = work(lambda: sf.interaction_loss(A, impl="cpp"))
    assert turned == level.endswith("amx") * HEADS * 6 * turns(T) * T
    assert HEADS * T * T * 4 <= forward <= at_most(level, HEADS * T * T)  # A for A Aᵀ
    assert from_a <= at_most(level, HEADS * 3 * T * T)  # and M and A for M A
    assert from_qk <= at_most(level, HEADS * (5 * T * T + 4 * T * D))  # and ∂L/∂s twice; q and k twice


@pytest.mark.parametrize("layout", ["", ", torch.ones(1, T, dtype=torch.bool)"], ids=["plain", "masked"])
def test_row_energy_of_8192_tokens_holds_nothing_of_their_square(layout: str) -> None:
    leaves = f"[torch.randn(1, T, {E}).requires_grad_()]"
    peak = peak_mib(leaves, f"sum(x.sum() for x in sf.row_energy(*leaves{layout}))", 8192)
    assert peak <= 8192 * E * 4 / 2**20 + 16  # its gradient; the square would be 256


def test_the_token_path_of_8192_tokens_holds_nothing_of_their_square() -> None:
    """Which is taken where most rows cancel: here all but a long one, which they are orthogonal to."""
    leaves = "[torch.block_diag(torch.tensor([[1e3]]), torch.randn(T - 1, 255))[None].requires_grad_()]"
    peak = peak_mib(leaves, "sum(x.sum() for x in sf.row_energy(*leaves))", 8192)
    assert peak <= 8192 * 256 * 4 / 2**20 + 16
    made, _ = row_energy_work(torch.block_diag(torch.tensor([[1e3]]), normal(8191, 255))[None])
    assert made >= 8192**2 * 256 / 2  # by the token path indeed


@pytest.mark.parametrize(
    ("heads", "threads", "gradient", "matrices"), [(4, 2, False, 1.5), (2, 1, True, 3)], ids=["forward", "gradient"]
)
def test_interaction_of_8192_tokens_holds_one_head_a_thread(
    heads: int, threads: int, gradient: bool, matrices: float
) -> None:
    leaves = f"[torch.randn(1, {heads}, T, 16).requires_grad_() for _ in range(2)]"
    loss = "sf.interaction_loss_from_qk(*leaves, is_causal=True)"
    peak = peak_mib(leaves, loss, 8192, gradient=gradient, threads=threads)
    assert peak <= threads * matrices * 8192**2 * 4 / 2**20  # where one matrix more of every head would not fit
