"""Everything that a GPU has to be asked, in one command within ten minutes: tests, benchmarks, a sweep over tiles.

    python benchmarks/gpu_session.py                     # writes benchmarks/results/gpu/<device>-<date>.json and .md
    python benchmarks/gpu_session.py --dry-run --output /somewhere    # no GPU: tiny shapes in Triton's interpreter

Each part has its share of the time and says what it left out. A provider is first held against float64 on one sample or
head; then timed by events over whole steps, forward and backward, with a cold L2 cache and warm clocks, and once more
replayed as a CUDA graph, which takes the launches out of it. Rates are over what ``torch.mm`` and a copy reach in the
same process.
"""

import argparse
import datetime
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import formulas
import torch
from comparison import WRONG, Loss, gradients, relative_error
from torch import Tensor

HERE = Path(__file__).parent
SHARES = {"tests": 0.35, "benchmarks": 0.35, "sweep": 0.3}  # of the time
SECONDS_A_PROVIDER = 1.0
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Case:
    """Inputs of one shape, and the cheapest known exact work on them."""

    kind: str  # of LOSSES
    shape: tuple[int, ...]  # (B, T, E), or (B, H, T, D)
    floor: float  # operations, forward and backward

    @classmethod
    def importance(cls, B: int, T: int, E: int) -> "Case":
        return cls("importance", (B, T, E), B * formulas.row_energy_floor(T, E))

    @classmethod
    def interaction(cls, B: int, H: int, T: int, D: int) -> "Case":
        return cls("interaction", (B, H, T, D), B * formulas.interaction_floor(T, H, D))

    def inputs(self, device: str, dtype: torch.dtype, part: bool = False) -> list[Tensor]:
        """All, or one sample and head, which costs little in float64."""
        generator = torch.Generator(device).manual_seed(0)
        shape = (*(1 for _ in self.shape[:-2]), *self.shape[-2:]) if part else self.shape
        count = 1 if self.kind == "importance" else 2
        return [2 * torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(count)]


def losses() -> dict[str, dict[str, Loss]]:
    """The plain formula first: in float64 it is the oracle."""
    import safr_fast as sf

    return {
        "importance": {
            "eager": formulas.importance,
            "compiled": formulas.compiled(formulas.importance),
            "algebra compiled": formulas.compiled(formulas.importance_by_moment),
            "ours": lambda h: sf.importance_loss(h, impl="triton"),
        },
        "interaction": {
            "eager": formulas.interaction_from_qk,
            "compiled": formulas.compiled(formulas.interaction_from_qk),
            "ours": lambda q, k: sf.interaction_loss_from_qk(q, k, impl="triton"),
        },
    }


CASES = [
    *(Case.importance(32, T, 256) for T in (64, 256, 512, 2048, 8192)),
    *(Case.interaction(32, 8, T, 64) for T in (64, 256, 512, 2048, 8192)),
]
DRY_CASES = [Case.importance(2, 40, 16), Case.interaction(1, 2, 70, 16)]
# Entries of kernels/configs.py, by the case that shows what they do.
SWEPT = [
    (("token", 16), CASES[2]),
    (("token_backward", 16), CASES[2]),
    (("moment", 16), CASES[3]),
    (("quadratic_form", 16), CASES[3]),
    (("moment_backward", 16), CASES[3]),
    (("interaction_block", 16), CASES[5]),
    (("softmax", 16), CASES[7]),
    (("interaction", 16), CASES[8]),
    (("query_key_gradient", 16), CASES[8]),
]
DRY_SWEPT = [(("interaction", 32), DRY_CASES[1])]


class Timer:
    """Median time of a step: by events on a GPU, cache cold; by the clock in the interpreter."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.evicted = torch.empty(256 << 20, dtype=torch.uint8, device=device) if device == "cuda" else None

    def milliseconds(self, step: Callable[[], object]) -> float:
        if self.evicted is None:
            start = time.perf_counter()
            step()
            return (time.perf_counter() - start) * 1e3
        times: list[float] = []
        stop_at = time.perf_counter() + SECONDS_A_PROVIDER
        while len(times) < 5 or (time.perf_counter() < stop_at and len(times) < 200):
            self.evicted.zero_()
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop))
        return statistics.median(times[len(times) // 5 :])  # the first warm the clocks


def graph_of(step: Callable[[], object]) -> Callable[[], object]:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def peaks(timer: Timer) -> dict[str, float]:
    side, size = (8192, 1 << 30) if timer.device == "cuda" else (64, 1 << 16)
    a, b = (torch.randn(side, side, device=timer.device, dtype=torch.bfloat16) for _ in range(2))
    source, target = (torch.empty(size, dtype=torch.uint8, device=timer.device) for _ in range(2))
    return {
        "matmul_tflops": 2 * side**3 / timer.milliseconds(lambda: torch.mm(a, b)) / 1e9,
        "copy_gbytes": 2 * size / timer.milliseconds(lambda: target.copy_(source)) / 1e6,
    }


def measure(case: Case, name: str, loss: Loss, dtype: str, timer: Timer) -> dict[str, Any]:
    """Error on a part of the case, then time, rate and memory on all of it; or why there are none."""
    part = case.inputs(timer.device, DTYPES[dtype], part=True)
    oracle = gradients(losses()[case.kind]["eager"], [x.double() for x in part])
    row: dict[str, Any] = {"provider": name, "dtype": dtype}
    try:
        results = gradients(loss, part)
        row["error"] = max(relative_error(r, e) for r, e in zip(results, oracle, strict=True))
        if not row["error"] < WRONG:
            return row | {"why": "wrong"}
        del results, oracle
        inputs = case.inputs(timer.device, DTYPES[dtype])

        def step() -> object:
            return gradients(loss, inputs)

        step()
        if timer.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            row["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        row["ms"] = timer.milliseconds(step)
        row["tflops"] = case.floor / row["ms"] / 1e9
        if name == "ours" and timer.device == "cuda":
            row["graph_ms"] = timer.milliseconds(graph_of(step))
    except Exception as error:  # one that cannot run must not cost the others their time on the device
        row["why"] = f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        if timer.device == "cuda":
            torch.cuda.empty_cache()
    return row


def benchmarks(cases: Sequence[Case], timer: Timer, stop_at: float, dry: bool) -> list[dict[str, Any]]:
    """Ours on all cases first, then what takes longest to compile last: time may run out."""
    rows = []
    for name in ["ours"] if dry else ["ours", "eager", "compiled", "algebra compiled"]:
        for case in [case for case in cases if name in losses()[case.kind]]:
            for dtype in ["float32"] if dry else DTYPES:
                row = {"provider": name, "dtype": dtype, "why": "no time left"}
                if time.perf_counter() < stop_at:
                    row = measure(case, name, losses()[case.kind][name], dtype, timer)
                rows.append({"kind": case.kind, "shape": case.shape} | row)
    return sorted(rows, key=lambda row: (row["kind"], row["shape"]))


def candidates(found: Any) -> Iterator[Any]:
    for rows in {found.rows, 64, 128}:
        for columns in {found.columns, *({64, 128} if found.columns else {})}:
            for num_warps in (4, 8):
                for num_stages in (2, 3, 4):
                    yield replace(found, rows=rows, columns=columns, num_warps=num_warps, num_stages=num_stages)


def sweep(
    swept: Sequence[tuple[tuple[str, int], Case]], timer: Timer, stop_at: float, dry: bool
) -> list[dict[str, Any]]:
    """Each entry of the table beside its neighbours; a faster one counts if its gradients are as before."""
    from safr_fast.kernels import configs

    kind = configs.architecture(torch.device(timer.device))
    table = configs._OVERRIDES.setdefault(kind, {})
    rows = []
    for number, (key, case) in enumerate(swept):
        share_ends = time.perf_counter() + (stop_at - time.perf_counter()) / (len(swept) - number)
        inputs = case.inputs(timer.device, torch.float32 if dry else torch.bfloat16)
        loss = losses()[case.kind]["ours"]
        before = table.get(key)
        found = before or configs._CONFIGS[key]
        expected = [x.double() for x in gradients(loss, inputs)]
        for config in [found, *(c for c in candidates(found) if c != found)][: 2 if dry else None]:
            if time.perf_counter() > share_ends and not dry:
                break
            table[key] = config
            row = {"key": list(key), "shape": case.shape, "config": str(config), "is_table": config == found}
            try:
                results = gradients(loss, inputs)
                row["difference"] = max(relative_error(r, e) for r, e in zip(results, expected, strict=True))
                row["ms"] = timer.milliseconds(lambda loss=loss, inputs=inputs: gradients(loss, inputs))
            except Exception as error:  # what does not fit the chip is of many kinds
                row["why"] = f"{type(error).__name__}: {str(error)[:200]}"
            rows.append(row)
        if before is None:
            table.pop(key, None)
        else:
            table[key] = before
    return rows


def run_tests(seconds: float, dry: bool) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-k",
        "triton",
        "--deselect",
        "tests/test_triton_compile.py",
        "tests",
    ]
    if dry:
        command = [sys.executable, "-m", "pytest", "-q", "tests/test_triton_product.py"]
    start = time.perf_counter()
    try:
        run = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, timeout=seconds)
        tail, rc = run.stdout[-3000:], run.returncode
    except subprocess.TimeoutExpired as error:
        tail, rc = (error.stdout or b"").decode()[-3000:], None  # cut off: no verdict
    counts = {what: int(number) for number, what in re.findall(r"(\d+) (passed|failed|error|skipped)", tail)}
    return {"rc": rc, "seconds": time.perf_counter() - start, "counts": counts, "tail": tail}


def table(session: dict[str, Any]) -> str:
    tests = session["tests"]
    verdict = "cut off by the time" if tests["rc"] is None else f"exit status {tests['rc']}"
    lines = [
        f"# {session['device']}, {session['date']}" + (", dry run: no time here means anything" * session["dry_run"]),
        "",
        f"Tests: {tests['counts'] or 'none finished'}, {verdict}. `torch.mm` bfloat16 {session['matmul_tflops']:.3g} "
        f"TFLOP/s, copy {session['copy_gbytes']:.3g} GB/s. Versions: {session['versions']}.",
        "",
        "| loss | shape | provider | ms | as a graph | TFLOP/s | of matmul | peak, MiB | error |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in session["cases"]:
        share = row["tflops"] / session["matmul_tflops"] if "tflops" in row else None
        figures = [row.get("ms"), row.get("graph_ms"), row.get("tflops"), share, row.get("peak_mib"), row.get("error")]
        cells = ["" if x is None else f"{x:.3g}" for x in figures]
        cells[0] = cells[0] or row["why"].partition("\n")[0].replace("|", "/")[:60]
        provider = f"{row['provider']} {row['dtype']}"
        lines.append(f"| {row['kind']} | {'×'.join(map(str, row['shape']))} | {provider} | {' | '.join(cells)} |")
    lines += [
        "",
        "| entry of the table | shape | ms | best found, ms | best found |",
        "| --- | --- | --- | --- | --- |",
    ]
    for key in dict.fromkeys(tuple(row["key"]) for row in session["sweep"]):
        timed = [row for row in session["sweep"] if tuple(row["key"]) == key and row.get("difference", 1) < 1e-2]
        own = next((f"{row['ms']:.3g}" for row in timed if row["is_table"]), "")
        best = min(timed, key=lambda row: row["ms"], default=None)
        found = ["", "none was right"] if best is None else [f"{best['ms']:.3g}", best["config"]]
        shape = next(row["shape"] for row in session["sweep"] if tuple(row["key"]) == key)
        lines.append(f"| {key} | {'×'.join(map(str, shape))} | {own} | {' | '.join(found)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes in Triton's interpreter, on the CPU")
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "gpu")
    options = parser.parse_args()
    dry = options.dry_run
    if not dry and not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU: run where there is one, or with --dry-run")
    if dry:
        os.environ["TRITON_INTERPRET"] = "1"
    device = "cpu" if dry else "cuda"
    seconds, start = 60 * options.minutes, time.perf_counter()
    ends = {"tests": start + seconds * SHARES["tests"], "benchmarks": start + seconds * (1 - SHARES["sweep"])}
    tests = run_tests(ends["tests"] - start, dry)
    timer = Timer(device)
    session = {
        "device": "interpreter" if dry else torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(),
        "dry_run": dry,
        "versions": f"torch {torch.__version__}, CUDA {torch.version.cuda}, Python {sys.version.split()[0]}",
        "tests": tests,
        **peaks(timer),
        "cases": benchmarks(DRY_CASES if dry else CASES, timer, ends["benchmarks"], dry),
        "sweep": sweep(DRY_SWEPT if dry else SWEPT, timer, start + seconds, dry),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    name = "-".join([*re.findall(r"[a-z0-9]+", session["device"].lower()), session["date"]])
    (options.output / f"{name}.json").write_text(json.dumps(session, indent=1) + "\n")
    (options.output / f"{name}.md").write_text(table(session))
    print(table(session))
    if tests["rc"] not in (0, None) or any(row.get("why") == "wrong" for row in session["cases"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
