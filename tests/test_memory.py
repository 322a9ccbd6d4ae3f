"""Peak memory beyond the inputs, forward and backward: nothing T×T in row energy, one head's workspace in the
interaction. Measured as resident pages in a process of its own, so that buffers of every library count."""

import json
import subprocess
import sys

import pytest
from support import backend_names

MIB = 2**20
PROBE = """
import json, torch, safr_fast
from pathlib import Path

torch.set_num_threads({threads})

def status(field):
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").open() if line.startswith(field))

def step(shrink):
    {setup}
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = status("VmRSS")
    loss = {loss}
    gradients = torch.autograd.grad(loss, leaves)
    return status("VmHWM") - before, sum(gradient.nbytes for gradient in gradients)

step(16)  # libraries loaded, threads started
print(json.dumps(step(1)))
"""
HIDDEN = "leaves = [torch.randn({batch}, 4096 // shrink, 256).requires_grad_()]"
QUERY_KEY = "leaves = [torch.randn({batch}, {heads}, 4096 // shrink, 64).requires_grad_() for _ in range(2)]"

pytestmark = pytest.mark.skipif(
    not any(name.startswith("cpp") for name in backend_names()), reason="the C++ extension is not built"
)


def measured(setup: str, loss: str, threads: int) -> tuple[int, int]:
    """Bytes at the peak beyond what was there before, and bytes of the gradients."""
    code = PROBE.format(setup=setup, loss=loss, threads=threads)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return tuple(json.loads(run.stdout))


ROW_ENERGY = "sum(x.sum() for x in safr_fast.row_energy(*leaves))"
IMPORTANCE = "safr_fast.importance_loss(*leaves)"


@pytest.mark.parametrize(
    ("loss", "batch"), [(ROW_ENERGY, 1), (ROW_ENERGY, 8), (ROW_ENERGY, 48), (IMPORTANCE, 1), (IMPORTANCE, 8)]
)
def test_row_energy_needs_its_gradient_and_16_mib(loss: str, batch: int) -> None:
    peak, gradients = measured(HIDDEN.format(batch=batch), loss, threads=2)
    assert peak <= gradients + 16 * MIB, f"{peak / MIB:.1f} MiB for a gradient of {gradients / MIB:.1f}"


@pytest.mark.parametrize(("batch", "heads", "threads"), [(1, 2, 1), (1, 4, 2)])
def test_interaction_needs_its_gradients_and_one_workspace_a_thread(batch: int, heads: int, threads: int) -> None:
    loss = "safr_fast.interaction_loss_from_qk(*leaves)"
    peak, gradients = measured(QUERY_KEY.format(batch=batch, heads=heads), loss, threads)
    allowed = gradients + 12 * 4096**2 * threads
    assert peak <= allowed, f"{peak / MIB:.1f} MiB, allowed {allowed / MIB:.1f}"
