"""What every kernel takes of GPUs that need not be here: compiled ahead of time at its configuration, and read back.

``python -m safr_fast.kernels.resources`` writes RESOURCES.md beside this file; with the name of a target, and how many
of its arithmetics, it prints that target's kernels as JSON. The launchers themselves run on fake tensors, and what they
would launch is compiled, with their tiles and their specialisations. That needs a process in which Triton does not
interpret.
"""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

TABLE = Path(__file__).parent / "RESOURCES.md"
PROCESSES = 2  # that compile at a time
# dtype and float32 precision. The first two compile every kernel, the others those that they change.
ARITHMETIC = (
    ("bfloat16", "highest"),
    ("float32", "highest"),
    ("float16", "highest"),
    ("float32", "high"),
    ("float32", "medium"),
)
HEADER = """# What the kernels take of a GPU

Compiled ahead of time with Triton {triton}; nothing here was run. Written by `python -m safr_fast.kernels.resources`,
held against the compiler by `tests/test_triton_compile.py`: all of sm_90, elsewhere bfloat16 and, but for sm_100,
float32 at `highest`. *tiles*: tokens × tokens or features that a program works on at a time; *registers* of a thread;
*spills*: what of them goes to memory; *programs*: how many a streaming multiprocessor (gfx942: compute unit) holds at a
time; *matrix*: the best matrix instruction in the code.
interaction_gram, score_gradient and attention_gradient in three stages read by TMA, which tuning tries too.
"""
TILES = ("BLOCK", "BLOCK_T", "BLOCK_J", "BLOCK_K", "BLOCK_E", "BLOCK_D", "BLOCK_OUT")


@dataclass(frozen=True)
class Target:
    """A GPU to compile for: its configurations, what a program may take, and what all programs of a processor share."""

    name: str
    kind: str  # as configs.architecture calls it
    program_shared: int  # bytes
    processor_shared: int
    matrix_instructions: tuple[str, ...]  # best first; as the code that is read spells them
    arithmetic: tuple[tuple[str, str], ...] = ARITHMETIC
    disassembled: bool = False  # read as machine code rather than as PTX, which takes as long as compiling


# sm_80 stands for every Ampere and Ada: the smallest of them let a program have 99 KiB. gfx942, rich in registers, and
# sm_100, which takes sm_90's configurations, go without the arithmetic least likely to differ: compiling takes long.
TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "ampere", 101_376, 167_936, ("mma.sync",)),
        Target("sm_90", "hopper", 232_448, 233_472, ("HGMMA", "HMMA"), disassembled=True),
        Target("sm_100", "blackwell", 232_448, 233_472, ("tcgen05.mma", "mma.sync"), ARITHMETIC[:2]),
        Target("gfx942", "cdna", 65_536, 65_536, ("v_mfma",), ARITHMETIC[:3]),
    )
}


@dataclass(frozen=True)
class Resources:
    """A compiled kernel."""

    kernel: str
    arithmetic: str
    tiles: str
    num_warps: int
    num_stages: int
    registers: int  # of a thread
    local: int  # bytes of stack and, in machine code, instructions that load or store it; gfx942: spilled registers
    shared: int  # bytes
    matrix_instruction: str  # the best of the target's that it has; empty without any


def compile_for(target: Target) -> list[Resources]:
    """Everything that :func:`launch_everything` launches, compiled here and now."""
    import torch
    import triton
    from torch._subclasses.fake_tensor import FakeTensorMode
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction, MockTensor

    from . import configs

    capability = target.name.removeprefix("sm_")
    gpu = GPUTarget("cuda", int(capability), 32) if target.kind != "cdna" else GPUTarget("hip", target.name, 64)

    class Driver:
        def get_current_target(self) -> GPUTarget:
            return gpu

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    compiled: dict[str, Resources] = {}
    run = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        args = tuple(MockTensor(x.dtype) if isinstance(x, torch.Tensor) else x for x in args)
        binary = run(kernel, *args, grid=grid, warmup=True, **options)
        if binary.hash not in compiled:
            compiled[binary.hash] = Resources(
                kernel=kernel.__name__.removesuffix("_kernel"),
                arithmetic=dtype if dtype != "float32" else f"{dtype} {precision}",
                tiles="×".join(str(options[name]) for name in TILES if name in options),
                num_warps=binary.metadata.num_warps,
                num_stages=binary.metadata.num_stages,
                shared=binary.metadata.shared,
                **_read(binary, target),
            )

    triton.runtime.driver.set_active(Driver())
    JITFunction.run = compile_only
    configs.architecture = lambda device: target.kind
    for number, (dtype, precision) in enumerate(target.arithmetic):
        torch.set_float32_matmul_precision(precision)
        with FakeTensorMode():
            launch_everything(getattr(torch, dtype), number < 2)
    return list(compiled.values())


def launch_everything(dtype: Any, all_kernels: bool) -> None:
    """One call of each kind, at widths whose tiles differ. The forms are shared out, since compiling takes long."""
    import torch

    from . import configs, gradient_scale, interaction_launch, interaction_packed_launch, row_energy_launch

    def empty(*shape: int, dtype: Any = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda")

    def importance(h: torch.Tensor, mask: torch.Tensor | None, cu_seqlens: torch.Tensor | None) -> None:
        _, factor, *sums = row_energy_launch.importance(h, mask, cu_seqlens, 1e-5, 0.1, True, True)
        row_energy_launch.importance_backward(h, mask, cu_seqlens, *sums, factor, factor, 1e-5)

    def sums_alone(h: torch.Tensor, mask: torch.Tensor | None) -> None:
        energy, norm, moments = row_energy_launch.forward(h, mask, None, True)
        row_energy_launch.backward(h, mask, None, energy, norm, moments, energy, norm)

    mask, mask_of_8 = (empty(samples, 1024, dtype=torch.bool) for samples in (4, 8))
    cu_seqlens = empty(5, dtype=torch.int32)
    importance(empty(4, 1024, 256), mask, None)
    importance(empty(4, 1024, 256), None, None)
    q, k = empty(4, 8, 1024, 128), empty(4, 2, 1024, 128)
    tokens = configs.config("interaction_block", 8 * dtype.itemsize, 64, q.device).rows
    short, short_mask = empty(4, 8, tokens, 64), empty(4, tokens, dtype=torch.bool)
    interaction_launch.from_qk(short, short, short_mask, 0.1, False, True, False, True)
    if not all_kernels:
        interaction_launch.from_qk(q, k, mask, 0.1, False, True, False, True)
        return
    for length in (32, 1024):
        unaligned = empty(4, 8, length, 40)
        interaction_launch.from_qk(unaligned, unaligned, None, 0.1, True, True, False, True)
    interaction_launch.from_attention(empty(4, 8, tokens, tokens), short_mask, True, True, True)
    for heads in (8, 2):
        gradient = empty(4, 8, 1024, 64, dtype=torch.float32)
        gradient_scale.scale(gradient, empty(4, 8, dtype=torch.float32), empty(4, heads, 1024, 64))
    importance(empty(2048, 512), None, cu_seqlens)
    importance(empty(4, 1024, 100), mask, None)
    importance(empty(4, 256, 200), None, None)
    importance(empty(4, 256, 256), None, None)
    importance(empty(4, 256, 256), empty(4, 256, dtype=torch.bool), None)
    sums_alone(empty(4, 1024, 256), mask)
    sums_alone(empty(4, 256, 256), None)
    importance(empty(8, 1024, 1024), mask_of_8, None)
    for length in (1024, 128):  # of which the second, where tiles grow with the tokens, takes the smaller ones
        q_t, k_t, mask_t = empty(4, 8, length, 128), empty(4, 2, length, 128), empty(4, length, dtype=torch.bool)
        interaction_launch.from_qk(q_t, k_t, mask_t, 0.1, True, True, False, True)
        interaction_launch.from_qk(q_t, k_t, None, 0.1, False, True, False, False)
        interaction_launch.from_attention(empty(4, 8, length, length), mask_t, True, True, True)
    if dtype.itemsize == 2 and configs.architecture(q.device) in ("hopper", "blackwell"):
        with configs.choosing(_by_descriptors):
            interaction_launch.from_qk(q, k, mask, 0.1, False, True, False, True)
            interaction_launch.from_qk(q, k, None, 0.1, True, True, False, True)
            interaction_launch.from_attention(empty(4, 8, 1024, 1024), mask, True, True, True)
    q, k = empty(2048, 8, 64), empty(2048, 2, 64)
    interaction_packed_launch.from_qk(q, k, cu_seqlens, 0.1, dtype == torch.float32, True, False, True)


def _by_descriptors(kernel: str, bits: int, width: int, found: Any) -> Any:
    by_tma = kernel in ("interaction", "interaction_long", "gram", "gram_long")
    return replace(found, num_warps=8, num_stages=3, descriptors=True) if by_tma else found


def _read(binary: Any, target: Target) -> dict[str, Any]:
    """Registers, spills and matrix instructions of a compiled kernel."""
    if "amdgcn" in binary.asm:
        code = binary.asm["amdgcn"]
        registers, local = (int(re.search(rf"\.vgpr_{what}:\s+(\d+)", code)[1]) for what in ("count", "spill_count"))
    else:
        usage = _cuobjdump("-res-usage", binary.asm["cubin"])
        registers, local = (int(number) for number in re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
        code = _cuobjdump("-sass", binary.asm["cubin"]) if target.disassembled else binary.asm["ptx"]
        local += len(re.findall(r"\b(?:LDL|STL)\b", code))
    found = [name for name in target.matrix_instructions if re.search(rf"\b{re.escape(name)}", code)]
    return {"registers": registers, "local": local, "matrix_instruction": found[0] if found else ""}


def _cuobjdump(what: str, cubin: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout


def programs_a_processor(kernel: Resources, target: Target) -> int:
    """How many programs of a kernel a streaming multiprocessor, or compute unit, holds at a time."""
    shared = target.processor_shared // max(kernel.shared + (0 if target.kind == "cdna" else 1024), 1)
    if target.kind == "cdna":  # four SIMDs of 512 registers a lane and at most 8 waves
        waves = 4 * min(8, 512 // (-(-kernel.registers // 8) * 8))
        return min(waves // kernel.num_warps, shared)
    threads = 32 * kernel.num_warps
    return min(65_536 // (-(-kernel.registers // 8) * 8 * threads), 2048 // threads, shared, 32)


def section(kernels: list[Resources], target: Target) -> str:
    """A target's part of the table. Forms of a kernel that share their tiles share a row, the most that any takes."""
    worst: dict[tuple[Any, ...], Resources] = {}
    for kernel in kernels:
        key = (kernel.kernel, kernel.arithmetic, kernel.tiles, kernel.num_warps, kernel.num_stages)
        other = worst.get(key, kernel)
        most = {name: max(getattr(kernel, name), getattr(other, name)) for name in ("registers", "local", "shared")}
        worst[key] = replace(kernel, **most)
    lines = [
        f"## {target.name}",
        "",
        "| kernel | arithmetic | tiles | warps, stages | registers | spills | shared, KiB | programs | matrix |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for kernel in sorted(worst.values(), key=lambda kernel: (kernel.kernel, kernel.arithmetic, kernel.tiles)):
        lines.append(
            f"| {kernel.kernel} | {kernel.arithmetic} | {kernel.tiles} | {kernel.num_warps}, {kernel.num_stages} "
            f"| {kernel.registers} | {kernel.local} | {kernel.shared / 1024:.1f} "
            f"| {programs_a_processor(kernel, target)} | {kernel.matrix_instruction} |"
        )
    return "\n".join(lines) + "\n"


def compiled_elsewhere(target: Target) -> list[Resources]:
    """:func:`compile_for` in a process of its own, in which Triton compiles whatever this one does."""
    command = [sys.executable, "-m", "safr_fast.kernels.resources", target.name, str(len(target.arithmetic))]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"compiling for {target.name} failed:\n{run.stderr[-4000:]}")
    return [Resources(**kernel) for kernel in json.loads(run.stdout.splitlines()[-1])]


def write_table() -> None:
    with ThreadPoolExecutor(PROCESSES) as pool:
        sections = [
            section(kernels, target)
            for target, kernels in zip(TARGETS.values(), pool.map(compiled_elsewhere, TARGETS.values()), strict=True)
        ]
    TABLE.write_text(HEADER.format(triton=importlib.metadata.version("triton")) + "\n" + "\n".join(sections))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        asked = TARGETS[sys.argv[1]]
        asked = replace(asked, arithmetic=asked.arithmetic[: int(sys.argv[2])])
        print(json.dumps([asdict(kernel) for kernel in compile_for(asked)]))
    else:
        write_table()
