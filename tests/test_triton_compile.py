"""Every Triton kernel compiles ahead of time for GPUs that are not here: to matrix instructions, within the chip."""

import importlib.metadata
import re
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")
resources = pytest.importorskip("safr_fast.kernels.resources")

KERNELS = Path(__file__).parents[1] / "kernels"
HEADS = {
    "| kernel | arithmetic | tiles | warps, stages | registers | spills | shared, KiB | programs | matrix |",
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
}
WITHOUT_PRODUCTS = {"span", "stage", "scaled", "packed_total", "packed_strip_total", "interaction_total",
                    "moment_total", "row_energy_total"}  # fmt: skip


def rows_of_product(kernel: "resources.Resources") -> int:
    tiles = kernel.tiles.split("×")
    return int(tiles[-1 if kernel.kernel in ("moment", "weighted_moment") else 0])  # hᵀh has features for rows


# Compiling takes long: every arithmetic for the chip that kernels are tuned for, elsewhere the first, with all kernels.
@pytest.mark.parametrize(("name", "arithmetics"), [("sm_90", 5), ("sm_80", 2), ("sm_100", 1), ("gfx942", 2)])
def test_kernels_compile_to_matrix_instructions_without_spills(name: str, arithmetics: int) -> None:
    target = resources.TARGETS[name]
    target = replace(target, arithmetic=target.arithmetic[:arithmetics])
    kernels = resources.compiled_elsewhere(target)
    defined = {
        name for path in KERNELS.glob("*.py") for name in re.findall(r"^def (\w+)_kernel\(", path.read_text(), re.M)
    }
    assert {kernel.kernel for kernel in kernels} == defined
    for kernel in kernels:
        assert kernel.local == 0, kernel
        assert kernel.shared <= target.program_shared, kernel
        if kernel.kernel not in WITHOUT_PRODUCTS:
            assert kernel.matrix_instruction, kernel
            if "16" in kernel.arithmetic and kernel.num_warps >= 4 and rows_of_product(kernel) >= 64:
                assert kernel.matrix_instruction == target.matrix_instructions[0], kernel
    if importlib.metadata.version("triton") == re.search(r"with Triton ([\d.]+\d)", resources.TABLE.read_text())[1]:
        committed = {row for row in committed_rows(name) if row.split(" | ")[1] in map(arithmetic, target.arithmetic)}
        compiled = {row for row in resources.section(kernels, target).splitlines() if row.startswith("| ")}
        assert compiled - HEADS == committed, "run `python -m safr_fast.kernels.resources`"


@pytest.mark.parametrize("name", resources.TARGETS)
def test_no_kernel_of_the_table_spills_or_goes_beyond_the_chip(name: str) -> None:
    """Of the arithmetics that are compiled when the table is written alone too."""
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in committed_rows(name)]
    assert {row[1] for row in rows} == set(map(arithmetic, resources.TARGETS[name].arithmetic))
    for kernel, _, _, _, _, spills, shared, programs, matrix in rows:
        assert int(spills) == 0, kernel
        assert float(shared) * 1024 <= resources.TARGETS[name].program_shared, kernel
        assert int(programs) >= 1, kernel
        assert matrix or kernel in WITHOUT_PRODUCTS, kernel


def arithmetic(dtype_and_precision: tuple[str, str]) -> str:
    dtype, precision = dtype_and_precision
    return f"{dtype} {precision}" if dtype == "float32" else dtype


def committed_rows(name: str) -> set[str]:
    (section,) = (part for part in resources.TABLE.read_text().split("\n## ") if part.startswith(f"{name}\n"))
    return {row for row in section.splitlines() if row.startswith("| ")} - HEADS


@pytest.mark.parametrize(
    ("name", "num_warps", "registers", "shared", "programs"),
    [
        ("sm_90", 8, 255, 0, 1),
        ("sm_90", 4, 128, 0, 4),
        ("sm_90", 4, 129, 0, 3),
        ("sm_90", 4, 32, 64 << 10, 3),
        ("sm_90", 1, 16, 0, 32),
        ("sm_80", 4, 32, 64 << 10, 2),
        ("gfx942", 8, 256, 0, 1),
        ("gfx942", 4, 64, 20 << 10, 3),
    ],
)
def test_programs_are_as_many_as_registers_threads_and_shared_memory_allow(
    name: str, num_warps: int, registers: int, shared: int, programs: int
) -> None:
    kernel = resources.Resources("", "", "", num_warps, 2, registers, 0, shared, "")
    assert resources.programs_a_processor(kernel, resources.TARGETS[name]) == programs
