"""What 16-bit workspaces cost the interaction's gradients, on attention from flat to peaky, against float64.

The interpreter is slow and multiplies no bfloat16, so long sequences and bfloat16 go through an emulation of where the
kernels round, which the interpreter vouches for.
"""

import pytest
import torch
from support import DEVICE, needs_triton, normal, plain_interaction_total_from_qk, relative_error
from torch import Tensor

pytestmark = [needs_triton, pytest.mark.usefixtures("uninitialised_is_nan")]
WIDTH, TILE = 64, 64
SHARPNESS = {"flat": 1.0, "medium": 4.0, "peaky": 16.0}
# Largest error of a gradient to the one digit that counts; ten times that is what plain autograd in float32 leaves at
# T=256 and a thousand times at T=2048.
CASES = {
    ("flat", 256, False): {torch.float16: 5e-4, torch.bfloat16: 4e-3},
    ("flat", 2048, False): {torch.float16: 4e-4, torch.bfloat16: 3e-3},
    ("medium", 1024, True): {torch.float16: 8e-4, torch.bfloat16: 7e-3},
    ("peaky", 1024, True): {torch.float16: 9e-4, torch.bfloat16: 6e-3},
}
LOSS_ERROR = 2e-5


def query_key(attention: str, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    q, k = (normal(1, 1, tokens, WIDTH, seed=seed) for seed in (1, 2))
    return (SHARPNESS[attention] * q).to(dtype), k.to(dtype)


def exact(q: Tensor, k: Tensor, is_causal: bool) -> tuple[Tensor, ...]:
    q, k = (x.double().requires_grad_() for x in (q, k))
    total = plain_interaction_total_from_qk(q, k, is_causal=is_causal, squared=True, exclude_diagonal=False)
    return total.detach(), *torch.autograd.grad(total.sum(), (q, k))


def rounded(x: Tensor, dtype: torch.dtype, scale: Tensor | float) -> Tensor:
    return (x * scale).to(dtype).float() / scale


def emulated(q: Tensor, k: Tensor, is_causal: bool) -> tuple[Tensor, ...]:
    """Loss and gradients with A, M, φ(G) and ∂L/∂s rounded as by ``kernels/interaction_*.py``; sums in float32."""
    dtype, q, k = q.dtype, q[0, 0].float(), k[0, 0].float()
    scores = q @ k.mT / WIDTH**0.5
    if is_causal:
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf)
    attention = rounded(scores.softmax(-1), torch.float16, 2.0**15)
    gram = attention @ attention.mT
    phi = rounded(gram.square(), torch.float16, 2.0**15)
    pair = rounded(2 * gram * (attention + attention.mT), torch.float16, 2.0**13)
    row_term = ((attention * phi).sum(1) + (pair * gram).sum(1)) / attention.sum(1)
    score_grad = attention * (row_term[:, None] - phi - pair @ attention)
    top = row_term.view(-1, TILE).amax(1).repeat_interleave(TILE)[:, None]
    score_grad = rounded(score_grad, dtype, torch.exp2(13 - top.log2().floor()))
    total = (attention * (1 - gram.square())).sum()
    return total.view(1, 1), (score_grad @ k / WIDTH**0.5)[None, None], (score_grad.mT @ q / WIDTH**0.5)[None, None]


@pytest.mark.parametrize(("attention", "tokens", "is_causal"), CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_lose_no_more_than_their_last_bits(
    attention: str, tokens: int, is_causal: bool, dtype: torch.dtype
) -> None:
    q, k = query_key(attention, tokens, dtype)
    errors = [relative_error(*pair) for pair in zip(emulated(q, k, is_causal), exact(q, k, is_causal), strict=True)]
    assert errors[0] < LOSS_ERROR
    assert all(float(f"{error:.0e}") <= CASES[attention, tokens, is_causal][dtype] for error in errors[1:]), errors


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("attention", SHARPNESS)
def test_the_kernels_round_where_the_emulation_does(attention: str, is_causal: bool) -> None:
    """So they are equal but for sums in another order, which now and then push a number to the other side."""
    from safr_fast.kernels import launch

    q, k = query_key(attention, 2 * TILE, torch.float16)
    form = {"scale": WIDTH**-0.5, "is_causal": is_causal, "squared": True, "exclude_diagonal": False}
    results = launch.interaction_from_qk(q.to(DEVICE), k.to(DEVICE), None, None, need_grad=True, **form)
    errors = [relative_error(*pair) for pair in zip(results, exact(q, k, is_causal), strict=True)]
    differences = [relative_error(*pair) for pair in zip(results, emulated(q, k, is_causal), strict=True)]
    assert all(difference < max(0.5 * error, 1e-6) for difference, error in zip(differences, errors, strict=True)), (
        differences,
        errors,
    )
