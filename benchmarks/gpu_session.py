"""Everything that a GPU has to be asked, in one command within ten minutes: tests, some of them under a memory
checker, benchmarks, a sweep over tiles.

    python benchmarks/gpu_session.py                     # writes benchmarks/results/gpu/<device>-<date>.json and .md
    python benchmarks/gpu_session.py --parts tests benchmarks --minutes 6
    python benchmarks/gpu_session.py --dry-run --output /somewhere    # no GPU: tiny shapes in Triton's interpreter

Each part has its share of the time and says what it left out. How it measures is in ``gpu.py``, which ``bench_gpu.py``
shares; the sweep is the tuner of ``SAFR_FAST_AUTOTUNE``, and what it chose can be used as ``SAFR_FAST_CACHE_DIR``.
"""

import argparse
import dataclasses
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from comparison import gradients
from gpu import CASES, DRY_CASES, DRY_PROVIDERS, DTYPES, PROVIDERS, Case, Peaks, Provider, measure, providers_of
from safr_fast.kernels.timing import Timer

HERE = Path(__file__).parent
SHARES = {"tests": 0.25, "sanitizer": 0.1, "benchmarks": 0.45, "sweep": 0.2}  # of the time
TESTS = ["-n", "auto", "-k", "triton", "--deselect", "tests/test_triton_compile.py", "tests"]
EDGES = ["-x", "-k", "triton", "tests/test_triton_workspace.py", "tests/test_importance.py"]
DRY_TESTS = ["tests/test_triton_product.py"]
NO_TIME = "no time left"
SECONDS_A_MEASUREMENT, SECONDS_A_TRIAL = 0.3, 0.2
# What the sweep tries the configurations of, most telling first.
SWEPT = [
    Case.query_key(32, 8, 2048, 64),
    Case.query_key(32, 8, 512, 64),
    Case.hidden("importance loss", 32, 512, 256),
    Case.hidden("importance loss", 32, 2048, 256),
    Case.query_key(32, 8, 64, 64),
]
DRY_SWEPT = [Case.query_key(1, 2, 40, 16)]


def benchmarks(
    cases: Sequence[Case], providers: Sequence[Provider], timer: Timer, peaks: Peaks, device: str, stop_at: float
) -> list[dict[str, Any]]:
    """Provider by provider over all cases: time may run out."""
    rows = []
    for provider in providers:
        for case in [case for case in cases if provider in providers_of(case, providers)]:
            row = {"why": NO_TIME}
            if time.perf_counter() < stop_at:
                row = measure(case, provider, timer, peaks, device)
            rows.append({"kind": case.kind, "shape": case.shape, "provider": provider.name} | row)
    return sorted(rows, key=lambda row: (row["kind"], row["shape"]))


def sweep(cases: Sequence[Case], device: str, folder: Path, stop_at: float) -> list[dict[str, Any]]:
    """Every trial of the tuner on these cases; what it chose lies in ``folder``."""
    from safr_fast.kernels import tuning

    where = torch.device(device)
    gpu = tuning.Device.of(where) if device == "cuda" else tuning.Device("interpreter", "", "", "", 1 << 30, False)
    rows: list[dict[str, Any]] = []
    for number, case in enumerate(cases):
        tuner = tuning.Tuner(
            gpu, folder, Timer.of(where, SECONDS_A_TRIAL),
            lambda trial, case=case: rows.append({"case": case.title, **trial}),
        )  # fmt: skip
        tuner.deadline = time.perf_counter() + (stop_at - time.perf_counter()) / (len(cases) - number)
        inputs = case.inputs(device, DTYPES["bfloat16" if device == "cuda" else "float32"])
        with tuning.using(tuner):
            gradients(case.losses(device)["ours"], inputs)
    return rows


def run_tests(tests: Sequence[str], seconds: float, under: Sequence[str] = (), **environment: str) -> dict[str, Any]:
    """pytest on ``tests``, run ``under`` another command if given. ``rc`` is None where the time cut it off."""
    command = [*under, sys.executable, "-m", "pytest", "-q", *tests]
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        run = subprocess.Popen(
            command, cwd=HERE.parent, stdout=output, stderr=subprocess.STDOUT, env=os.environ | environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            rc = run.wait(seconds)
        except subprocess.TimeoutExpired:
            rc = None
            os.killpg(run.pid, signal.SIGKILL)  # what it started too: nothing may go on beside the measurements
            run.wait()
        output.seek(0)
        text = output.read()
    tail = text[-3000:]
    counts = {what: int(number) for number, what in re.findall(r"(\d+) (passed|failed|error|skipped)", tail)}
    result = {"rc": rc, "seconds": time.perf_counter() - start, "counts": counts or progress(text)}
    return result | ({"tail": tail} if rc else {})  # what failed


def progress(text: str) -> dict[str, int]:
    """What pytest had printed of its tests before it was cut off."""
    letters = Counter("".join(re.findall(r"^([.FEsxX]+)(?: +\[ *\d+%\])?$", text, re.M)))
    names = {".": "passed", "F": "failed", "E": "error", "s": "skipped"}
    return {name: letters[letter] for letter, name in names.items() if letters[letter]}


def run_sanitizer(seconds: float, dry: bool) -> dict[str, Any]:
    """The kernels' tests that reach for the edges of memory, under ``compute-sanitizer``."""
    tool = "env" if dry else shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    )  # fmt: skip
    if tool is None:
        return {"why": "no compute-sanitizer: it comes with the CUDA toolkit, put its folder bin in PATH"}
    options = [] if dry else ["--tool", "memcheck", "--error-exitcode", "86", "--target-processes", "all"]
    # Without PyTorch's own pool each tensor ends where CUDA says it does.
    return run_tests(DRY_TESTS if dry else EDGES, seconds, [tool, *options], PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def table(session: dict[str, Any]) -> str:
    rates = ", ".join(f"{dtype} {rate:.3g} TFLOP/s" for dtype, rate in session["matmul_tflops"].items())
    lines = [
        f"# {session['device']}, {session['date']}" + (", dry run: no time here means anything" * session["dry_run"]),
        "",
        f"Tests: {_verdict(session['tests'])}. Under compute-sanitizer: {_verdict(session['sanitizer'])}.",
        "",
        f"`torch.mm` of {rates}; copy {session['copy_gbytes']:.3g} GB/s. Versions: {session['versions']}.",
        "",
        "| loss | shape | provider | ms | as a graph | TFLOP/s | of matmul | of copy | peak, MiB | error |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    unmeasured = Counter(row["provider"] for row in session["cases"] if row.get("why") == NO_TIME)
    for row in session["cases"]:
        if row.get("why") == NO_TIME:
            continue
        names = ("ms", "graph_ms", "tflops", "fraction_of_matmul", "fraction_of_copy", "peak_mib", "error")
        cells = ["" if row.get(name) is None else f"{row[name]:.3g}" for name in names]
        cells[0] = cells[0] or row["why"].partition("\n")[0].replace("|", "/")[:60]
        shape = "×".join(map(str, row["shape"]))
        lines.append(f"| {row['kind']} | {shape} | {row['provider']} | {' | '.join(cells)} |")
    if unmeasured:
        missing = ", ".join(f"{count} of {name}" for name, count in unmeasured.items())
        lines += ["", f"There was no time left for cases of these: {missing}."]
    if session["sweep"]:
        lines += [
            "",
            "| what the table has for | in | ms | best found, ms | best found |",
            "| --- | --- | --- | --- | --- |",
        ]
    for name in dict.fromkeys(row["name"] for row in session["sweep"]):
        tried = [row for row in session["sweep"] if row["name"] == name]
        timed = [row for row in tried if "ms" in row]
        own = next((f"{row['ms']:.3g}" for row in timed if row["is_table"]), "")
        best = min(timed, key=lambda row: row["ms"], default=None)
        found = ["", "none was right"] if best is None else [f"{best['ms']:.3g}", best["config"]]
        lines.append(f"| {name} | {tried[0]['case']} | {own} | {' | '.join(found)} |")
    return "\n".join(lines) + "\n"


def _verdict(tests: dict[str, Any]) -> str:
    if "why" in tests:
        return str(tests["why"])
    counts = ", ".join(f"{number} {what}" for what, number in tests["counts"].items()) or "none finished"
    return counts + (", cut off by the time" if tests["rc"] is None else f", exit status {tests['rc']}")


def write(folder: Path, session: dict[str, Any]) -> None:
    name = "-".join([*re.findall(r"[a-z0-9]+", session["device"].lower()), session["date"]])
    (folder / f"{name}.json").write_text(json.dumps(session, indent=1) + "\n")
    (folder / f"{name}.md").write_text(table(session))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes in Triton's interpreter, on the CPU")
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument("--parts", nargs="+", choices=SHARES, default=list(SHARES), help="by default all")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "gpu")
    options = parser.parse_args()
    dry = options.dry_run
    if not dry and not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU: run where there is one, or with --dry-run")
    if dry:
        os.environ["TRITON_INTERPRET"] = "1"
    device = "cpu" if dry else "cuda"
    start = time.perf_counter()
    whole = sum(SHARES[part] for part in options.parts)
    seconds = {part: 60 * options.minutes * SHARES[part] / whole for part in options.parts}
    end = start + 60 * options.minutes
    tests = sanitizer = {"why": "left out"}
    if "tests" in seconds:
        tests = run_tests(DRY_TESTS if dry else TESTS, seconds["tests"])
    if "sanitizer" in seconds:
        sanitizer = run_sanitizer(seconds["sanitizer"], dry)
    timer = Timer.of(torch.device(device), SECONDS_A_MEASUREMENT)
    peaks = Peaks.measured(timer, device)
    options.output.mkdir(parents=True, exist_ok=True)
    session = {
        "device": "interpreter" if dry else torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(),
        "dry_run": dry,
        "versions": f"torch {torch.__version__}, CUDA {torch.version.cuda}, Python {sys.version.split()[0]}",
        "tests": tests,
        "sanitizer": sanitizer,
        **dataclasses.asdict(peaks),
        "cases": [],
        "sweep": [],
    }
    if "benchmarks" in seconds:
        cases, providers = (DRY_CASES, DRY_PROVIDERS) if dry else (CASES, PROVIDERS)
        session["cases"] = benchmarks(cases, providers, timer, peaks, device, end - seconds.get("sweep", 0.0))
        write(options.output, session)  # what comes next may end in the device's own failure
    if "sweep" in seconds:
        session["sweep"] = sweep(DRY_SWEPT if dry else SWEPT, device, options.output / "tuning", end)
    write(options.output, session)
    print(table(session))
    failed = any(part.get("rc") not in (0, None) for part in (tests, sanitizer))
    if failed or any(row["provider"].startswith("ours") and row.get("why") == "wrong" for row in session["cases"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
