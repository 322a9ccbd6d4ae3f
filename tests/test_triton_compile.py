"""Every Triton kernel compiles ahead of time for GPUs that are not here: to matrix instructions, and within the chip.

The launchers themselves are run on fake tensors, and what they would launch is compiled, with their tiles and their
specialisations. That takes a process of its own: under the interpreter a kernel is no longer what a compiler takes.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

# Compute capability or name, how the configurations call it, and the bytes of shared memory of a program.
TARGETS = {"sm_80": ("ampere", 101_376), "sm_90": ("hopper", 232_448), "gfx942": ("cdna", 65_536)}
DTYPES = ("bfloat16", "float32")
WITHOUT_PRODUCTS = {"span_kernel", "stage_kernel", "packed_total_kernel"}
KERNELS = Path(__file__).parents[1] / "kernels"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_to_matrix_instructions_without_spills(target: str, dtype: str, cache: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    result = subprocess.run(
        [sys.executable, __file__, target, dtype], env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr[-4000:]
    kernels = json.loads(result.stdout.splitlines()[-1])
    names = {kernel["name"] for kernel in kernels}
    defined = {
        name for path in KERNELS.glob("*.py") for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.M)
    }
    unused = {"row_energy_token_kernel", "row_energy_token_backward_kernel"} if dtype == "float32" else set()
    assert names == defined - unused
    for kernel in kernels:
        assert kernel["matrix_instructions"] > 0 or kernel["name"] in WITHOUT_PRODUCTS, kernel
        assert kernel["spilled"] == 0, kernel
        assert kernel["shared_memory"] <= TARGETS[target][1], kernel


def launch_everything(dtype: Any) -> None:
    """One call of each kind, at widths whose tiles differ."""
    import torch
    from safr_fast.kernels import interaction_launch, interaction_packed_launch, row_energy_launch

    def empty(*shape: int, dtype: Any = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda")

    def row_energy(h: torch.Tensor, mask: torch.Tensor | None, cu_seqlens: torch.Tensor | None) -> None:
        energy, norm, moments = row_energy_launch.forward(h, mask, cu_seqlens, True)
        row_energy_launch.backward(h, mask, cu_seqlens, energy, norm, moments, energy, norm)

    mask, cu_seqlens = empty(4, 512, dtype=torch.bool), empty(5, dtype=torch.int32)
    row_energy(empty(4, 512, 256), mask, None)
    row_energy(empty(512, 512), None, cu_seqlens)
    q, k = empty(4, 8, 512, 128), empty(4, 2, 512, 128)
    interaction_launch.from_qk(q, k, mask, 0.1, True, True, False, True)
    interaction_launch.from_attention(empty(4, 8, 512, 512), mask, True, True, True)
    interaction_packed_launch.from_qk(empty(2048, 8, 64), empty(2048, 2, 64), cu_seqlens, 0.1, False, True, False, True)


def main(target: str, dtype: str) -> None:
    import torch
    import triton
    from safr_fast.kernels import configs
    from torch._subclasses.fake_tensor import FakeTensorMode
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction, MockTensor

    kind, number = target[:2], target.removeprefix("sm_")
    gpu = GPUTarget("cuda", int(number), 32) if kind == "sm" else GPUTarget("hip", target, 64)

    class Driver:
        def get_current_target(self) -> GPUTarget:
            return gpu

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    compiled: dict[str, dict[str, Any]] = {}
    run = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        args = tuple(MockTensor(x.dtype) if isinstance(x, torch.Tensor) else x for x in args)
        binary = run(kernel, *args, grid=grid, warmup=True, **options)
        if binary.hash not in compiled:
            compiled[binary.hash] = {"name": kernel.__name__, "shared_memory": binary.metadata.shared, **facts(binary)}

    triton.runtime.driver.set_active(Driver())
    JITFunction.run = compile_only
    configs.architecture = lambda device: TARGETS[target][0]
    with FakeTensorMode():
        launch_everything(getattr(torch, dtype))
    print(json.dumps(list(compiled.values())))


def facts(binary: Any) -> dict[str, int]:
    """Registers, spilled ones among them, and matrix instructions of a compiled kernel."""
    if "amdgcn" in binary.asm:
        code = binary.asm["amdgcn"]
        registers, spilled = (int(re.search(rf"\.vgpr_{what}:\s+(\d+)", code)[1]) for what in ("count", "spill_count"))
        return {"registers": registers, "spilled": spilled, "matrix_instructions": len(re.findall("v_mfma", code))}
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(x) for x in re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    products = re.findall(r"\b(?:wgmma\.mma_async|mma)\.sync\.aligned", binary.asm["ptx"])
    return {"registers": registers, "spilled": stack, "matrix_instructions": len(products)}


if __name__ == "__main__":
    main(*sys.argv[1:])
