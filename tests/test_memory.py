"""Peak memory beyond the inputs, forward and backward: nothing T×T in row energy, one head's workspace in the
interaction."""

import pytest
from support import needs_cpp, peak_mib

pytestmark = needs_cpp
TOKENS, WIDTH, HEAD = 4096, 256, 64
ROW_ENERGY = "sum(x.sum() for x in sf.row_energy(*leaves))"
IMPORTANCE = "sf.importance_loss(*leaves)"


@pytest.mark.parametrize(
    ("loss", "batch"), [(ROW_ENERGY, 1), (ROW_ENERGY, 8), (ROW_ENERGY, 48), (IMPORTANCE, 1), (IMPORTANCE, 8)]
)
def test_row_energy_needs_its_gradient_and_16_mib(loss: str, batch: int) -> None:
    peak = peak_mib(f"[torch.randn({batch}, T, {WIDTH}).requires_grad_()]", loss, TOKENS)
    assert peak <= batch * TOKENS * WIDTH * 4 / 2**20 + 16


@pytest.mark.parametrize(("heads", "threads"), [(2, 1), (4, 2)])
def test_interaction_needs_its_gradients_and_one_workspace_a_thread(heads: int, threads: int) -> None:
    leaves = f"[torch.randn(1, {heads}, T, {HEAD}).requires_grad_() for _ in range(2)]"
    peak = peak_mib(leaves, "sf.interaction_loss_from_qk(*leaves)", TOKENS, threads=threads)
    gradients = 2 * heads * TOKENS * HEAD * 4
    assert peak <= (gradients + 12 * TOKENS**2 * threads) / 2**20
