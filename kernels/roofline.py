"""What the targets' shapes should cost on an H100, from operations, bytes and launches, beside what they do cost.

``python -m safr_fast.kernels.roofline`` writes ROOFLINE.md beside this file. The arithmetic is older than the first
measurement; what that came to is read from ``benchmarks/results/gpu``.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from . import configs

PAGE = Path(__file__).parent / "ROOFLINE.md"
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "gpu"
# An H100 SXM as matrix products, copies and exponentials reach it, rather than as its data sheet has it.
FLOPS = 798e12  # bfloat16, a second
MEMORY = 3.0e12  # bytes a second
CACHE = 5.5e12  # bytes a second, from L2
CACHED_BYTES = 48 << 20  # what about stays there
EXPONENTIALS = 132 * 16 * 1.7e9  # a second
LAUNCH = 2.5e-6  # seconds from one kernel to the next, without a CUDA graph
REACHED = 0.7  # of FLOPS, by kernels whose tiles meet in registers only once


@dataclass(frozen=True)
class Work:
    """What one kernel does in all its launches: products, bytes of memory and of L2, exponentials."""

    flops: float = 0
    memory: float = 0
    cache: float = 0
    exponentials: float = 0
    launches: float = 1

    def limits(self) -> dict[str, float]:
        """Seconds that each resource asks for."""
        return {
            "products": self.flops / FLOPS / REACHED,
            "memory": self.memory / MEMORY,
            "L2": self.cache / CACHE,
            "exponentials": self.exponentials / EXPONENTIALS,
            "launches": self.launches * LAUNCH,
        }


@dataclass(frozen=True)
class Shape:
    name: str
    case: tuple[str, tuple[int, ...]]  # kind and shape, as ``benchmarks/gpu.py`` has them
    floor: float  # operations that the algorithm cannot do without
    kernels: list[Work]
    aim: str

    def row(self, measured: dict[tuple[str, tuple[int, ...]], float]) -> str:
        total = dict.fromkeys(("products", "memory", "L2", "exponentials", "launches"), 0.0)
        expected = 0.0
        for work in self.kernels:
            limits = work.limits()
            wait = limits.pop("launches")
            limiter = max(limits, key=limits.__getitem__)
            expected += limits[limiter] + wait
            total[limiter] += limits[limiter]
            total["launches"] += wait
        launches = sum(work.launches for work in self.kernels)
        floor, limiter = self.floor / FLOPS, max(total, key=total.__getitem__)
        share = total[limiter] / expected
        return (
            f"| {self.name} | {_time(floor)} | {_time(expected)} | {limiter}, {share:.0%} | {launches:.0f} "
            f"| {self.aim} | {_time(measured[self.case] / 1e3) if self.case in measured else ''} |"
        )


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.1f} ms"


def importance(B: int, T: int, E: int, aim: str) -> Shape:
    """Forward and backward in bfloat16. Each kernel reads h once from memory, or from L2 where all of it fits there."""
    rows = 2 * B * T * E  # bytes
    sums = 8 * B * T
    place = "cache" if rows < CACHED_BYTES else "memory"
    name, case = f"importance loss, B={B}, T={T}, E={E}", ("importance loss", (B, T, E))
    if T < 2 * E or T <= 512:
        gram = 2 * B * T * T * E
        return Shape(
            name, case, 2 * gram, [Work(gram, memory=rows + sums), Work(2 * gram, **{place: rows + sums})], aim
        )
    side = E // 64
    half = B * T * E * E * (1 + 1 / side)  # of S or S_α, tiles on the diagonal whole
    form = 4 * B * T * E * E  # S in two halves against h; S and S_α against h
    moments = 4 * B * E * E
    tiles = E // configs.table("hopper")["moment", 16].features
    launches = 1 if B * tiles * (tiles + 1) > configs.PROGRAMS else 2  # with the sum of shares
    kernels = [
        Work(half, memory=rows + moments, launches=launches),
        Work(form, **{place: rows + sums}),
        Work(half, **{place: rows + sums}, launches=launches),
        Work(form, **{place: 2 * rows + sums}),
    ]
    return Shape(name, case, 2 * half + 2 * form, kernels, aim)


def interaction(heads: int, T: int, D: int, aim: str) -> Shape:
    """Loss and gradients of q and k in bfloat16: A, M and φ(G) of a chunk of heads are all that is written between.

    A program reads its operands from L2 however often others read them, tile by tile. What one kernel leaves to the
    next passes through L2 too, and through memory unless the matrices alive between them fit in L2, which are all three
    before ``M A``, else one.
    """
    inputs, gradients = 4 * heads * T * D, 8 * heads * T * D
    square = heads * T * T
    floor = 3 * heads * T**3
    name = f"interaction, {heads} heads, T={T}, D={D}"
    case = "interaction from q, k", (heads // 8, 8, T, D)
    if T <= 64:
        return Shape(name, case, floor, [Work(4 * heads * T**3, memory=inputs + gradients, exponentials=square)], aim)
    head_bytes = 6 * T * T
    chunk = configs.heads_of_a_chunk(heads, head_bytes)
    chunks = configs.cdiv(heads, chunk)

    def kernel(flops: float, between: float, operands: float, alive: int, launches: int = 1, **more: float) -> Work:
        """``between``: bytes that it shares with other kernels, of ``alive`` matrices a head."""
        cached = chunk * alive * 2 * T * T <= CACHED_BYTES
        return Work(flops, 0 if cached else between, operands + between, launches=launches * chunks, **more)

    tile = configs.table("hopper")["interaction_long" if T > configs.LONG else "interaction", 16].rows
    half = heads * T**3 * (1 + tile / T)  # operations on the lower triangle, tiles on the diagonal whole
    kernels = [
        kernel(4 * square * D, 2 * square, 4 * square * D / tile, 1, exponentials=2 * square),
        kernel(half, 6 * square, 2 * half / tile, 3, launches=2),  # with the sum of tiles
        kernel(2 * heads * T**3, 8 * square, (3 if T > configs.LONG else 4) * heads * T**3 / tile, 3),
        kernel(2 * square * D, 2 * square, 2 * square * D / tile, 1),
        kernel(2 * square * D, 2 * square, 2 * square * D / tile, 1),
        Work(memory=inputs + gradients, launches=0),
    ]
    return Shape(name, case, floor, kernels, aim)


# What is aimed at, by T.
B, E, HEADS, D = 32, 256, 256, 64
IMPORTANCE = {128: "≤ 6 launches", 512: "≤ 6 launches", 2048: "≤ 1.6 × floor", 8192: "≤ 1.6 × floor"}
INTERACTION = {
    64: "one launch",
    256: "≤ 130 µs",
    512: "≤ 430 µs",
    2048: "≤ 1.8 × floor",
    8192: "≤ 1.8 × floor",
}
SHAPES = [
    *(importance(B, T, E, aim) for T, aim in IMPORTANCE.items()),
    *(interaction(HEADS, T, D, aim) for T, aim in INTERACTION.items()),
]


def latest() -> tuple[str, dict[tuple[str, tuple[int, ...]], float]]:
    """Name of the last session on an H100, and milliseconds in it of what is ours, in bfloat16 and as a graph."""
    path = max(RESULTS.glob("nvidia-h100*.json"), key=lambda path: (path.stem[-10:], path.stem))  # in a checkout alone
    rows = json.loads(path.read_text())["cases"]
    return path.stem, {
        (row["kind"], tuple(row["shape"])): row["graph_ms"]
        for row in rows
        if row["provider"] == "ours bfloat16" and "graph_ms" in row
    }


def page() -> str:
    session, measured = latest()
    return "\n".join(
        [
            "# What the kernels should take on an H100, and what they take",
            "",
            "Written by `python -m safr_fast.kernels.roofline`, whose source is the arithmetic. Forward and backward,",
            f"bfloat16. *measured*: as a CUDA graph, in `benchmarks/results/gpu/{session}.json`.",
            "",
            f"*floor*: operations of the algorithm at {FLOPS / 1e12:.0f} TFLOP/s. *expected*: for each kernel the most",
            f"of products at {REACHED:.0%} of that, memory at {MEMORY / 1e12:.1f} TB/s, L2 at {CACHE / 1e12:.1f} TB/s",
            f"and exponentials at {EXPONENTIALS / 1e12:.1f} T/s, and {LAUNCH * 1e6:.1f} µs a launch; summed.",
            "*limiter*: what the largest share of that goes to. Under a CUDA graph a launch costs about half.",
            "",
            "The interaction's tiles read an operand from L2 once for every row or column of a tile that it meets:",
            f"128 of them beyond T={configs.LONG}, where M A has twice as many columns, else 64. Programs that share",
            "an operand could read it once by a cluster's multicast, which Triton does not have.",
            "",
            "| | floor | expected | limiter | launches | aim | measured |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *(shape.row(measured) for shape in SHAPES),
            "",
        ]
    )


if __name__ == "__main__":
    PAGE.write_text(page())
